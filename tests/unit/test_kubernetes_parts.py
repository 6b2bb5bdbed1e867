"""Manifests, state, readiness, capacity and refusals: everything that needs no API server."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from configs.areas import ClusterSettings
from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import capacity, objects, state
from tasks.cluster.kubernetes.client import DeniedError, NotFoundError, StaleError, refusal
from tasks.cluster.kubernetes.readiness import readiness

STABLE, CANARY, BASELINE, PREVIOUS = Track
SETTINGS = ClusterSettings(backend="kubernetes")
NOW = datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)


def deployment(track: Track = STABLE, version: str = "v1.0.0", **changes: Any) -> dict[str, Any]:
    """A Deployment as the API server returns it, settled."""
    made = objects.deployment(SETTINGS, track, Version.parse(version))
    made["metadata"] |= {"name": objects.name_of(SETTINGS.kubernetes, track), "generation": 2}
    made["metadata"]["annotations"] |= changes.get("annotations", {})
    made["spec"] |= {"replicas": 1} | changes.get("spec", {})
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
    made["status"] = {"observedGeneration": 2, **counts} | changes.get("status", {})
    return made


def pod(version: str = "v1.0.0", *, ready: bool = True, **status: Any) -> dict[str, Any]:
    labels = {objects.TRACK: "stable", objects.VERSION: version}
    conditions = [{"type": "Ready", "status": str(ready)}, *status.pop("conditions", ())]
    containers = [{"name": objects.CONTAINER, "restartCount": 0, **status.pop("container", {})}]
    return {
        "metadata": {"name": "ml-service-x", "labels": labels},
        "status": {"conditions": conditions, "containerStatuses": containers, **status},
    }


# Manifests


def test_nobody_is_told_how_many_replicas_there_are():
    assert "replicas" not in objects.deployment(SETTINGS, STABLE, Version(1, 0, 0))["spec"]


def test_new_pods_of_a_guest_have_no_traffic_and_those_of_stable_have():
    born = {
        track: objects.deployment(SETTINGS, track, Version(1, 0, 0))["spec"]["template"]["metadata"]["labels"]
        for track in Track
    }
    assert {track: labels[objects.TRAFFIC] for track, labels in born.items()} == {
        STABLE: "on",
        CANARY: "off",
        BASELINE: "off",
        PREVIOUS: "off",
    }
    users = objects.service(SETTINGS.kubernetes)["spec"]["selector"]
    assert users.items() <= born[STABLE].items()
    for track in Track:
        assert objects.service(SETTINGS.kubernetes, track)["spec"]["selector"].items() <= born[track].items()


def test_a_guest_differs_from_stable_in_its_labels_alone():
    stable, canary = (objects.deployment(SETTINGS, track, Version(1, 1, 0))["spec"] for track in (STABLE, CANARY))
    apart = (stable["template"]["spec"].pop("topologySpreadConstraints"), canary["template"]["spec"])
    apart[1].pop("topologySpreadConstraints")
    assert stable["template"]["spec"] == canary["template"]["spec"]


def test_a_route_has_whole_numbers_as_weights():
    settings = SETTINGS.kubernetes.model_copy(update={"gateway": "infra/public"})
    spec = objects.route(settings, {STABLE: 2 / 3, CANARY: 1 / 3})["spec"]
    assert spec["parentRefs"] == [{"namespace": "infra", "name": "public"}]
    assert {b["name"]: b["weight"] for b in spec["rules"][0]["backendRefs"]} == {
        "ml-service-stable": 666_667,
        "ml-service-canary": 333_333,
    }


# State


def _lease(until: datetime) -> dict[str, Any]:
    return objects.lease(SETTINGS.kubernetes, state.held(until, NOW))


def test_what_is_written_is_what_is_read():
    until = NOW + timedelta(seconds=30)
    both = [deployment(), deployment(CANARY, "v1.1.0")]
    asked = state.read(both, None).desired.model_copy(
        update={"weights": {STABLE: 0.75, CANARY: 0.25}, "mirror": {CANARY: 1.0}}
    )
    both[0]["metadata"]["annotations"] |= {k: v for k, v in state.written(asked).items() if v is not None}
    seen = state.read(both, _lease(until))
    assert (seen.desired.weights, seen.desired.mirror) == (asked.weights, asked.mirror)
    assert (seen.desired.lease_expires_at, seen.holder) == (until, state.identity())
    assert state.versions(seen.desired) == {STABLE: Version(1, 0, 0), CANARY: Version(1, 1, 0)}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (None, {STABLE: 1.0}),
        ("no JSON", {STABLE: 1.0}),
        ('["stable"]', {STABLE: 1.0}),
        ('{"stable": 0.9, "canary": 0.1}', {STABLE: 1.0}),
        ("{}", {}),
    ],
)
def test_weights_that_mean_nothing_are_stables(text, weights):
    found = state.read([deployment(annotations={objects.WEIGHTS: text} if text else {})], None).desired
    assert found.weights == pytest.approx(weights)


def test_a_lease_says_when_it_was_lost_and_forgets_it_when_it_was_given_up():
    lease = _lease(NOW + timedelta(seconds=30))
    lost = {**lease, "spec": state.released(lease, lost=True)}
    given_up = {**lease, "spec": state.released(lease, lost=False)}
    assert state.read([], lost).desired.lease_lost_at == NOW + timedelta(seconds=30)
    assert state.read([], given_up).desired.lease_lost_at is None
    assert (state.read([], lost).holder, state.read([], given_up).holder) == (None, None)


def test_leases_are_whole_seconds_rounded_up():
    assert state.lease_end(NOW, 0.5) == NOW + timedelta(seconds=1)
    assert state.held(NOW + timedelta(seconds=1), NOW)["leaseDurationSeconds"] == 1


# Readiness


def test_a_settled_deployment_is_ready():
    assert readiness(deployment(), [pod()]).ready


@pytest.mark.parametrize(
    ("found", "pods"),
    [
        (deployment(status={"observedGeneration": 1}), [pod()]),
        (deployment(status={"updatedReplicas": 0}), [pod()]),
        (deployment(), [pod(), pod("v0.9.0")]),
        (deployment(), [pod("v0.9.0")]),
        (deployment(), []),
        (deployment(spec={"replicas": 2}), [pod()]),
    ],
    ids=["not seen yet", "not updated", "an old pod is left", "of another version", "no pod", "too few"],
)
def test_a_rollout_that_goes_on_is_not_ready_and_not_hopeless(found, pods):
    now = readiness(found, pods)
    assert (now.ready, now.hopeless) == (False, False)


def _waits(reason: str, message: str = "") -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def _died(code: int, restarts: int) -> dict[str, Any]:
    ended = {"terminated": {"exitCode": code, "reason": "Error"}}
    return {**_waits("CrashLoopBackOff"), "lastState": ended, "restartCount": restarts}


@pytest.mark.parametrize(
    ("container", "hopeless", "words"),
    [
        (_waits("ContainerCreating"), False, "0 of 1 replicas"),
        (_waits("ErrImageNeverPull"), True, "ErrImageNeverPull"),
        (_waits("ErrImagePull", "rpc error: not found"), True, "not found"),
        (_waits("ErrImagePull", "i/o timeout"), False, "i/o timeout"),
        (_waits("CreateContainerConfigError", 'secret "s" not found'), False, 'secret "s"'),
        (_died(4, 2), True, "exited with code 4 (2 times)"),
        (_died(4, 1), False, "exited with code 4 (1 times)"),
        (_died(ExternalError.exit_code, 3), False, "exited with code 5"),
        (_died(137, 5), False, "was ended"),
    ],
)
def test_why_a_pod_is_not_ready_and_whether_waiting_helps(container, hopeless, words):
    now = readiness(deployment(status={"readyReplicas": 0}), [pod(ready=False, container=container)])
    assert (now.ready, now.hopeless) == (False, hopeless)
    assert words in now.reason


def test_a_pod_without_a_node_says_why():
    nowhere = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: insufficient cpu"}
    now = readiness(deployment(status={"readyReplicas": 0}), [pod(ready=False, conditions=[nowhere])])
    assert "insufficient cpu" in now.reason
    assert not now.hopeless


def test_a_paused_rollout_and_refused_pods_say_so():
    assert readiness(deployment(spec={"paused": True}, status={"updatedReplicas": 0}), []).hopeless
    refused = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
    assert "exceeded quota" in readiness(deployment(status={"conditions": [refused]}), []).reason


# Capacity


def _node(**changes: Any) -> dict[str, Any]:
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    offered = {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"}}
    return {"metadata": {"name": "n"}, "spec": changes, "status": ready | offered}


def _used(uid: str, cpu: str) -> dict[str, Any]:
    container = {"resources": {"requests": {"cpu": cpu}}}
    return {"metadata": {"uid": uid}, "spec": {"nodeName": "n", "containers": [container]}, "status": {}}


def test_room_is_what_the_scarcest_resource_leaves():
    requests = {"cpu": "500m", "memory": "3Gi"}
    assert capacity.slots([_node()], [], requests, ()) == 2
    assert capacity.slots([_node()], [_used("a", "3100m")], {"cpu": "500m"}, ()) == 1
    assert capacity.slots([_node()], [_used("a", "3100m")], {"cpu": "500m"}, ("a",)) == 8
    assert capacity.slots([_node()], [_used("a", "5")], {"cpu": "500m"}, ()) == 0


@pytest.mark.parametrize("barred", [{"unschedulable": True}, {"taints": [{"effect": "NoSchedule"}]}], ids=str)
def test_a_node_that_takes_no_pods_has_no_room(barred):
    assert capacity.slots([_node(**barred)], [], {"cpu": "1"}, ()) == 0


# Refusals


def _answer(status: int, **body: Any) -> KhetError:
    return refusal(status, json.dumps(body).encode(), "PATCH /x", "khet-pipelines")


def test_a_missing_permission_names_verb_and_resource():
    message = (
        'deployments.apps "ml-service" is forbidden: User "system:serviceaccount:a:b" cannot patch resource '
        '"deployments" in API group "apps" in the namespace "khet-guard"'
    )
    error = _answer(403, message=message)
    assert isinstance(error, DeniedError)
    assert str(error).startswith("the permission to patch deployments.apps is missing")


def test_a_conflict_of_owners_names_the_other_and_the_field():
    field = '.spec.template.spec.containers[name="ml-service"].image'
    cause = {"reason": "FieldManagerConflict", "message": 'conflict with "kubectl-edit" using apps/v1', "field": field}
    error = _answer(409, message="Apply failed", details={"causes": [cause]})
    assert type(error) is SafetyError
    assert f"kubectl-edit set {field}" in str(error)


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (401, ConfigError, None),
        (404, NotFoundError, None),
        (409, StaleError, None),
        (422, ConfigError, None),
        (429, ExternalError, True),
        (500, ExternalError, True),
        (503, ExternalError, True),
    ],
)
def test_every_refusal_is_one_of_ours(status, kind, retryable):
    error = _answer(status, message="words of the server")
    assert type(error) is kind
    assert getattr(error, "retryable", None) is retryable
    assert isinstance(refusal(status, b"<html>", "GET /x", "m"), KhetError)
