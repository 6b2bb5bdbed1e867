"""Rollbacks at the worst moment: the object store stops, hangs or goes away in the middle, and users go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ExternalError, GateError, SafetyError
from flows import recovery
from flows.books import ANSWER_S, Books
from flows.history import read_history
from flows.rollback import rollback
from flows.rolling_update import rolling_update
from flows.session import open_session
from flows.watchdog import rollout_watchdog
from ml.objects import ObjectStore
from ml.version import Version
from tasks.cluster import Kept, Pending, Track
from tasks.rollout.journal import utc_now
from tests.support.node import NodeProcess, Traffic, eventually, running_node
from tests.support.service import BROKEN, NEW, OLD, UNTRIED, Service, served
from tests.support.stack import pids, start_object_store, stop_parts

KEPT = pytest.mark.parametrize("service", [600], indirect=True, ids=["kept"])
NOTICED_S = 3 * ANSWER_S  # the flow, its checks and two cores that others use included


@dataclass
class Store:
    """An object store that a test stops, or makes hang."""

    folder: Path

    def __post_init__(self) -> None:
        self.start()

    def stop(self) -> None:
        stop_parts(self.folder, signal.SIGKILL)

    def start(self) -> None:
        """At the port, and with the data, that it had before."""
        if not pids(self.folder):
            self.settings = start_object_store(self.folder)

    @contextmanager
    def silent(self, number: signal.Signals) -> Iterator[None]:
        """Stopped (SIGKILL) or hanging (SIGSTOP) for the length of a block."""
        if number is signal.SIGKILL:
            self.stop()
        else:
            self._signal(number)
        try:
            yield
        finally:
            self.start() if number is signal.SIGKILL else self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in pids(self.folder):
            os.kill(pid, number)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(tmp_path_factory.mktemp("s3"))
    yield store
    store.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(tmp_path_factory.mktemp("node")) as running:
        running.behave(v1_3_0={"exit_code": 3})
        yield running


@pytest.fixture
def service(
    prefect: str, s3: Store, node: NodeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Service:
    """NEW serves since an update, OLD did before it. With KEPT, OLD is kept on replicas."""
    s3.start()
    keep_s = getattr(request, "param", 0)
    made = served(ObjectStore(s3.settings), node, tmp_path, prefect, monkeypatch, keep_previous_s=keep_s)
    assert rolling_update(version=str(NEW)).outcome == "promoted"
    if keep_s:
        eventually(lambda: made.serving(Track.previous) == ({OLD}, 2), 20)
    return made


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that is away all the time is given up sooner: what follows is what is tried."""
    monkeypatch.setattr("flows.books.ANSWER_S", 1.0)


# Without the registry -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["stopped", "hanging"])
def test_users_are_back_on_the_old_version_while_the_object_store_is_away(
    service: Service, s3: Store, number: signal.Signals
) -> None:
    with s3.silent(number), Traffic(service.node.gateway_url) as users:
        users.wait_for(20)
        began = time.monotonic()
        record = rollback()
        took_s = time.monotonic() - began
        users.wait_for(20)
        assert service.serving() == ({OLD}, 2)
    assert took_s < NOTICED_S
    assert users.failures == {}
    assert (record.outcome, record.reasons) == (
        "rolled_back",
        (
            "production returned from v1.1.0 to v1.0.0",
            "the registry did not answer: production is pointed at it when it does again",
        ),
    )
    assert service.audited()[-1] == ("rollback", "done")
    assert service.production() == NEW
    [done] = rollout_watchdog().done
    assert done.startswith("the rollback to v1.0.0 that ")
    assert service.production() == OLD
    assert [(r.kind, r.outcome) for r in service.records()] == [
        ("rolling_update", "promoted"),
        ("rollback", "rolled_back"),
    ]
    assert rollout_watchdog().done == ()


