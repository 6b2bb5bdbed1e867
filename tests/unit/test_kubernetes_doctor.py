"""What the doctor makes of a cluster: its probe, what that probe's end means, and a cluster that does not answer."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr, ValidationError

from configs.areas import ClusterSettings, DatabaseSettings, ObjectStoreSettings, StackSettings
from configs.errors import ConfigError
from configs.settings import Settings
from deployments.kubernetes.checks import policy, schemas
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import inspection, objects, probe
from tasks.cluster.kubernetes.addresses import for_pods, host_and_port
from tasks.cluster.kubernetes.permissions import PERMISSIONS

CLUSTER = ClusterSettings(backend="kubernetes", kubernetes={"service_account": "ml-service", "pull_secret": "pull"})
V1 = Version(1, 0, 0)


def as_template(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod as rules for manifests read it."""
    return {"kind": "Job", "metadata": pod["metadata"], "spec": {"template": pod}}


def test_the_probe_is_a_replica_that_looks_around_under_the_same_restrictions():
    made = probe.manifest(CLUSTER, V1, "db.example.org:5432")
    replica = objects.deployment(CLUSTER, Track.stable, V1)["spec"]["template"]["spec"]
    one, other = made["spec"]["containers"][0], replica["containers"][0]
    same = ("image", "imagePullPolicy", "volumeMounts", "securityContext", "env")
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    for name in ("serviceAccountName", "imagePullSecrets", "volumes", "securityContext"):
        assert made["spec"][name] == replica[name]
    assert policy.violations(as_template(made)) == []
    assert made["spec"]["restartPolicy"] == "Never"
    assert made["metadata"]["labels"]["app.kubernetes.io/component"] == "flow-run"  # for network policies
    assert made["metadata"]["labels"][objects.NAME] != CLUSTER.kubernetes.service  # no Service selects it


@pytest.mark.parametrize("version", [schemas.VERSIONS[0], schemas.VERSIONS[-1]])
def test_what_the_doctor_sends_is_valid_where_no_test_cluster_is_so_new(version):
    for user in (None, "system:serviceaccount:khet-guard:khet-pipelines"):
        for one in PERMISSIONS:
            kind, body = inspection.review(one, "khet-guard", user)
            assert schemas.problems({"apiVersion": kind.api_version, "kind": kind.name, **body}, version) == []
    made = {"apiVersion": "v1", "kind": "Pod", **probe.manifest(CLUSTER, V1, "db:5432")}
    assert schemas.problems(made, version) == []


def test_no_secret_is_in_the_probe_s_pod():
    dsn = SecretStr("postgresql://khet:very-secret@db.example.org/khetguard")
    made = probe.manifest(CLUSTER, None, "{}:{}".format(*host_and_port(dsn)))
    assert "very-secret" not in json.dumps(made)
    container = made["spec"]["containers"][0]
    assert container["args"] == ["--database", "db.example.org:5432"]
    assert "MODEL_VERSION" not in {one["name"] for one in container["env"]}
    with pytest.raises(ConfigError) as caught:
        host_and_port(SecretStr("very-secret = no dsn ="))
    assert "very-secret" not in str(caught.value)


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


def ended(code: int, message: str) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "message": message}}}]}


@pytest.mark.parametrize(
    ("status", "states", "said"),
    [
        (waiting("ErrImagePull", "not found"), ["failed", "skipped"], "ErrImagePull: not found"),
        (waiting("ErrImageNeverPull"), ["failed", "skipped"], "ErrImageNeverPull"),
        (waiting("CreateContainerConfigError", "no key"), ["ok", "failed"], "CreateContainerConfigError: no key"),
        (ended(1, "... No module named ml.reach"), ["ok", "failed"], "ended with code 1 .* No module named ml.reach"),
        ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, ["ok", "failed"], "Evicted: disk"),
        (ended(0, '{"object store": {"ok": true, "detail": "fine"}}'), ["ok", "ok"], "fine"),
        (ended(5, '{"database": {"ok": false, "detail": "refused"}}'), ["ok", "failed"], "refused"),
    ],
)
def test_what_became_of_the_probe_is_said_with_the_pod_s_own_reason(status, states, said):
    found = probe.result({"spec": {"nodeName": "node1"}, "status": status})
    assert found is not None
    findings = list(inspection.probed(found, "serving:v1"))
    assert [finding.state for finding in findings] == states
    assert any(re.search(said, finding.detail) for finding in findings)


