"""What every `Cluster` promises. A backend joins by adding a `Backend` to `BACKENDS`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from ml.version import Version
from tasks.cluster import Cluster, ReplicaStatus, Track
from tasks.cluster.memory import Memory, Served
from tests.support.node import eventually, running_node

V1, V2, V3 = Version(1, 0, 0), Version(1, 1, 0), Version(1, 2, 0)
BROKEN = Version(9, 0, 0)
STABLE, CANARY, BASELINE, PREVIOUS = Track


@dataclass(frozen=True)
class Backend:
    """A cluster under test: v1.1.0 answers `rust` and sees no leaf on every fourth photo, v1.2.0 fails half the time,
    v9.0.0 never starts, v1.0.0 answers `healthy`.

    `gateway`: it has one of its own, that splits requests exactly and at once, mirrors them and asks another replica
    when one fails. Without, each connection goes to any pod that has traffic."""

    cluster: Cluster
    users: httpx.Client
    stop: Callable[[], None]
    gateway: bool = True
    ready_s: float = 20.0

    def predict(self) -> httpx.Response:
        return self.users.post("/predict", content=b"leaf")

    def versions(self, requests: int) -> Counter[str]:
        """Who answered this many requests; each must be answered well."""
        answers = [self.predict() for _ in range(requests)]
        assert {answer.status_code for answer in answers} == {200}
        return Counter(answer.headers["X-Model-Version"] for answer in answers)

    def serve(self, track: Track, version: Version, replicas: int = 1) -> None:
        self.cluster.deploy(track, version, replicas)
        self.wait_ready(track)

    def wait_ready(self, track: Track) -> None:
        """Until it is as desired, and the network knows."""
        self.cluster.wait_ready(track, self.ready_s)
        self.settle()

    def route(self, weights: dict[Track, float], **options: Any) -> None:
        """Set weights; return when the network does what they say."""
        self.cluster.set_weights(weights, **options)
        self.settle()

    def settle(self) -> None:
        """Return when just the tracks with a share answer: a gateway knows weights at once, endpoints travel."""
        if not self.gateway:
            eventually(lambda: self._answering() == set(self.cluster.status().shares), 20)

    def _answering(self) -> set[Track | None]:
        """Tracks that answer; None for a replica that is about to end."""
        tracks = {replica.name: replica.track for replica in self.cluster.status().replicas}
        with contextlib.suppress(httpx.TransportError, ValueError):  # nobody is behind the Service yet
            return {tracks.get(self.predict().json().get("replica")) for _ in range(25)}
        return set()

    def near(self, share: float, requests: int) -> float:
        """How far from its share the answers of a track may be: four standard deviations, where chance decides."""
        return 3 if self.gateway else 4 * (requests * share * (1 - share)) ** 0.5

    def needs_gateway(self) -> None:
        if not self.gateway:
            pytest.skip("nothing between users and pods mirrors requests or asks again")

    def replicas(self, track: Track) -> list[ReplicaStatus]:
        return [r for r in self.cluster.status().replicas if r.track is track]


@contextlib.contextmanager
def local_node(home: Path) -> Iterator[Backend]:
    """The local node with stub replicas."""
    with running_node(home) as node:
        node.behave(v1_1_0={"answer": "rust", "ood_share": 0.25}, v1_2_0={"error_share": 0.5}, v9_0_0={"exit_code": 4})
        with httpx.Client(base_url=node.gateway_url, timeout=15.0) as users:
            yield Backend(node.client, users, node.stop)


@contextlib.contextmanager
def kubernetes(home: Path) -> Iterator[Backend]:
    """A namespace of a real Kubernetes with stub replicas in pods."""
    from tests.support.kube import running_namespace

    with running_namespace(home) as made:
        made.behave(v1_1_0={"answer": "rust", "ood_share": 0.25}, v1_2_0={"error_share": 0.5}, v9_0_0={"exit_code": 4})
        new_connections = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
        with httpx.Client(base_url=made.users_url(), timeout=15.0, transport=new_connections) as users:
            yield Backend(made.client, users, made.door.close, gateway=False, ready_s=60.0)


BACKENDS: dict[str, Callable[[Path], AbstractContextManager[Backend]]] = {
    "local node": local_node,
    "kubernetes": kubernetes,
}
PARAMS = [pytest.param(name, marks=pytest.mark.slow if name == "kubernetes" else ()) for name in BACKENDS]


@pytest.fixture(params=PARAMS)
def fresh(request: Any, tmp_path: Path) -> Iterator[Backend]:
    """A cluster with nothing on it."""
    with BACKENDS[request.param](tmp_path) as made:
        yield made


@pytest.fixture(scope="module", params=PARAMS)
def shared(request: Any, tmp_path_factory: Any) -> Iterator[Backend]:
    """One cluster for the module: starting one costs more than a test."""
    with BACKENDS[request.param](tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def served(shared: Backend) -> Backend:
    """v1.0.0 on stable, nothing else."""
    shared.cluster.rollback(V1, 1)
    eventually(lambda: len(shared.cluster.status().replicas) == 1, 15)
    shared.settle()
    return shared


@pytest.fixture
def canaried(served: Backend) -> Backend:
    """v1.0.0 on stable, v1.1.0 on canary."""
    served.serve(CANARY, V2)
    return served


@pytest.fixture
def compared(canaried: Backend) -> Backend:
    """v1.1.0 on canary and v1.0.0 on baseline with 30 % of the traffic each, the rest on stable."""
    canaried.serve(BASELINE, V1)
    canaried.route({STABLE: 0.4, CANARY: 0.3, BASELINE: 0.3}, mirror={CANARY: 1.0}, lease_s=60)
    return canaried


def test_an_empty_cluster_serves_nobody_and_says_when_to_come_back(fresh):
    status = fresh.cluster.status()
    assert (status.versions, status.replicas, status.weights) == ({}, (), {})
    if not fresh.gateway:
        assert fresh._answering() == set()
        return
    answer = fresh.predict()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_a_deployed_version_answers_and_is_in_the_status(served):
    assert served.versions(5) == {"v1.0.0": 5}
    status = served.cluster.status()
    assert (status.versions, status.weights, status.mirror) == ({STABLE: V1}, {STABLE: 1.0}, {})
    [replica] = status.replicas
    assert (replica.version, replica.ready, replica.restarts) == (V1, True, 0)
    assert replica.started_at <= datetime.now(UTC)


def test_deploying_the_same_again_changes_nothing(served):
    before = served.replicas(STABLE)
    served.serve(STABLE, V1)
    assert served.replicas(STABLE) == before


def test_a_canary_gets_no_traffic_until_it_is_given_some(canaried):
    assert canaried.versions(30) == {"v1.0.0": 30}


def test_traffic_follows_the_weights(canaried):
    canaried.route({STABLE: 0.75, CANARY: 0.25})
    share = canaried.cluster.status().shares[CANARY]
    answered = canaried.versions(100)
    assert abs(answered["v1.1.0"] - 100 * share) <= canaried.near(share, 100)
    assert canaried.cluster.status().weights == {STABLE: 0.75, CANARY: 0.25}


def test_the_shares_are_the_weights_where_there_are_enough_replicas(served):
    served.serve(STABLE, V1, replicas=3)
    served.serve(CANARY, V2)
    served.route({STABLE: 0.75, CANARY: 0.25}, lease_s=60)
    assert served.cluster.status().shares == {STABLE: 0.75, CANARY: 0.25}


def test_a_first_version_can_be_taken_away_again(fresh):
    fresh.serve(STABLE, V1)
    fresh.cluster.set_weights({})
    assert fresh.cluster.status().weights == {}
    fresh.cluster.remove(STABLE)
    eventually(lambda: not fresh.cluster.status().replicas, 15)
    assert fresh.cluster.status().versions == {}
    fresh.serve(STABLE, V2)
    assert fresh.versions(5) == {"v1.1.0": 5}


@pytest.mark.parametrize(
    "weights", [{STABLE: 0.5}, {STABLE: 1.0, CANARY: 0.1}, {Track.baseline: 1.0}, {STABLE: 1.5, CANARY: -0.5}], ids=str
)
def test_impossible_weights_change_nothing(canaried, weights):
    with pytest.raises(ConfigError):
        canaried.cluster.set_weights(weights)
    assert canaried.cluster.status().weights == {STABLE: 1.0}


def test_a_lease_that_nobody_renews_returns_the_traffic(canaried):
    canaried.cluster.set_weights({STABLE: 0.5, CANARY: 0.5}, mirror={CANARY: 1.0}, lease_s=1.0)
    lease = canaried.cluster.status().lease_expires_at
    assert lease is not None
    eventually(lambda: canaried.cluster.status().weights == {STABLE: 1.0}, 5)
    status = canaried.cluster.status()
    assert (status.mirror, status.lease_expires_at) == ({}, None)
    assert datetime.now(UTC) >= lease
    canaried.settle()
    assert canaried.versions(20) == {"v1.0.0": 20}
    with pytest.raises(SafetyError):
        canaried.cluster.renew_lease(30)


def test_a_renewed_lease_keeps_the_traffic(canaried):
    canaried.cluster.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=1.0)
    first = canaried.cluster.status().lease_expires_at
    canaried.cluster.renew_lease(60)
    eventually(lambda: datetime.now(UTC) > first, 5)
    canaried.settle()
    assert abs(canaried.versions(20)["v1.1.0"] - 10) <= canaried.near(0.5, 20)


def test_mirrored_answers_are_compared_and_never_returned(canaried):
    canaried.needs_gateway()
    canaried.cluster.set_weights({STABLE: 1.0}, mirror={CANARY: 1.0}, lease_s=30)
    assert canaried.versions(20) == {"v1.0.0": 20}
    eventually(lambda: canaried.cluster.counters()[CANARY].shadow_pairs == 20, 5)
    seen = canaried.cluster.counters()[CANARY]
    assert (seen.shadow_differ, seen.shadow_errors, seen.requests) == (20, 0, 0)
    assert seen.shadow_latency_ms[float("inf")] == 20
    assert (seen.shadow_by_class, seen.shadow_classes) == ({"healthy": (20, 20)}, {"rust": 20})
    assert abs(seen.shadow_ood - 5) <= 1
    assert (seen.predictions, seen.classes, seen.ood) == (0, {}, 0)


def test_counters_grow_by_what_was_asked_and_start_anew_with_a_version(canaried):
    start = canaried.cluster.counters()[STABLE]
    canaried.versions(10)
    before = canaried.cluster.counters()[STABLE]
    assert (before.version, before.since, before.errors) == (V1, start.since, start.errors)
    assert before.requests == start.requests + 10
    assert before.latency_ms[float("inf")] == start.latency_ms[float("inf")] + 10
    assert list(before.latency_ms.values()) == sorted(before.latency_ms.values())
    canaried.cluster.deploy(STABLE, V2, 1)
    canaried.cluster.wait_ready(STABLE, canaried.ready_s)
    after = canaried.cluster.counters()[STABLE]
    assert (after.version, after.requests) == (V2, 0)
    assert after.since > before.since


def test_answers_are_counted_by_class_and_by_whether_they_saw_a_leaf(canaried):
    canaried.route({STABLE: 0.5, CANARY: 0.5}, lease_s=60)
    before = canaried.cluster.counters()
    answered = canaried.versions(40)
    counted = canaried.cluster.counters()
    canary, stable = counted[CANARY], counted[STABLE]
    assert canary.classes == {"rust": canary.predictions}
    assert canary.predictions - before[CANARY].predictions == answered["v1.1.0"]
    assert abs(canary.ood - canary.predictions / 4) <= 1
    assert (stable.predictions - before[STABLE].predictions, stable.ood) == (answered["v1.0.0"], 0)
    assert sum(stable.classes.values()) == stable.predictions


def test_failed_requests_name_no_class(served):
    served.cluster.counters()
    served.serve(CANARY, V3)
    served.route({CANARY: 1.0}, lease_s=60)
    for _ in range(20):
        served.predict()
    canary = served.cluster.counters()[CANARY]
    assert canary.requests >= 20
    assert canary.predictions + canary.errors == canary.requests
    assert abs(canary.predictions - canary.errors) <= 1


def test_a_baseline_beside_the_canary_is_counted_apart_from_stable(compared):
    before = compared.cluster.counters()
    assert {track: c.version for track, c in before.items()} == {STABLE: V1, CANARY: V2, BASELINE: V1}
    answered = compared.versions(100)
    after = compared.cluster.counters()
    grown = {track: after[track].requests - before[track].requests for track in after}
    assert grown[CANARY] == answered["v1.1.0"]
    share = compared.cluster.status().shares[BASELINE]
    assert abs(grown[BASELINE] - 100 * share) <= compared.near(share, 100)
    assert grown[STABLE] + grown[BASELINE] == answered["v1.0.0"]
    assert after[BASELINE].classes == {"healthy": after[BASELINE].predictions}


def test_a_lost_lease_takes_the_traffic_from_baseline_and_canary(compared):
    compared.cluster.set_weights({STABLE: 0.4, CANARY: 0.3, BASELINE: 0.3}, mirror={CANARY: 1.0}, lease_s=0.5)
    eventually(lambda: compared.cluster.status().weights == {STABLE: 1.0}, 5)
    compared.settle()
    before = compared.cluster.counters()
    compared.versions(20)
    after = compared.cluster.counters()
    assert {track: after[track].requests - before[track].requests for track in after} == {
        STABLE: 20,
        CANARY: 0,
        BASELINE: 0,
    }
    assert set(compared.cluster.status().versions) == {STABLE, CANARY, BASELINE}


def test_a_baseline_and_a_canary_are_taken_away_again(compared):
    for track in (CANARY, BASELINE):
        with pytest.raises(SafetyError):
            compared.cluster.remove(track)
    compared.cluster.set_weights({STABLE: 1.0})
    for track in (CANARY, BASELINE, BASELINE):
        compared.cluster.remove(track)
    eventually(lambda: len(compared.cluster.status().replicas) == 1, 10)
    status = compared.cluster.status()
    assert (status.versions, status.weights, status.lease_expires_at) == ({STABLE: V1}, {STABLE: 1.0}, None)
    assert set(compared.cluster.counters()) == {STABLE}
    compared.settle()
    assert compared.versions(10) == {"v1.0.0": 10}


def test_a_rollback_removes_the_baseline_too(compared):
    compared.cluster.rollback(V1, 1)
    compared.settle()
    status = compared.cluster.status()
    assert (status.versions, status.weights, status.mirror) == ({STABLE: V1}, {STABLE: 1.0}, {})
    assert compared.versions(10) == {"v1.0.0": 10}


def test_the_room_shrinks_with_every_replica_and_comes_back(served):
    before = served.cluster.room()
    served.cluster.scale(STABLE, 3)
    assert served.cluster.room() == max(0, before - 2)
    served.cluster.scale(STABLE, 1)
    served.wait_ready(STABLE)
    assert served.cluster.room() == before


def test_users_do_not_see_a_failing_canary_and_it_is_charged(served):
    served.needs_gateway()
    served.serve(CANARY, V3)
    before = served.cluster.counters()[STABLE].errors
    served.cluster.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=30)
    served.versions(40)
    canary = served.cluster.counters()[CANARY]
    assert 18 <= canary.requests <= 22
    assert abs(canary.errors - canary.requests / 2) <= 1
    assert served.cluster.counters()[STABLE].errors == before


def test_a_new_version_replaces_the_old_one(served):
    served.serve(STABLE, V2, replicas=2)
    assert [r.version for r in served.replicas(STABLE)] == [V2, V2]
    assert served.versions(10) == {"v1.1.0": 10}


def test_a_version_that_cannot_start_takes_nothing_down_and_says_why(served):
    served.cluster.deploy(STABLE, BROKEN, 1)
    with pytest.raises(ExternalError, match=r"cannot load v9\.0\.0: this is the reason\Z"):
        served.cluster.wait_ready(STABLE, served.ready_s)
    assert served.versions(10) == {"v1.0.0": 10}
    served.serve(STABLE, V1)
    assert [r.version for r in served.replicas(STABLE)] == [V1]


def test_scaling_up_and_down(served):
    served.cluster.scale(STABLE, 3)
    served.wait_ready(STABLE)
    assert len(served.replicas(STABLE)) == 3
    served.cluster.scale(STABLE, 1)
    served.wait_ready(STABLE)
    assert len(served.replicas(STABLE)) == 1


def test_a_restart_replaces_every_replica_by_one_of_the_same_version(served):
    served.cluster.scale(STABLE, 2)
    served.wait_ready(STABLE)
    before = {r.name for r in served.replicas(STABLE)}
    served.cluster.restart(STABLE)
    served.wait_ready(STABLE)
    after = served.replicas(STABLE)
    assert len(after) == 2
    assert before.isdisjoint(r.name for r in after)
    assert {r.version for r in after} == {V1}


def test_a_track_with_traffic_cannot_be_removed_and_one_without_can_twice(canaried):
    canaried.cluster.set_weights({STABLE: 0.9, CANARY: 0.1}, lease_s=30)
    with pytest.raises(SafetyError):
        canaried.cluster.remove(CANARY)
    canaried.cluster.set_weights({STABLE: 1.0})
    canaried.cluster.remove(CANARY)
    canaried.cluster.remove(CANARY)
    eventually(lambda: not canaried.replicas(CANARY), 10)
    assert CANARY not in canaried.cluster.status().versions


def test_a_promotion_ends_with_one_track(canaried):
    canaried.cluster.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=30)
    canaried.serve(STABLE, V2)
    canaried.route({STABLE: 1.0})
    canaried.cluster.remove(CANARY)
    assert canaried.versions(10) == {"v1.1.0": 10}


def test_a_rollback_from_a_canary_is_immediate_and_removes_it(canaried):
    canaried.cluster.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=30)
    canaried.cluster.rollback(V1, 1)
    canaried.settle()
    assert canaried.versions(20) == {"v1.0.0": 20}
    status = canaried.cluster.status()
    assert (status.versions, status.weights, status.lease_expires_at) == ({STABLE: V1}, {STABLE: 1.0}, None)
    canaried.cluster.rollback(V1, 1)


def test_a_rollback_from_a_promoted_version(served):
    served.serve(STABLE, V2, replicas=2)
    served.cluster.rollback(V1, 2)
    served.settle()
    assert [r.version for r in served.replicas(STABLE)] == [V1, V1]
    assert served.versions(10) == {"v1.0.0": 10}


def test_previous_answers_everybody_at_once_and_until_stable_can(served):
    served.serve(STABLE, V2)
    served.serve(PREVIOUS, V1)
    assert served.versions(10) == {"v1.1.0": 10}
    served.route({PREVIOUS: 1.0})
    assert served.versions(10) == {"v1.0.0": 10}
    served.cluster.rollback(V1, 1)
    served.settle()
    assert served.versions(10) == {"v1.0.0": 10}
    status = served.cluster.status()
    assert (status.versions, status.weights) == ({STABLE: V1}, {STABLE: 1.0})


def test_a_rollback_that_does_not_become_ready_leaves_everybody_on_previous(served):
    served.serve(STABLE, V2)
    served.serve(PREVIOUS, V1)
    served.route({PREVIOUS: 1.0})
    with pytest.raises(ExternalError):
        served.cluster.rollback(BROKEN, 1)
    assert served.versions(10) == {"v1.0.0": 10}
    assert served.cluster.status().weights == {PREVIOUS: 1.0}


def test_what_two_remember_at_once_is_both_kept(served):
    now = datetime.now(UTC)
    entries = [Served(version=str(v), at=now, by="asha", reason="promoted") for v in (V1, V2)]

    def late(memory: Memory) -> Memory:
        if not memory.served:
            served.cluster.remember(lambda m: m.with_served(entries[0]))
        return memory.with_served(entries[1])

    served.cluster.remember(lambda m: m.model_copy(update={"served": ()}))
    told = served.cluster.remember(late)
    assert [entry.version for entry in told.served] == ["v1.1.0", "v1.0.0"]
    assert served.cluster.memory() == told
    assert served.cluster.remember(lambda m: m.with_served(entries[1])).revision == told.revision
    served.serve(STABLE, V2)
    assert served.cluster.memory() == told


def test_the_logs_are_those_of_the_track(canaried):
    assert "serves v1.1.0" in canaried.cluster.logs(CANARY)
    assert "serves v1.0.0" not in canaried.cluster.logs(CANARY)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.scale(CANARY, 2),
        lambda c: c.restart(CANARY),
        lambda c: c.wait_ready(CANARY, 1),
        lambda c: c.deploy(STABLE, V1, 0),
        lambda c: c.deploy(STABLE, V1, 1000),
        lambda c: c.set_weights({STABLE: 1.0}, lease_s=-1),
        lambda c: c.logs(STABLE, lines=0),
    ],
    ids=["scale", "restart", "wait", "no replica", "1000 replicas", "negative lease", "no lines"],
)
def test_asking_for_something_impossible_changes_nothing(served, call):
    before = served.cluster.status()
    with pytest.raises(ConfigError):
        call(served.cluster)
    assert served.cluster.status() == before


def test_a_cluster_that_is_gone_is_an_external_error(fresh):
    fresh.stop()
    for call in (
        fresh.cluster.status,
        lambda: fresh.cluster.renew_lease(1),
        lambda: fresh.cluster.wait_ready(STABLE, 1),
    ):
        with pytest.raises(ExternalError) as caught:
            call()
        assert isinstance(caught.value, KhetError)
        assert caught.value.retryable