def test_an_object_store_that_goes_away_in_the_middle_stops_nothing(
    service: Service, s3: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_stable = service.node.client.rollback

    def and_the_store_is_gone(version: Version, replicas: int) -> None:
        s3.stop()
        replace_stable(version, replicas)

    monkeypatch.setattr(service.node.client, "rollback", and_the_store_is_gone)
    record = rollback()
    monkeypatch.undo()
    assert "the registry did not answer" in record.reasons[-1]
    assert service.serving() == ({OLD}, 2)
    s3.start()
    assert recovery.settle_under_lease(service.systems, 30).startswith("the rollback to v1.0.0")
    assert service.production() == OLD
    assert [r.outcome for r in service.records()] == ["promoted", "rolled_back"]


def test_a_rollout_that_was_running_loses_against_a_rollback(service: Service, s3: Store, hasty: None) -> None:
    with open_session("a-release", {}, kind="blue_green") as session:
        session.check()
        session.change(version=str(UNTRIED))
        with s3.silent(signal.SIGKILL):
            rollback()
        with pytest.raises(SafetyError, match="took the cluster over from a-release"):
            session.intend("promote", str(UNTRIED), str(NEW))
    rollout_watchdog()
    assert (service.production(), service.serving()) == (OLD, ({OLD}, 2))
    lost = next(r for r in service.records() if r.release_id == "a-release")
    assert lost.outcome == "failed"
    assert lost.reasons[0].startswith("superseded by rollback")


def test_what_somebody_did_since_is_not_undone(service: Service, s3: Store, hasty: None) -> None:
    with s3.silent(signal.SIGKILL):
        rollback()
    service.systems.registry.move_alias("production", UNTRIED, by="asha", reason="a hotfix")
    with pytest.raises(ExternalError, match=r"asha moved production to v1\.2\.0 .* the cluster does not serve that"):
        rollout_watchdog()
    assert service.serving() == ({OLD}, 2)
    service.node.client.rollback(UNTRIED, 2)
    assert "is out of date: asha moved production to v1.2.0" in rollout_watchdog().done[0]
    assert (service.production(), service.serving()) == (UNTRIED, ({UNTRIED}, 2))


def test_only_versions_that_the_cluster_remembers_can_be_returned_to(service: Service, s3: Store, hasty: None) -> None:
    with s3.silent(signal.SIGKILL):
        with pytest.raises(GateError, match=r"v1\.2\.0 never served production \(by what the cluster remembers: v1"):
            rollback(to=str(UNTRIED))
        found = read_history(Books(service.systems))
    assert [row.version for row in found.rows[:2]] == ["v1.1.0", "v1.0.0"]
    assert (found.rows[0].serves, found.rows[1].serves, found.rows[0].verifies) == (True, False, None)
    assert "did not answer" in found.registry
    assert service.serving() == ({NEW}, 2)


# With it --------------------------------------------------------------------------------------------------------------


def test_a_rollback_is_remembered_verified_and_undone_by_another(service: Service) -> None:
    planned = rollback(dry_run=True)
    assert planned.reasons[0] == "verify every file of v1.0.0"
    assert "as long as a replica takes to start, at most 20 s" in planned.reasons[1]
    assert "-    version: v1.1.0\n+    version: v1.0.0" in planned.diff
    assert service.serving() == ({NEW}, 2)
    record = rollback()
    assert (record.version, record.outcome, service.production()) == (str(OLD), "rolled_back", OLD)
    assert "about " in rollback(dry_run=True).reasons[1]
    assert rollback().version == str(NEW)
    history = read_history(Books(service.systems))
    assert [row.version for row in history.rows[:3]] == ["v1.1.0", "v1.0.0", "v1.1.0"]
    assert {row.verifies for row in history.rows} == {True}
    assert (history.rows[0].serves, history.pending, history.registry) == (True, None, "answers")


def test_a_version_that_cannot_be_served_any_more_leaves_everything_as_it_was(service: Service) -> None:
    with Traffic(service.node.gateway_url) as users:
        with pytest.raises(ExternalError, match=r"(?s)v1\.3\.0 cannot be served.*v1\.1\.0 goes on serving") as caught:
            rollback(to=str(BROKEN))
        users.wait_for(20)
    assert not caught.value.retryable
    assert users.failures == {}
    assert service.node.client.memory().pending is None
    eventually(lambda: service.serving() == ({NEW}, 2))
    assert (service.production(), service.records()[-1].outcome) == (NEW, "failed")


def test_a_rollback_that_was_killed_is_finished_by_the_next_run(service: Service) -> None:
    cluster = service.node.client
    left = service.left("rollback", action="rollback", version=str(OLD), previous=str(NEW))
    begun = Pending(run_id=left.release_id, version=str(OLD), previous=str(NEW), by="t", reason="x", at=utc_now())
    cluster.remember(lambda memory: memory.model_copy(update={"pending": begun}))
    cluster.remember(lambda memory: memory.taken(left.release_id, utc_now(), alone_s=600))
    with open_session("the-next-run", {}, kind="rolling_update") as session:
        session.check()
        session.close("done", ())
    assert (service.production(), service.serving()) == (OLD, ({OLD}, 2))
    assert (service.read(left).outcome, cluster.memory().pending) == ("rolled_back", None)
    assert [entry.version for entry in cluster.memory().served[:2]] == ["v1.0.0", "v1.1.0"]


def test_two_rollbacks_at_once_are_one(service: Service) -> None:
    cluster = service.node.client
    cluster.remember(lambda memory: memory.taken("another-rollback", utc_now(), alone_s=60))
    with pytest.raises(SafetyError, match="another-rollback is rolling the service back"):
        rollback()
    assert service.serving() == ({NEW}, 2)
    assert rollback(force=True).outcome == "rolled_back"


# Warm replicas --------------------------------------------------------------------------------------------------------


@KEPT
def test_the_version_before_is_kept_and_gets_all_traffic_at_once(service: Service) -> None:
    planned = rollback(dry_run=True)
    assert "on 2 replica(s) that were kept warm" in planned.reasons[0]
    assert "-  stable: 1.0\n+  previous: 1.0" in planned.diff
    row = read_history(Books(service.systems), verified=False).rows[1]
    assert (row.version, row.kept_ready) == ("v1.0.0", 2)
    assert rollout_watchdog().done == ()
    with Traffic(service.node.gateway_url) as users:
        users.wait_for(20)
        record = rollback()
        users.wait_for(20)
    assert users.failures == {}
    assert record.outcome == "rolled_back"
    newest = service.node.client.memory().served[0]
    assert (newest.version, newest.warm) == ("v1.0.0", True)
    assert newest.took_s is not None
    assert newest.took_s < NOTICED_S
    assert (service.production(), service.serving()) == (OLD, ({OLD}, 2))
    assert service.node.client.status().weights == {Track.stable: 1.0}
    eventually(lambda: service.serving(Track.previous) == (set(), 0))


@KEPT
def test_without_the_registry_the_traffic_stays_on_the_warm_replicas_until_it_is_back(
    service: Service, s3: Store, hasty: None
) -> None:
    with s3.silent(signal.SIGKILL), Traffic(service.node.gateway_url) as users:
        users.wait_for(20)
        record = rollback()
        seen = users.versions["v1.1.0"]
        users.wait_for(20)
    assert users.failures == {}
    assert users.versions["v1.1.0"] == seen
    assert record.reasons[-1] == (
        "the registry did not answer: stable is replaced and production is pointed at it when it does again"
    )
    cluster = service.node.client
    assert cluster.status().weights == {Track.previous: 1.0}
    cluster.remember(lambda memory: memory.model_copy(update={"kept": None}))
    assert rollout_watchdog(dry_run=True).done[0].endswith("not finished yet")
    assert Track.previous in cluster.status().versions
    with Traffic(service.node.gateway_url) as users:
        rollout_watchdog()
        users.wait_for(20)
    assert (users.failures, set(users.versions)) == ({}, {"v1.0.0"})
    assert cluster.status().versions == {Track.stable: OLD}
    assert (service.production(), service.serving()) == (OLD, ({OLD}, 2))


@KEPT
def test_what_was_kept_goes_when_its_time_is_over(service: Service) -> None:
    past = Kept(version=str(OLD), until=utc_now() - timedelta(seconds=1))
    service.node.client.remember(lambda memory: memory.model_copy(update={"kept": past}))
    assert rollout_watchdog().done == ("previous was kept warm with v1.0.0, and its time is over: removed",)
    assert service.node.client.status().versions == {Track.stable: NEW}
    assert rollback(dry_run=True).reasons[0] == "verify every file of v1.0.0"