@pytest.mark.parametrize(
    "status", [{}, waiting("ContainerCreating"), {"containerStatuses": [{"state": {"running": {}}}]}]
)
def test_a_probe_that_is_under_way_is_waited_for(status):
    assert probe.result({"spec": {}, "status": status}) is None


@pytest.mark.parametrize(
    ("version", "state"),
    [("v1.29.9", "warning"), ("v1.30.0", "ok"), ("v1.36.1+k3s1", "ok"), ("v1.37.0-gke.12", "ok"),
     ("v1.38.0", "warning"), ("v2.0.0", "warning"), ("", "warning")],
)  # fmt: skip
def test_a_version_that_nobody_tried_is_a_warning_that_names_it(version, state):
    finding = inspection._supported(version)
    assert (finding.state, version in finding.detail) == (state, True)


LISTEN = StackSettings(listen="10.97.0.1")


@pytest.mark.parametrize(
    ("dsn", "seen"),
    [
        ("postgresql://u:p%40ss@127.0.0.1:5433/khetguard", ("10.97.0.1", 5433)),
        ("host=localhost user=u password='p@ss'", ("10.97.0.1", 5432)),
        ("postgresql://u:p%40ss@db.example.org/khetguard", ("db.example.org", 5432)),
    ],
)
def test_pods_get_the_address_that_they_reach_and_the_rest_as_it_was(dsn, seen):
    from psycopg.conninfo import conninfo_to_dict

    given = Settings(stack=LISTEN, database=DatabaseSettings(dsn=SecretStr(dsn)))
    made = for_pods(given).database.dsn
    assert made is not None
    assert host_and_port(made) == seen
    assert conninfo_to_dict(made.get_secret_value())["password"] == "p@ss"


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://127.0.0.1:8333", "http://10.97.0.1:8333"),
        ("http://[::1]:8333/prefix", "http://10.97.0.1:8333/prefix"),
        ("https://s3.example.org", "https://s3.example.org"),
        (None, None),
    ],
)
def test_only_the_loopback_is_replaced(url, seen):
    given = Settings(stack=LISTEN, object_store=ObjectStoreSettings(endpoint_url=url))
    assert for_pods(given).object_store.endpoint_url == seen


def test_a_loopback_address_that_pods_cannot_have_is_named():
    given = Settings(object_store=ObjectStoreSettings(endpoint_url="http://127.0.0.1:8333"))
    with pytest.raises(ConfigError, match=r"object_store.endpoint_url is http://127.0.0.1:8333.*\n.*khet up --listen"):
        for_pods(given)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "::1", "224.0.0.1", "everywhere"])
def test_the_stack_listens_at_one_address_that_is_named(address):
    with pytest.raises(ValidationError):
        StackSettings(listen=address)


def kubeconfig(home: Path, port: int) -> Path:
    file = home / "kubeconfig"
    named = {"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "test", "context": {"cluster": "test", "user": "test"}}
    whole = {"clusters": [named], "contexts": [context], "users": [{"name": "test", "user": {}}]}
    file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "test", **whole}))
    return file


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """Accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("answers", ["refuses", "is silent"])
def test_where_the_api_server_does_not_answer_the_rest_is_skipped_and_says_why(tmp_path, answers):
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(silent_server()) if answers == "is silent" else 9
        area = {"kubeconfig": kubeconfig(tmp_path, port)}
        began = time.monotonic()
        found = inspection.inspect(Settings(cluster=ClusterSettings(kubernetes=area, call_timeout_s=0.3)))
    assert time.monotonic() - began < 10
    assert (found[0].name, found[0].state) == ("api server", "failed")
    assert f"http://127.0.0.1:{port} did not answer" in found[0].detail
    assert {finding.name for finding in found[1:]} == {"namespace", *inspection.QUESTIONS}
    assert {(finding.state, finding.detail) for finding in found[1:]} == {
        ("skipped", "not asked: the API server did not answer")
    }


def test_a_context_that_is_not_there_is_the_first_finding(tmp_path):
    area = {"kubeconfig": kubeconfig(tmp_path, 9), "context": "nowhere"}
    found = inspection.inspect(Settings(cluster=ClusterSettings(kubernetes=area)))
    assert found[0].state == "failed"
    assert "nowhere" in found[0].detail
