"""`khet cluster init` short of a cluster: what it chooses, fills in and hides; and what `khet up` keeps for it."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

from configs.areas import ClusterSettings, DatabaseSettings, ObjectStoreSettings, RegistrySettings, StackSettings
from configs.errors import ConfigError, SafetyError
from configs.settings import Settings, load_settings
from deployments import local
from deployments.kubernetes import setup
from deployments.kubernetes.checks import policy
from deployments.kubernetes.checks.build import ROOT, Object, build
from deployments.local import process
from deployments.local.files import Layout
from deployments.local.site import Site
from deployments.local.stack import parts

SECRET = "s3-very-secret"


@pytest.fixture(scope="module")
def built() -> list[Object]:
    return build(ROOT / "overlays" / "local-cluster")


def settings(tmp_path: Path, **areas: Any) -> Settings:
    """Those of a machine whose stack pods reach."""
    for name in ("signing.pem", "release.pub.pem"):
        (tmp_path / name).write_text(f"{name}\n")
    store = ObjectStoreSettings(
        endpoint_url="http://127.0.0.1:8333", access_key_id="KHET", secret_access_key=SecretStr(SECRET)
    )
    keys = RegistrySettings(signing_key=tmp_path / "signing.pem", trusted_keys=(tmp_path / "release.pub.pem",))
    dsn = SecretStr("postgresql://khet:db-very-secret@127.0.0.1:5432/khetguard")
    whole = {
        "object_store": store,
        "registry": keys,
        "database": DatabaseSettings(dsn=dsn),
        "stack": StackSettings(listen="10.97.0.1"),
        "cluster": ClusterSettings(backend="kubernetes"),
    }
    return Settings(**{**whole, **areas})


def config_map(objects: list[Object], name: str, file: str = "settings.yaml") -> Any:
    found = next(one for one in objects if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", name))
    return yaml.safe_load(found["data"][file])


def filled(built: list[Object], given: Settings, image: str | None = None) -> list[Object]:
    chosen, _ = setup._chosen(built, given)
    cluster = setup._cluster(chosen, given, image)
    return [setup._filled(one, given, cluster) for one in chosen] + list(setup._secrets(given, cluster))


def test_pods_are_told_where_this_machine_s_stack_is_and_whom_to_trust(built, tmp_path):
    made = filled(built, settings(tmp_path))
    for name in ("ml-service", "khet-pipelines"):
        values = config_map(made, name)
        assert values["object_store"] == {"endpoint_url": "http://10.97.0.1:8333"}
        assert values["registry"]["trusted_keys"] == ["/etc/khet/release.pub"]
        assert config_map(made, name, "release.pub") == "release.pub.pem"
    assert [problem for one in made if one["kind"] != "Secret" for problem in policy.violations(one)] == []


def test_flows_here_and_flows_in_the_cluster_make_the_same_replicas(built, tmp_path):
    given = settings(tmp_path)
    chosen, _ = setup._chosen(built, given)
    here = setup._cluster(chosen, given, "registry.example.org/serving:v7")
    there = config_map(filled(built, given, "registry.example.org/serving:v7"), "khet-pipelines")["cluster"]
    assert here["kubernetes"] == there["kubernetes"]
    assert here["kubernetes"]["image"] == "registry.example.org/serving:v7"
    assert {**there, "gateway_url": None} == {**here, "gateway_url": None}


def test_secrets_go_only_where_somebody_reads_them(built, tmp_path):
    beside = {one["metadata"]["name"] for one in filled(built, settings(tmp_path)) if one["kind"] == "Secret"}
    assert beside == {"ml-secrets"}  # flows run on this machine: neither its key nor its database's password leave it
    given = settings(tmp_path, stack=StackSettings(listen="10.97.0.1", orchestrator="external"))
    there = {one["metadata"]["name"]: one["data"] for one in filled(built, given) if one["kind"] == "Secret"}
    assert there.keys() == {"ml-secrets", "khet-pipelines", "khet-signing-key"}
    assert base64.b64decode(there["khet-signing-key"]["release.key"]) == b"signing.pem\n"
    assert b"10.97.0.1" in base64.b64decode(there["khet-pipelines"]["database-dsn"])


def test_prefect_stays_out_of_a_cluster_whose_flows_run_here(built, tmp_path):
    chosen, left_out = setup._chosen(built, settings(tmp_path))
    assert "StatefulSet/prefect-server" in {policy.name(one) for one in left_out}
    assert not [one for one in chosen if any(policy.pod_templates(one))]
    external = settings(tmp_path, stack=StackSettings(orchestrator="external"))
    assert setup._chosen(built, external) == (built, [])


def test_no_secret_is_in_a_diff_or_a_repr(tmp_path):
    value = base64.b64encode(SECRET.encode()).decode()
    live = {"kind": "Secret", "data": {"a": "b2xk", "b": value}}
    shown = json.dumps(setup._readable(live, {"kind": "Secret", "data": {"a": value, "b": value}}))
    assert value not in shown
    assert SECRET not in shown
    assert setup._readable(live, {"kind": "Secret", "data": {"a": value, "b": value}})[1]["data"] == {
        "a": "(hidden, new)", "b": "(hidden)",
    }  # fmt: skip
    change = setup.Change("Secret/x", setup.SECRET, live, "diff")
    assert value not in repr(change)


def test_another_namespace_gets_everything_and_takes_nothing_from_the_first(built):
    moved = [setup.in_namespace(one, "leaves") for one in built]
    assert "khet-guard" not in {one["metadata"].get("namespace", "leaves") for one in moved}
    cluster_wide = {policy.name(one) for one in moved if one["kind"].startswith("ClusterRole")}
    assert cluster_wide == {
        "ClusterRole/khet-pipelines-capacity-leaves", "ClusterRoleBinding/khet-pipelines-capacity-leaves",
    }  # fmt: skip
    assert policy.unresolved(moved) == policy.unresolved(built)


@pytest.mark.parametrize(
    ("overlay", "said"),
    [("nowhere", "there is no overlay nowhere"), ("production", "KHET_PROFILE=production khet cluster init")],
)
def test_an_overlay_that_is_not_for_this_machine_is_refused(overlay, said):
    with pytest.raises(ConfigError, match=said):
        setup._folder(overlay)


def test_keys_that_pods_need_and_nobody_named_are_asked_for(built, tmp_path):
    with pytest.raises(ConfigError, match=r"registry\.trusted_keys is empty"):
        filled(built, settings(tmp_path, registry=RegistrySettings()))


# What `khet up` keeps


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KHET_HOME", str(tmp_path / "khet"))
    return tmp_path / "khet"


def test_what_was_chosen_is_kept_until_something_else_is(home):
    local.choose(listen="10.97.0.1", backend="kubernetes")
    local.choose()
    assert (str(load_settings().stack.listen), load_settings().cluster.backend) == ("10.97.0.1", "kubernetes")
    local.choose(listen="loopback", backend="local-node")
    assert (load_settings().stack.listen, load_settings().cluster.backend) == (None, "local-node")


@pytest.mark.parametrize("chosen", [{"listen": "0.0.0.0"}, {"listen": "localhost"}, {"backend": "nomad"}])
def test_a_wrong_choice_changes_nothing(home, chosen):
    with pytest.raises(ConfigError, match="khet up: "):
        local.choose(**chosen)
    assert not (home / "settings.yaml").exists()


def test_a_stack_that_runs_is_not_changed_behind_its_back(home):
    layout = Layout(home)
    layout.make()
    myself = process.identify(os.getpid())
    assert myself is not None
    process.remember(layout.supervisor, myself)  # any process that lives
    with pytest.raises(SafetyError, match="khet down"):
        local.choose(listen="10.97.0.1")
    local.choose(listen="loopback", backend="local-node")  # as it is: nothing to refuse


def test_a_stack_for_pods_has_a_door_and_a_password_and_no_node(home):
    Site.prepare(Settings(), home)
    local.choose(listen="10.97.0.1", backend="kubernetes")
    site = Site.prepare(load_settings(), home)
    assert {part.name for part in parts(site)} == {
        "object-store", "postgres", "prefect-server", "prefect-worker", "door",
    }  # fmt: skip
    written = yaml.safe_load((home / "settings.yaml").read_text())
    assert written["orchestrator"]["auth_string"] == site.prefect_auth
    assert written["cluster"] == {"backend": "kubernetes"}  # the node's addresses went with it
    assert written["object_store"]["endpoint_url"].startswith("http://127.0.0.1:")
