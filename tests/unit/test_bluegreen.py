"""Blue-green with virtual time: who serves when, and what a death at any moment leaves."""

from __future__ import annotations

import socketserver
import threading

import httpx
import pytest

from configs.areas import CanarySettings, JudgeSettings
from configs.errors import ExternalError, GateError
from flows.blue_green import await_way
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.procedures import procedures
from tasks.rollout.bluegreen import BlueGreen, Smoke, check_smoke, plan_blue_green
from tasks.rollout.journal import Journal, ReleaseRecord
from tasks.rollout.procedure import Clock, Look, Rollout
from tasks.rollout.verdict import Decision
from tests.support.memory_cluster import START, Behaviour, MemoryCluster
from tests.unit.test_rollout_procedure import AliasBook, MemoryBlobs

OLD, NEW = Version(1, 0, 0), Version(1, 1, 0)


class Case:
    """OLD serves on three replicas; NEW is to take over."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.cluster = MemoryCluster({NEW: behaviour})
        self.cluster.deploy(Track.stable, OLD, 3)
        self.cluster.weights = {Track.stable: 1.0}
        record = ReleaseRecord(release_id="r-test", started_at=START, requested_by="t", parameters={})
        self.journal = Journal.start(MemoryBlobs(), "b", record)
        self.looks: list[Look] = []
        clock = Clock(self.cluster.monotonic, self.cluster.sleep, self.cluster.now)
        rollout = Rollout(
            self.cluster,
            self.journal,
            plan_blue_green(NEW, OLD, 3, 8),
            CanarySettings(),
            JudgeSettings(),
            60.0,
            lambda: None,
            self.looks.append,
            clock,
        )
        change = procedures(self.cluster)
        self.green = BlueGreen(rollout, lambda lease_s: change.switch(Track.canary, lease_s))

    def watched(self, seconds: float = 30.0) -> Look:
        return self.green.watch(self.cluster.paired, seconds, 0.8)


@pytest.fixture
def healthy() -> Case:
    case = Case(Behaviour())
    case.green.rollout.deploy_canary()
    assert case.green.verify(case.cluster.paired).decision is Decision.promote
    return case


def test_green_is_as_large_as_blue_and_meets_no_user_before_the_switch(healthy: Case) -> None:
    assert healthy.cluster.replicas == {Track.stable: 3, Track.canary: 3}
    assert healthy.cluster.answered.get(NEW, 0) == 0
    assert healthy.cluster.weights == {Track.stable: 1.0}


def test_after_the_switch_green_answers_everybody_under_the_lease_for_the_whole_watch(healthy: Case) -> None:
    before = healthy.cluster.answered[OLD]
    look = healthy.watched(30.0)
    assert look.verdict.decision is Decision.promote
    assert healthy.cluster.answered[OLD] == before
    assert healthy.cluster.answered[NEW] == pytest.approx(3_000, rel=0.02)
    assert healthy.cluster.lease_until is not None
    assert healthy.journal.record.intent is not None
    assert healthy.journal.record.intent.action == "canary"


def test_it_settles_with_blue_replaced_while_blue_has_no_traffic(healthy: Case) -> None:
    healthy.watched()
    healthy.cluster.calls.clear()
    aliases = AliasBook()
    healthy.green.settle(aliases, by="t", reason="good")
    assert healthy.cluster.calls == [
        "weights canary=1",
        "deploy stable v1.1.0 x3",
        "weights stable=1",
        "remove canary",
        "remove baseline",
    ]
    assert aliases.moves == [("production", NEW)]
    assert healthy.cluster.versions == {Track.stable: NEW}


def test_a_green_that_fails_after_the_switch_gives_way_to_blue() -> None:
    case = Case(Behaviour())
    case.green.rollout.deploy_canary()
    case.green.verify(case.cluster.paired)
    case.cluster.canary_breaks_at = case.cluster.time_s + 5
    began = case.cluster.time_s
    look = case.watched(300.0)
    assert look.verdict.decision is Decision.rollback
    assert case.cluster.time_s - began < 10
    case.green.switch_back()
    assert case.cluster.weights == {Track.stable: 1.0}
    assert case.cluster.versions == {Track.stable: OLD}


def test_a_green_that_is_bad_in_the_mirror_is_never_switched_to() -> None:
    case = Case(Behaviour(errors=0.2))
    case.green.rollout.deploy_canary()
    assert case.green.verify(case.cluster.paired).decision is Decision.rollback
    assert case.cluster.answered.get(NEW, 0) == 0


def test_blue_serves_again_when_the_flow_dies_in_the_watch(healthy: Case) -> None:
    healthy.watched(5.0)
    healthy.cluster.sleep(CanarySettings().lease_s + 1)
    assert healthy.cluster.weights == {Track.stable: 1.0}


def test_where_blue_cannot_be_replaced_it_serves_as_before(healthy: Case) -> None:
    healthy.watched()
    healthy.cluster.behaviours[NEW].becomes_ready = False
    aliases = AliasBook()
    with pytest.raises(ExternalError):
        healthy.green.settle(aliases, by="t", reason="good")
    assert healthy.cluster.versions == {Track.stable: OLD}
    assert healthy.cluster.weights == {Track.stable: 1.0}
    assert aliases.moves == []


@pytest.mark.parametrize(
    "bad", [Smoke(500, "v1.1.0", ""), Smoke(200, "v1.0.0", "rust"), Smoke(0, "", ""), Smoke(200, "v1.1.0", "")], ids=str
)
def test_one_bad_smoke_prediction_stops_it(bad: Smoke) -> None:
    good = Smoke(200, "v1.1.0", "rust")
    check_smoke([good, good], NEW)
    with pytest.raises(GateError, match=f"smoke prediction 2 of 2: green answered HTTP {bad.status}"):
        check_smoke([good, bad], NEW)


def test_the_smoke_photos_wait_until_the_network_knows_the_way_to_green():
    class Hello(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hello, bind_and_activate=False) as server:
        server.server_bind()
        url = f"http://127.0.0.1:{server.server_address[1]}/predict"
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        opens = threading.Timer(0.7, server.server_activate)
        opens.start()
        threading.Thread(target=lambda: (opens.join(), server.serve_forever(0.05)), daemon=True).start()
        await_way(url)
        assert httpx.get(url).is_success
        server.shutdown()
