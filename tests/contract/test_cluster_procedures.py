"""The deployment procedures on a real Kubernetes, as kubectl would find what they did, under users' requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from configs.errors import ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import objects
from tasks.cluster.kubernetes.client import DEPLOYMENT, POD, SERVICE, Kube
from tasks.cluster.procedures import Procedures, Update, procedures
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.node import Traffic, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
V1, V2, SLOW = Version(1, 0, 0), Version(1, 1, 0), Version(1, 2, 0)
STABLE, CANARY = Track.stable, Track.canary


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeNamespace]:
    with running_namespace(tmp_path_factory.mktemp("kube")) as namespace:
        namespace.behave(v1_1_0={"answer": "rust"}, v1_2_0={"never_ready": True})
        yield namespace


@pytest.fixture
def served(shared: KubeNamespace) -> KubeNamespace:
    """v1.0.0 on two pods, nothing else."""
    shared.client.set_weights({STABLE: 1.0}) if STABLE in shared.client.status().versions else None
    procedures(shared.client).stick(on=False)
    shared.client.rollback(V1, 2)
    eventually(shared.answers, 60, "an answer of the Service")
    return shared


@pytest.fixture
def change(served: KubeNamespace) -> Procedures:
    return procedures(served.client)


def deployment(namespace: KubeNamespace, name: str = "ml-service") -> dict[str, Any]:
    found = namespace.admin.get(DEPLOYMENT, name)
    assert found is not None
    return found


def selector(namespace: KubeNamespace) -> dict[str, str]:
    found = namespace.admin.get(SERVICE, "ml-service")
    assert found is not None
    return dict(found["spec"]["selector"])


def test_a_rolling_update_keeps_its_bounds_and_loses_no_request(served: KubeNamespace, change: Procedures) -> None:
    update = Update(V2, 2, 60, surge=2, unavailable=1)
    planned = change.update(update, dry_run=True)
    assert "+    app.kubernetes.io/version: v1.1.0" in planned
    assert served.client.status().versions == {STABLE: V1}
    with Traffic(served.users_url()) as users:
        users.wait_for(50)
        assert change.update(update) == planned
        change.wait_updated(update)
        users.wait_for(50)
    assert users.failures == {}
    spec = deployment(served)["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 2, "maxUnavailable": 1}
    assert spec["progressDeadlineSeconds"] == 60
    assert served.client.status().versions == {STABLE: V2}
    assert change.update(update) == ""


def test_an_image_that_cannot_be_pulled_ends_the_update_and_the_old_pods_serve(
    served: KubeNamespace, change: Procedures
) -> None:
    image = change.image()
    update = Update(V1, 2, 60, image="docker.io/library/khet-stub:absent")
    with Traffic(served.users_url()) as users:
        change.update(update)
        with pytest.raises(ExternalError, match="ErrImageNeverPull") as caught:
            change.wait_updated(update)
        undone = Update(V1, 2, 60, image=image)
        change.update(undone)
        change.wait_updated(undone)
        users.wait_for(50)
    assert not caught.value.retryable
    assert users.failures == {}
    assert change.image() == image


def test_readiness_that_never_comes_ends_with_the_progress_deadline(served: KubeNamespace, change: Procedures) -> None:
    update = Update(SLOW, 2, 3)
    change.update(update)
    began = time.monotonic()
    with pytest.raises(ExternalError, match="no progress for 3 s"):
        change.wait_updated(update)
    assert time.monotonic() - began < 20
    assert {r.version for r in served.client.status().replicas if r.ready} == {V1}


def test_a_persons_edit_is_reported_and_never_overwritten(served: KubeNamespace, change: Procedures) -> None:
    settings = served.cluster_settings().kubernetes
    person = Kube.connect(settings.model_copy(update={"field_manager": "kubectl-set"}), 10)
    image = {"name": objects.CONTAINER, "image": "docker.io/library/khet-stub:hotfix", "imagePullPolicy": "Never"}
    wanted = {"spec": {"template": {"spec": {"containers": [image]}}}}
    path = f"/apis/apps/v1/namespaces/{served.name}/deployments/ml-service"
    person._send(
        "PATCH", path, wanted, query={"fieldManager": "kubectl-set"}, content="application/strategic-merge-patch+json"
    )
    with pytest.raises(SafetyError, match=r"kubectl-set set .*image.*nothing was overwritten"):
        change.update(Update(V2, 2, 60, image="docker.io/library/khet-stub:1"), dry_run=True)
    served.admin.delete(DEPLOYMENT, "ml-service")
    eventually(lambda: served.admin.get(DEPLOYMENT, "ml-service") is None, 30)


def test_the_switch_is_one_change_of_the_service_within_two_seconds_and_back(
    served: KubeNamespace, change: Procedures
) -> None:
    change.deploy(CANARY, V2, 2)
    served.client.wait_ready(CANARY, 60)
    planned = change.switch(CANARY, 30, dry_run=True)
    assert planned.splitlines()[-2:] == ["-  stable: 1.0", "+  canary: 1.0"]
    with Traffic(served.users_url(), keep_alive=False) as users:
        users.wait_for(50)
        began = time.monotonic()
        change.switch(CANARY, 30)
        assert time.monotonic() - began < 2
        assert selector(served) == {objects.NAME: "ml-service", objects.TRACK: "canary"}
        eventually(lambda: users.versions["v1.1.0"] >= 20, 10)
        users.wait_for(50)
        assert users.switch_s("v1.0.0", "v1.1.0", began) < 2
        began = time.monotonic()
        change.switch(STABLE, None)
        assert time.monotonic() - began < 2
        users.wait_for(50)
    assert selector(served) == {objects.NAME: "ml-service", objects.TRAFFIC: "on"}
    assert users.failures == {}
    assert served.client.status().shares == {STABLE: 1.0}


def test_the_guard_returns_everybody_when_the_one_who_switched_died(served: KubeNamespace, change: Procedures) -> None:
    change.deploy(CANARY, V2, 1)
    served.client.wait_ready(CANARY, 60)
    with Traffic(served.users_url()) as users:
        change.switch(CANARY, 1)
        eventually(lambda: change.guard(dry_run=True) != "", 5)
        assert selector(served)[objects.TRACK] == "canary"
        assert "all traffic to stable" in change.guard()
        users.wait_for(50)
    assert selector(served) == {objects.NAME: "ml-service", objects.TRAFFIC: "on"}
    assert served.client.status().weights == {STABLE: 1.0}
    assert users.failures == {}
    assert change.guard() == ""


def test_blue_is_replaced_while_green_answers_everybody(served: KubeNamespace, change: Procedures) -> None:
    change.deploy(CANARY, V2, 2)
    served.client.wait_ready(CANARY, 60)
    with Traffic(served.users_url()) as users:
        change.switch(CANARY, None)
        served.client.deploy(STABLE, V2, 2)
        served.client.wait_ready(STABLE, 60)
        change.switch(STABLE, None)
        served.client.remove(CANARY)
        users.wait_for(50)
    assert users.failures == {}
    assert served.client.status().versions == {STABLE: V2}


def test_users_stay_on_one_pod_while_they_are_compared(served: KubeNamespace, change: Procedures) -> None:
    assert change.stick(on=False) == ""
    assert "keeps each client address on one pod" in change.stick(on=True)
    found = served.admin.get(SERVICE, "ml-service")
    assert found is not None
    assert found["spec"]["sessionAffinity"] == "ClientIP"
    with Traffic(served.users_url()) as users:
        users.wait_for(50)
    assert users.failures == {}
    change.stick(on=False)
    found = served.admin.get(SERVICE, "ml-service")
    assert found is not None
    assert found["spec"]["sessionAffinity"] == "None"


def test_a_restart_replaces_every_pod(served: KubeNamespace, change: Procedures) -> None:
    before = {pod["metadata"]["name"] for pod in served.admin.find(POD, "khet.guard/track=stable")}
    change.restart(STABLE)
    served.client.wait_ready(STABLE, 60)
    after = {replica.name for replica in served.client.status().replicas}
    assert before.isdisjoint(after)
    assert len(after) == 2
