"""The deployment procedures with a real Prefect server, object store and node, under users' requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.errors import ConfigError, ExternalError, GateError, SafetyError
from flows import recovery, scaling
from flows.rolling_update import rolling_update
from flows.scaling import restart, scale
from flows.session import LEASE
from flows.watchdog import rollout_watchdog
from ml.objects import ObjectStore
from tasks.cluster import Track
from tasks.lease import Lease
from tasks.rollout.journal import Journal
from tests.support.node import NodeProcess, Traffic, eventually, running_node
from tests.support.service import BROKEN, NEW, OLD, UNTRIED, Service, served
from tests.support.stack import object_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield ObjectStore(found)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(tmp_path_factory.mktemp("node")) as running:
        running.behave(v1_3_0={"exit_code": 3})
        yield running


@pytest.fixture
def service(
    prefect: str, store: ObjectStore, node: NodeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Service:
    return served(store, node, tmp_path, prefect, monkeypatch)


# Rolling update -------------------------------------------------------------------------------------------------------


def test_a_rolling_update_loses_no_request_and_moves_the_alias(service: Service) -> None:
    with Traffic(service.node.gateway_url) as users:
        users.wait_for(20)
        record = rolling_update(version=str(NEW))
        users.wait_for(20)
    assert users.failures == {}
    assert record.outcome == "promoted"
    assert (record.kind, record.reasons) == ("rolling_update", ("v1.1.0 took over from v1.0.0, replica by replica",))
    assert (service.production(), service.serving()) == (NEW, ({NEW}, 2))
    assert service.audited() == [("rolling_update", "intended"), ("rolling_update", "done")]
    [stored] = service.records()
    assert (stored.intent, [stage.name for stage in stored.stages]) == (
        None,
        ["verify files", "replace replicas", "verify serving"],
    )
    rows = artifact(service.api, f"stages-{record.release_id}")
    assert [row["result"] for row in rows] == ["done", "done", "done"]


def test_a_dry_run_shows_the_difference_and_changes_nothing(service: Service) -> None:
    record = rolling_update(version=str(NEW), dry_run=True)
    assert record.outcome == "dry_run"
    assert "-    version: v1.0.0\n+    version: v1.1.0" in record.diff
    assert (service.production(), service.serving(), service.records()) == (OLD, ({OLD}, 2), [])
    assert service.audited() == []


def test_what_serves_already_is_not_updated(service: Service) -> None:
    record = rolling_update(version=str(OLD))
    assert (record.outcome, record.reasons) == ("done", ("nothing to do: the cluster is as asked for",))
    assert service.records() == []


def test_an_update_that_never_becomes_ready_is_undone_while_the_old_replicas_serve(service: Service) -> None:
    with Traffic(service.node.gateway_url) as users:
        with pytest.raises(ExternalError, match=r"the update to v1\.3\.0 was undone: gave up early") as caught:
            rolling_update(version=str(BROKEN), deadline_s=20)
        users.wait_for(20)
    assert "v1.0.0 serves all traffic, as before." in str(caught.value)
    assert users.failures == {}
    assert set(users.versions) == {"v1.0.0"}
    assert (service.production(), service.serving()) == (OLD, ({OLD}, 2))
    [record] = service.records()
    assert (record.outcome, record.intent) == ("rolled_back", None)
    assert service.audited()[-1] == ("rolling_update", "undone")


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"version": str(UNTRIED)}, GateError, "gives all users to it without a judge"),
        ({}, ConfigError, "name a version, an image, or both"),
        ({"image": "serving:v2"}, ConfigError, "no image, so serving:v2 cannot be rolled out"),
        ({"version": str(NEW), "surge": 2}, ConfigError, "need Kubernetes"),
        ({"version": str(NEW), "surge": 0}, ConfigError, "neither may be negative, and one of them has"),
    ],
    ids=["never judged", "nothing", "image", "surge", "no bounds"],
)
def test_an_update_that_should_not_be_changes_nothing(
    service: Service, asked: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        rolling_update(**asked)
    assert (service.serving(), service.records()) == (({OLD}, 2), [])


def test_a_version_without_a_judge_is_rolled_out_where_somebody_insists(service: Service) -> None:
    assert rolling_update(version=str(UNTRIED), unjudged=True).outcome == "promoted"
    assert service.production() == UNTRIED


def test_an_update_beside_a_rollout_is_refused(service: Service) -> None:
    with (
        Lease.acquire(service.systems.store, service.systems.bucket, LEASE, "another", 30),
        pytest.raises(SafetyError, match="is held by"),
    ):
        rolling_update(version=str(NEW))
    assert service.serving() == ({OLD}, 2)


# Scale and restart ----------------------------------------------------------------------------------------------------


def test_scaling_runs_beside_a_rollout_and_loses_no_request(service: Service) -> None:
    with (
        Lease.acquire(service.systems.store, service.systems.bucket, LEASE, "a-release", 30),
        Traffic(service.node.gateway_url) as users,
    ):
        assert "-    replicas: 2\n+    replicas: 3" in scale(replicas=3, dry_run=True).diff
        assert scale(replicas=3).outcome == "done"
        assert service.serving() == ({OLD}, 3)
        record = scale(replicas=1)
        users.wait_for(10)
    assert record.reasons == ("1 replica(s) of v1.0.0 on stable, 3 before",)
    assert service.serving() == ({OLD}, 1)
    assert users.failures == {}
    assert scale(replicas=1).reasons == ("nothing to do: the cluster is as asked for",)


def test_a_restart_replaces_every_replica_and_loses_no_request(service: Service) -> None:
    before = service.node.pids()
    with Traffic(service.node.gateway_url) as users:
        assert before[0] in service.node.pids() and restart(dry_run=True).outcome == "dry_run"
        assert service.node.pids() == before
        record = restart()
        users.wait_for(10)
    assert record.reasons == ("2 replica(s) of v1.0.0 on stable were replaced by new ones",)
    assert set(before).isdisjoint(service.node.pids())
    assert service.serving() == ({OLD}, 2)
    assert users.failures == {}


def test_a_track_that_is_not_there_is_not_scaled(service: Service) -> None:
    with pytest.raises(ExternalError, match="canary is not deployed"):
        scale(replicas=2, track=Track.canary)


def test_replicas_that_are_not_ready_in_time_leave_nothing_to_finish(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        raise ExternalError("not ready after 90 s")

    monkeypatch.setattr(scaling.wait_ready, "fn", late)
    with pytest.raises(ExternalError):
        scale(replicas=3)
    [record] = service.records()
    assert (record.outcome, record.intent) == ("failed", None)


# The watchdog ---------------------------------------------------------------------------------------------------------


def test_while_all_is_well_the_watchdog_does_nothing(service: Service) -> None:
    watch = rollout_watchdog()
    assert (watch.done, watch.failed, service.audited()) == ((), (), [])


def test_the_watchdog_takes_the_canary_of_a_killed_release_away(service: Service) -> None:
    cluster = service.node.client
    cluster.deploy(Track.canary, NEW, 1)
    cluster.wait_ready(Track.canary, 20)
    cluster.set_weights({Track.stable: 0.5, Track.canary: 0.5}, lease_s=60)
    record = service.left("release", action="canary", version=str(NEW), previous=str(OLD))
    assert rollout_watchdog(dry_run=True).done == (f"release {record.release_id}: in the middle of canary v1.1.0",)
    assert cluster.status().weights[Track.canary] == 0.5
    rollout_watchdog()
    assert cluster.status().weights == {Track.stable: 1.0}
    assert set(cluster.status().versions) == {Track.stable}
    assert service.read(record).outcome == "failed"
    assert ("watchdog", "done") in service.audited()
    assert rollout_watchdog().done == ()


def test_the_watchdog_undoes_a_killed_update_and_finishes_a_killed_promotion(service: Service) -> None:
    cluster = service.node.client
    cluster.deploy(Track.stable, NEW, 2)
    record = service.left("rolling_update", action="update", version=str(NEW), previous=str(OLD), replicas=2)
    assert rollout_watchdog().done == (
        f"rolling_update {record.release_id}: its update to v1.1.0 was undone; production serves v1.0.0",
    )
    assert (service.production(), service.serving()) == (OLD, ({OLD}, 2))
    service.left("blue_green", action="promote", version=str(NEW), previous=str(OLD))
    rollout_watchdog()
    assert service.production() == NEW
    assert service.serving()[0] == {NEW}


def test_the_watchdog_finishes_a_killed_scaling(service: Service) -> None:
    record = service.left(
        "scale", action="scale", version=str(OLD), previous=str(OLD), track="stable", replicas=3, before=2
    )
    rollout_watchdog()
    eventually(lambda: service.serving() == ({OLD}, 3))
    assert service.read(record).reasons == ("interrupted, and stable was scaled to 3 replica(s)",)


@pytest.mark.parametrize("kind", ["scale", "rolling_update"])
def test_a_run_that_ended_just_before_it_would_be_recovered_is_left_as_it_is(service: Service, kind: str) -> None:
    stale = service.left(kind, action="scale", version=str(OLD), previous=str(OLD), track="stable", replicas=3)
    Journal(service.systems.store, service.systems.bucket, service.read(stale)).close("done", ("by itself",))
    assert recovery.recover_under_lease(service.systems, stale, 30) == "it had ended meanwhile"
    assert (service.serving(), service.read(stale).reasons) == (({OLD}, 2), ("by itself",))


def test_the_watchdog_leaves_a_run_alone_that_is_alive(service: Service) -> None:
    cluster = service.node.client
    cluster.deploy(Track.canary, NEW, 1)
    cluster.wait_ready(Track.canary, 20)
    record = service.left("release", action="canary", version=str(NEW), previous=str(OLD))
    alive = Journal(service.systems.store, service.systems.bucket, service.read(record))
    alive.change(process=recovery.this_process())
    with Lease.acquire(service.systems.store, service.systems.bucket, LEASE, record.release_id, 30):
        assert rollout_watchdog().done == ()
    assert Track.canary in cluster.status().versions


def test_the_watchdog_removes_replicas_that_belong_to_no_run(service: Service) -> None:
    cluster = service.node.client
    cluster.deploy(Track.canary, NEW, 1)
    cluster.wait_ready(Track.canary, 20)
    with Lease.acquire(service.systems.store, service.systems.bucket, LEASE, "another", 30):
        assert rollout_watchdog().done == ()
    assert rollout_watchdog().done == ("canary belongs to no rollout and gets no traffic: removed",)
    assert set(cluster.status().versions) == {Track.stable}


def artifact(api: str, key: str) -> list[dict[str, Any]]:
    """The newest table under a key."""
    body = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    [found] = httpx.post(f"{api}/artifacts/filter", json=body, timeout=10).raise_for_status().json()
    rows: list[dict[str, Any]] = json.loads(found["data"])
    return rows
