"""What an update makes of a Deployment, and how one that is stuck is told."""

from __future__ import annotations

from typing import Any

import pytest

from configs.areas import ClusterSettings, KubernetesSettings
from configs.errors import ConfigError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import objects
from tasks.cluster.kubernetes.procedures import comparable, is_stuck, updated
from tasks.cluster.kubernetes.readiness import readiness
from tasks.cluster.procedures import Update, diff

V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
CLUSTER = ClusterSettings(backend="kubernetes", kubernetes=KubernetesSettings(image="serving:v1"))


def manifest(update: Update, image: str | None = None) -> dict[str, Any]:
    return updated(objects.deployment(CLUSTER, Track.stable, update.version), update, image)


def test_an_update_sets_bounds_deadline_version_and_image() -> None:
    found = manifest(Update(V2, 4, 90.2, image="serving:v2", surge=2, unavailable=1))
    spec = found["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 2, "maxUnavailable": 1}
    assert spec["progressDeadlineSeconds"] == 91
    assert spec["template"]["spec"]["containers"][0]["image"] == "serving:v2"
    assert spec["template"]["metadata"]["labels"][objects.VERSION] == "v1.1.0"
    assert found["metadata"]["annotations"]["kubernetes.io/change-cause"] == "serve v1.1.0 in serving:v2"


def test_without_an_image_the_one_that_runs_stays() -> None:
    assert manifest(Update(V2, 1, 90), "serving:hotfix")["spec"]["template"]["spec"]["containers"][0]["image"] == (
        "serving:hotfix"
    )


@pytest.mark.parametrize(("surge", "unavailable"), [(0, 0), (-1, 1), (2, -1)])
def test_bounds_that_allow_nothing_are_refused(surge: int, unavailable: int) -> None:
    with pytest.raises(ConfigError, match="Nothing was changed"):
        Update(V2, 1, 90, surge=surge, unavailable=unavailable)


def test_the_difference_names_what_changes_and_nothing_that_the_server_writes() -> None:
    live = manifest(Update(V1, 2, 90))
    live["metadata"] |= {"resourceVersion": "1", "managedFields": [], "uid": "u", "generation": 3}
    live["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "3"
    live["status"] = {"replicas": 2}
    planned = manifest(Update(V2, 2, 90))
    assert diff(comparable(live), comparable(manifest(Update(V1, 2, 90)))) == ""
    changed = [line for line in diff(comparable(live), comparable(planned)).splitlines() if line[0] in "+-"]
    assert changed[:2] == ["--- live/cluster", "+++ planned/cluster"]
    assert {line.lstrip("+- ").split(":")[0] for line in changed[2:]} == {
        "kubernetes.io/change-cause", "app.kubernetes.io/version", "value",
    }  # fmt: skip
    assert diff(comparable({}), comparable(planned)).startswith("--- live/cluster")


def test_a_deployment_is_stuck_when_its_own_deadline_passed_for_the_latest_change() -> None:
    condition = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    found = {"metadata": {"generation": 2}, "status": {"observedGeneration": 2, "conditions": [condition]}}
    assert is_stuck(found)
    assert not is_stuck({**found, "metadata": {"generation": 3}})
    assert not is_stuck({"metadata": {"generation": 2}, "status": {"observedGeneration": 2}})


def test_a_pod_of_an_image_that_was_given_up_says_nothing_about_the_one_that_is_wanted() -> None:
    waits = {"name": objects.CONTAINER, "state": {"waiting": {"reason": "ErrImageNeverPull", "message": "no"}}}
    found = manifest(Update(V1, 1, 60), "serving:v1") | {"status": {}}
    found["metadata"] |= {"generation": 1}
    pod: dict[str, Any] = {
        "metadata": {"name": "p", "labels": found["metadata"]["labels"]},
        "spec": {"containers": [{"name": objects.CONTAINER, "image": "serving:absent"}]},
        "status": {"conditions": [], "containerStatuses": [waits]},
    }
    assert not readiness(found, [pod]).hopeless
    pod["spec"]["containers"][0]["image"] = "serving:v1"
    assert readiness(found, [pod]).hopeless


def test_the_users_meet_the_pods_whose_traffic_is_on_or_all_of_the_guest_that_answers_everybody() -> None:
    settings = CLUSTER.kubernetes
    on = {objects.NAME: "ml-service", objects.TRAFFIC: "on"}
    assert objects.users(settings, {Track.stable: 1.0}) == on
    assert objects.users(settings, {Track.stable: 0.5, Track.canary: 0.5}) == on
    assert objects.users(settings, {}) == on
    assert objects.users(settings, {Track.canary: 1.0}) == {objects.NAME: "ml-service", objects.TRACK: "canary"}


def test_behind_a_gateway_a_request_that_names_its_track_gets_it_while_users_are_compared() -> None:
    settings = CLUSTER.kubernetes.model_copy(update={"gateway": "edge/public"})
    weights = {Track.stable: 0.7, Track.canary: 0.3}
    [split] = objects.route(settings, weights)["spec"]["rules"]
    assert [backend["weight"] for backend in split["backendRefs"]] == [300_000, 700_000]
    *named, last = objects.route(settings, weights, sticky=True)["spec"]["rules"]
    assert last == split
    assert {r["matches"][0]["headers"][0]["value"]: r["backendRefs"][0]["name"] for r in named} == {
        "canary": "ml-service-canary",
        "stable": "ml-service-stable",
    }
