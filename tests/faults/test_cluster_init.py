"""`khet cluster init` that is interrupted, or may not: it says what was done, and the next one goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError, ExternalError
from configs.settings import load_settings
from deployments.kubernetes import setup
from deployments.local.files import Layout
from deployments.local.site import remember
from flows.commands import cluster as command
from tasks.audit import audit
from tasks.cluster.kubernetes.client import Kind
from tasks.cluster.kubernetes.inspection import ACCOUNT, FLOW_RUNS
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.node import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CLUSTER_WIDE = (
    Kind("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles", namespaced=False),
    Kind("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
)
ASKED: dict[str, str | None] = dict.fromkeys(("namespace", "context", "kubeconfig", "image"))


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeNamespace]:
    """A namespace, and settings of a machine that pods reach."""
    home, key = tmp_path / "khet", tmp_path / "release.pub"
    key.write_text("a public key\n")
    monkeypatch.setenv("KHET_HOME", str(home))
    with running_namespace(tmp_path) as made:
        area = made.cluster_settings().model_dump(mode="json", exclude_unset=True)
        registry = {"trusted_keys": [str(key)]}
        remember(Layout(home), {"cluster": area, "registry": registry, "stack": {"listen": "192.0.2.1"}})
        try:
            yield made
        finally:
            for kind in CLUSTER_WIDE:
                made.admin.delete(kind, f"khet-pipelines-capacity-{made.name}")


def test_what_an_api_server_that_went_away_interrupted_is_gone_on_with(namespace: KubeNamespace) -> None:
    def close() -> None:
        eventually(lambda: namespace.admin.get(ACCOUNT, FLOW_RUNS), 30)
        namespace.door.close()

    closing = threading.Thread(target=close)
    closing.start()
    try:
        with pytest.raises(ExternalError, match=r"(?s)did not answer.*Applied before it: .*ServiceAccount/khet-pipe"):
            command.init(ASKED, None, dry_run=False, as_json=True)
    finally:
        closing.join()
        namespace.door.open()
    assert [record.outcome for record in audit(load_settings()).tail(5)] == ["intended", "failed"]

    settings, kube = load_settings(), namespace.admin.written_by(setup.MANAGER)
    plan = setup.plan_setup(settings, kube, "local-cluster")
    assert "ServiceAccount/khet-pipelines" in plan.unchanged
    setup.apply(kube, plan.changes)
    assert setup.plan_setup(settings, kube, "local-cluster").changes == ()


def test_who_may_not_is_told_which_permission_is_missing_and_nothing_is_done(namespace: KubeNamespace) -> None:
    limited = namespace.limited([{"apiGroups": [""], "resources": ["serviceaccounts"], "verbs": ["get", "list"]}])
    with pytest.raises(ConfigError, match="the permission to get namespaces is missing"):
        command.init({**ASKED, "kubeconfig": str(limited)}, None, dry_run=False, as_json=True)
    assert namespace.admin.get(ACCOUNT, FLOW_RUNS) is None
    assert audit(load_settings()).tail(5) == []
