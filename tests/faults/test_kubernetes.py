"""What goes wrong on a real Kubernetes: each fault has its message, and nothing is worse than before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from configs.errors import ConfigError, ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import KubernetesCluster
from tasks.cluster.kubernetes.client import AUTOSCALER, DEPLOYMENT, EVENT, LEASE, POD, ROUTE, Kind, Kube
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.node import eventually

pytestmark = pytest.mark.slow
V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
STABLE, CANARY, BASELINE, *_ = Track
READY_S = 60.0
DEFINITION = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: Any) -> Iterator[KubeNamespace]:
    with running_namespace(tmp_path_factory.mktemp("kube")) as made:
        yield made


@pytest.fixture
def served(namespace: KubeNamespace) -> KubeNamespace:
    """v1.0.0 on stable, nothing else."""
    namespace.behave()
    namespace.client.rollback(V1, 1)
    eventually(lambda: len(namespace.client.status().replicas) == 1, 30)
    return namespace


@pytest.fixture
def canaried(served: KubeNamespace) -> KubeNamespace:
    """Half of the traffic on a canary."""
    served.client.deploy(CANARY, V2, 1)
    served.client.wait_ready(CANARY, READY_S)
    served.client.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=60)
    return served


def _as(made: KubeNamespace, **changes: Any) -> KubernetesCluster:
    return KubernetesCluster.from_settings(made.cluster_settings(**changes))


def _edit(kube: Kube, manager: str, change: dict[str, Any]) -> None:
    """As another program does it."""
    other = Kube(kube._api, kube.namespace, timeout_s=10, manager=manager)
    other.merge(DEPLOYMENT, "ml-service", change)


def test_a_wrong_namespace_is_named(namespace):
    cluster = _as(namespace, namespace="khet-test-nowhere")
    with pytest.raises(ConfigError, match=r'"khet-test-nowhere" not found.*cluster\.kubernetes\.namespace'):
        cluster.deploy(STABLE, V1, 1)


@pytest.mark.parametrize(
    ("kubeconfig", "context"), [(None, "no-such-context"), ("/no/such/file", None)], ids=["context", "file"]
)
def test_a_kubeconfig_that_leads_nowhere_is_named(namespace, kubeconfig, context):
    changes = {"context": context} | ({"kubeconfig": kubeconfig} if kubeconfig else {})
    with pytest.raises(ConfigError, match="does not say how to reach a cluster"):
        _as(namespace, **changes)


READ = [
    {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get"]},
]


def test_a_missing_permission_names_verb_and_resource_and_reading_goes_on(served):
    cluster = _as(served, kubeconfig=served.limited(READ))
    assert cluster.status().versions == {STABLE: V1}
    with pytest.raises(ConfigError, match=r"permission to patch deployments\.apps is missing"):
        cluster.deploy(STABLE, V2, 1)
    with pytest.raises(ConfigError, match="permission to list pods is missing"):
        cluster.room()
    assert served.client.status().versions == {STABLE: V1}


def test_who_may_only_look_sees_a_lost_lease_and_does_not_fail(canaried):
    canaried.client.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=1)
    cluster = _as(canaried, kubeconfig=canaried.limited(READ))
    until = cluster.status().lease_expires_at
    assert until is not None
    assert cluster.status().weights == {STABLE: 0.5, CANARY: 0.5}
    eventually(lambda: canaried.client.status().weights == {STABLE: 1.0}, 10)
    assert cluster.status().weights == {STABLE: 1.0}


def test_an_image_that_is_not_there_ends_the_wait_at_once_and_serving_goes_on(served):
    cluster = _as(served, image="docker.io/library/khet-no-such-image:1")
    cluster.deploy(STABLE, V2, 1)
    with pytest.raises(ExternalError, match=r"gave up early.*ErrImageNeverPull") as caught:
        cluster.wait_ready(STABLE, READY_S)
    assert not caught.value.retryable
    assert [r.version for r in served.client.status().replicas if r.ready] == [V1]


def test_a_version_that_never_becomes_ready_is_waited_for_until_the_deadline(served):
    served.behave(v1_1_0={"never_ready": True})
    served.client.deploy(CANARY, V2, 1)
    with pytest.raises(ExternalError, match=r"not ready after 3 s: 0 of 1 replicas of v1\.1\.0") as caught:
        served.client.wait_ready(CANARY, 3)
    assert caught.value.retryable
    with pytest.raises(ExternalError, match="canary has no ready replica"):
        served.client.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=30)


def test_a_persons_edit_is_reported_and_kept(served):
    image = "docker.io/library/khet-edited:1"
    container = {"name": "ml-service", "image": image}
    live = served.admin.get(DEPLOYMENT, "ml-service")
    assert live is not None
    whole = live["spec"]["template"]["spec"]["containers"][0] | container
    _edit(served.admin, "kubectl-edit", {"spec": {"template": {"spec": {"containers": [whole]}}}})
    try:
        with pytest.raises(SafetyError, match=r"kubectl-edit set .*image"):
            served.client.deploy(STABLE, V2, 1)
        kept = served.admin.get(DEPLOYMENT, "ml-service")
        assert kept is not None
        assert kept["spec"]["template"]["spec"]["containers"][0]["image"] == image
    finally:
        served.client.kube.delete(DEPLOYMENT, "ml-service")  # the edit goes with it
        eventually(lambda: not served.client.status().replicas, 30)


def test_an_autoscaler_keeps_its_replicas(served):
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "ml-service"}
    served.admin.apply(AUTOSCALER, "hpa", {"spec": {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 3}})
    try:
        _edit(served.admin, "kube-controller-manager", {"spec": {"replicas": 2}})
        served.client.deploy(STABLE, V2, 1)
        served.client.wait_ready(STABLE, READY_S)
        assert len(served.client.status().replicas) == 2
        with pytest.raises(SafetyError, match="HorizontalPodAutoscaler hpa"):
            served.client.scale(STABLE, 3)
    finally:
        served.admin.delete(AUTOSCALER, "hpa")


def test_a_paused_rollout_is_not_waited_for(served):
    _edit(served.admin, "kubectl-rollout", {"spec": {"paused": True}})
    try:
        served.client.deploy(STABLE, V2, 1)
        with pytest.raises(ExternalError, match="rollout is paused"):
            served.client.wait_ready(STABLE, READY_S)
    finally:
        _edit(served.admin, "kubectl-rollout", {"spec": {"paused": None}})


def test_an_api_server_that_is_away_for_a_while_does_not_end_a_wait(served):
    served.behave(v1_1_0={"start_delay_s": 4})
    served.client.deploy(STABLE, V2, 1)
    ended: list[BaseException | None] = []
    waiting = threading.Thread(target=lambda: ended.append(_error(served.client, READY_S)))
    waiting.start()
    served.door.close()
    with pytest.raises(ExternalError, match="did not answer"):
        served.client.status()
    served.door.open()
    waiting.join(READY_S + 10)
    assert ended == [None]
    assert served.client.status().versions == {STABLE: V2}


def _error(cluster: KubernetesCluster, timeout_s: float) -> BaseException | None:
    try:
        cluster.wait_ready(STABLE, timeout_s)
    except ExternalError as error:
        return error
    return None


def test_a_replaced_canary_pod_has_no_traffic_until_the_next_heartbeat(canaried):
    [pod] = [r for r in canaried.client.status().replicas if r.track is CANARY]
    canaried.admin.delete(POD, pod.name)
    eventually(lambda: _ready_canary(canaried) not in (None, pod.name), 60)
    assert CANARY not in canaried.client.status().shares
    canaried.client.renew_lease(60)
    assert canaried.client.status().shares == {STABLE: 0.5, CANARY: 0.5}


def _ready_canary(namespace: KubeNamespace) -> str | None:
    return next((r.name for r in namespace.client.status().replicas if r.track is CANARY and r.ready), None)


def test_a_lease_that_another_process_took_over_is_not_renewed(canaried):
    lease = canaried.admin.get(LEASE, "ml-service-rollout")
    assert lease is not None
    canaried.admin.merge(LEASE, "ml-service-rollout", {"spec": {"holderIdentity": "elsewhere_1"}})
    with pytest.raises(SafetyError, match="elsewhere_1 holds the lease"):
        canaried.client.renew_lease(60)


def test_the_watchdog_ends_what_a_dead_process_left(canaried):
    canaried.client.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=1)
    watchdog = _as(canaried)
    eventually(watchdog.enforce, 10)
    assert watchdog.status().shares == {STABLE: 1.0}
    assert not watchdog.enforce()
    reasons = {event["reason"] for event in canaried.admin.find(EVENT) if event["source"].get("component")}
    assert {"Deployed", "TrafficMoved", "LeaseExpired"} <= reasons


def test_what_was_served_is_in_the_history_that_kubectl_shows(served):
    served.client.deploy(STABLE, V2, 1)
    served.client.wait_ready(STABLE, READY_S)
    sets = served.admin.find(Kind("apps/v1", "ReplicaSet", "replicasets"), "khet.guard/track=stable")
    causes = {found["metadata"]["annotations"].get("kubernetes.io/change-cause") for found in sets}
    assert {"serve v1.0.0", "serve v1.1.0"} <= causes


def _serve_routes(admin: Kube) -> bool:
    """Make the API serve HTTPRoutes; whether it did not before."""
    if admin.serves(ROUTE):
        return False
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
    names = {"kind": "HTTPRoute", "plural": "httproutes", "singular": "httproute", "listKind": "HTTPRouteList"}
    spec = {"group": "gateway.networking.k8s.io", "scope": "Namespaced", "names": names, "versions": [version]}
    approved = {"annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api"}}
    admin.apply(DEFINITION, "httproutes.gateway.networking.k8s.io", {"metadata": approved, "spec": spec})
    eventually(lambda: admin.serves(ROUTE), 30)
    return True


def test_behind_a_gateway_the_route_has_the_weights_and_pods_keep_their_labels(served):
    made = _serve_routes(served.admin)
    cluster = _as(served, gateway="public")
    try:
        cluster.deploy(CANARY, V2, 1)
        cluster.wait_ready(CANARY, READY_S)
        cluster.set_weights({STABLE: 0.95, CANARY: 0.05}, lease_s=60)
        assert cluster.status().shares == {STABLE: 0.95, CANARY: 0.05}
        route = served.admin.get(ROUTE, "ml-service")
        assert route is not None
        weights = {b["name"]: b["weight"] for b in route["spec"]["rules"][-1]["backendRefs"]}
        assert weights == {"ml-service-stable": 950_000, "ml-service-canary": 50_000}
        on = served.admin.find(POD, "khet.guard/traffic=on")
        assert {pod["metadata"]["labels"]["khet.guard/track"] for pod in on} == {"stable"}
    finally:
        cluster.set_weights({STABLE: 1.0})
        if made:
            served.admin.delete(DEFINITION, "httproutes.gateway.networking.k8s.io")
