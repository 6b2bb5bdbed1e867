"""The manifests on a real API server, and the flows' own account there: enough rights, and no others."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.settings import Settings
from deployments.kubernetes.checks import policy
from deployments.kubernetes.checks.build import ROOT, Object, build
from deployments.kubernetes.setup import in_namespace
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import KubernetesCluster, objects
from tasks.cluster.kubernetes.inspection import SECRET, inspect
from tasks.cluster.kubernetes.procedures import KubernetesProcedures
from tasks.cluster.procedures import Update
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.node import eventually

pytestmark = pytest.mark.slow
V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
STABLE, CANARY, BASELINE, *_ = Track
READY_S = 90.0
OVERLAY = ROOT / "overlays" / "local-cluster"
# Only an orchestrator with real images would run these; here they would wait for an image for ever.
NOT_STARTED = ("Deployment/prefect-worker", "StatefulSet/prefect-server")


@dataclass
class Applied:
    """What the API server took, and the kinds that it does not have."""

    namespace: KubeNamespace
    objects: dict[str, Object] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def apply(self, wanted: Object, manager: str) -> Any:
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        wanted = moved(wanted, self.namespace.name)
        try:
            resource = self.api.resources.get(api_version=wanted["apiVersion"], kind=wanted["kind"])
        except ResourceNotFoundError:
            self.skipped.append(policy.name(wanted))
            return None
        made = resource.server_side_apply(body=wanted, field_manager=manager, force_conflicts=False).to_dict()
        self.objects[policy.name(wanted)] = made
        return made

    @functools.cached_property
    def api(self) -> Any:
        from kubernetes.config import new_client_from_config
        from kubernetes.dynamic import DynamicClient

        return DynamicClient(new_client_from_config(str(self.namespace.kubeconfig)))

    def account(self, name: str) -> KubernetesCluster:
        """The cluster as a pod of this account sees it."""
        file = self.namespace.account(name)
        return KubernetesCluster.from_settings(self.namespace.cluster_settings(kubeconfig=file))


def moved(wanted: Object, namespace: str) -> Object:
    """The same for another namespace, with no replicas of what has no image here."""
    found = in_namespace(wanted, namespace)
    if policy.name(found) in NOT_STARTED:
        found["spec"]["replicas"] = 0
    return found


@pytest.fixture(scope="module")
def applied(tmp_path_factory: Any) -> Iterator[Applied]:
    settings = {"service_account": "ml-service"}
    with running_namespace(tmp_path_factory.mktemp("manifests"), settings=settings) as namespace:
        made = Applied(namespace)
        try:
            for one in build(OVERLAY):
                made.apply(one, "kubectl")
            yield made
        finally:
            for one in made.objects.values():
                if one["kind"].startswith("ClusterRole"):
                    api = made.api.resources.get(api_version=one["apiVersion"], kind=one["kind"])
                    api.delete(name=one["metadata"]["name"])


def test_the_api_server_takes_every_manifest_and_a_second_time_changes_nothing(
    applied: Applied, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: one["metadata"].get("generation") for name, one in applied.objects.items()}
    assert {"Role/khet-pipelines", "NetworkPolicy/default-deny", "StatefulSet/prefect-server"} <= before.keys()
    with capsys.disabled():
        print(f"\nnot served by this cluster, so not applied: {', '.join(applied.skipped) or 'nothing'}")
    assert all(name.split("/")[0] in ("PodDisruptionBudget", "HorizontalPodAutoscaler") for name in applied.skipped)
    metadata = {"name": "ml-service", "namespace": applied.namespace.name}
    public_key = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    applied.apply({**public_key, "data": {"release.pub": "a key"}}, "release-key")
    for one in build(OVERLAY):
        applied.apply(one, "kubectl")
    assert set(applied.objects["ConfigMap/ml-service"]["data"]) == {"settings.yaml", "release.pub"}
    assert {name: one["metadata"].get("generation") for name, one in applied.objects.items()} == before


def test_the_flows_do_all_they_do_with_their_own_account_and_go_on_from_what_was_applied(applied: Applied) -> None:
    for one in build(OVERLAY / "serving"):
        applied.apply(one, objects.MANAGER)  # its image does not exist here; the flows bring another
    applied.namespace.behave()
    cluster = applied.account("khet-pipelines")
    cluster.rollback(V1, 1)
    assert cluster.room() > 0
    for track in (CANARY, BASELINE):
        cluster.deploy(track, V2 if track is CANARY else V1, 1)
        cluster.wait_ready(track, READY_S)
    cluster.set_weights({STABLE: 0.4, CANARY: 0.3, BASELINE: 0.3}, lease_s=60)
    cluster.renew_lease(60)
    assert cluster.counters()[CANARY].version == V2
    assert "v1.1.0" in cluster.logs(CANARY)
    assert not cluster.enforce()
    cluster.restart(CANARY)
    cluster.wait_ready(CANARY, READY_S)
    cluster.set_weights({STABLE: 1.0})
    for track in (CANARY, BASELINE):
        cluster.remove(track)
    cluster.scale(STABLE, 2)
    cluster.wait_ready(STABLE, READY_S)
    procedures = KubernetesProcedures(cluster)
    update = Update(version=V2, replicas=2, deadline_s=READY_S)
    assert "v1.1.0" in procedures.update(update, dry_run=True)
    procedures.update(update)
    procedures.wait_updated(update)
    eventually(lambda: {one.version for one in cluster.status().replicas} == {V2}, 30)


def test_no_account_can_do_more(applied: Applied) -> None:
    for name in ("khet-pipelines", "ml-service", "khet-training", "prefect-worker"):
        kube = applied.account(name).kube
        with pytest.raises(ConfigError, match="the permission to list secrets is missing"):
            kube.find(SECRET)
    replica = applied.account("ml-service")
    with pytest.raises(ConfigError, match="the permission to list deployments"):
        replica.status()


def test_the_doctor_finds_the_flows_own_account_sufficient_and_looks_at_no_secret_with_it(applied: Applied) -> None:
    settings = applied.account("khet-pipelines").settings
    found = {finding.name: finding for finding in inspect(Settings(cluster=settings))}
    assert (found["permissions"].state, found["room"].state) == ("ok", "ok")
    assert {found[name].state for name in ("replica secret", "pod", "permissions of pods")} == {"skipped"}
