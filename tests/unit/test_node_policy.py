"""What control calls make of the desired state, and the order of a rolling replacement."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError, SafetyError
from tasks.cluster import Track
from tasks.cluster.memory import Memory, Turn
from tasks.cluster.node import policy
from tasks.cluster.node.rolling import View, plan
from tasks.cluster.node.state import Desired

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SOON = NOW + timedelta(seconds=30)


@pytest.fixture
def both() -> Desired:
    """stable v1.0.0 with all traffic, canary v1.1.0 with none."""
    return policy.deploy(policy.deploy(Desired(), Track.stable, "v1.0.0", 2), Track.canary, "v1.1.0", 1)


@pytest.fixture
def shared(both: Desired) -> Desired:
    """A quarter of the traffic and copies of the rest on the canary, on a lease."""
    return policy.set_weights(both, {Track.stable: 0.75, Track.canary: 0.25}, {Track.canary: 1.0}, SOON)


def test_a_rollback_leaves_everybody_on_previous_until_stable_is_ready(both):
    kept = policy.set_weights(policy.deploy(both, Track.previous, "v0.9.0", 2), {Track.previous: 1.0}, {}, None)
    back = policy.rollback(kept, "v0.9.0", 2)
    assert back.weights == {Track.previous: 1.0}
    assert {track: wanted.version for track, wanted in back.tracks.items()} == {
        Track.stable: "v0.9.0",
        Track.previous: "v0.9.0",
    }
    unused = policy.rollback(policy.deploy(both, Track.previous, "v0.9.0", 2), "v1.0.0", 2)
    assert (unused.weights, list(unused.tracks)) == ({Track.stable: 1.0}, [Track.stable])


def test_only_the_next_revision_of_the_memory_is_kept(both):
    first = Memory(revision=1, turn=Turn(owner="a"))
    kept = policy.remember(both, first)
    assert kept.memory == first
    assert policy.remember(kept, Memory(revision=1, turn=Turn(owner="b"))) == kept
    assert policy.rollback(kept, "v1.0.0", 1).memory == first


def test_the_first_deployment_on_stable_gets_all_traffic():
    assert policy.deploy(Desired(), Track.stable, "v1.0.0", 1).weights == {Track.stable: 1.0}


def test_a_canary_is_deployed_without_traffic(both):
    assert both.weights == {Track.stable: 1.0}


def test_deploying_what_is_deployed_changes_nothing(shared):
    assert policy.deploy(shared, Track.canary, "v1.1.0", 1) == shared


def test_another_version_on_the_canary_does_not_inherit_the_traffic_of_the_judged_one(shared):
    changed = policy.deploy(shared, Track.canary, "v1.2.0", 1)
    assert changed.weights == {Track.stable: 1.0}
    assert changed.mirror == {}
    assert changed.lease_expires_at is None


@pytest.mark.parametrize(
    "weights",
    [{}, {Track.stable: 0.9}, {Track.stable: 0.6, Track.canary: 0.5}, {Track.baseline: 1.0}],
    ids=["none", "too little", "too much", "not deployed"],
)
def test_impossible_weights_are_refused(both, weights):
    with pytest.raises(ConfigError):
        policy.set_weights(both, weights, {}, None)


def test_copies_to_a_track_that_is_not_deployed_are_refused(both):
    with pytest.raises(ConfigError, match="baseline is not deployed"):
        policy.set_weights(both, {Track.stable: 1.0}, {Track.baseline: 1.0}, None)


def test_a_renewed_lease_is_longer_and_never_shorter(shared):
    longer = policy.renew(shared, SOON + timedelta(seconds=5), NOW)
    assert longer.lease_expires_at == SOON + timedelta(seconds=5)
    assert policy.renew(longer, SOON, NOW) == longer


def test_an_expired_lease_gives_everything_back_and_cannot_be_renewed(shared):
    lost = policy.expire(shared)
    assert (lost.weights, lost.mirror, lost.lease_expires_at) == ({Track.stable: 1.0}, {}, None)
    assert lost.tracks == shared.tracks
    with pytest.raises(SafetyError, match="expired at 03:04:35"):
        policy.renew(lost, SOON + timedelta(hours=1), SOON)


def test_a_lease_is_over_at_its_last_moment_even_if_nobody_has_noticed_yet(shared):
    with pytest.raises(SafetyError):
        policy.renew(shared, SOON + timedelta(seconds=30), SOON)


def test_renewing_without_a_lease_is_refused(both):
    with pytest.raises(SafetyError, match="No lease is held"):
        policy.renew(both, SOON, NOW)


def test_a_track_with_traffic_is_not_removed(shared):
    with pytest.raises(SafetyError, match="25%"):
        policy.remove(shared, Track.canary)


def test_removing_a_mirrored_track_ends_the_copies(both):
    mirrored = policy.set_weights(both, {Track.stable: 1.0}, {Track.canary: 1.0}, SOON)
    removed = policy.remove(mirrored, Track.canary)
    assert (set(removed.tracks), removed.mirror, removed.lease_expires_at) == ({Track.stable}, {}, None)
    assert policy.remove(removed, Track.canary) == removed


def test_a_restart_counts_once_per_key(both):
    once = policy.restart(both, Track.stable, "a")
    assert policy.restart(once, Track.stable, "a") == once
    assert policy.restart(once, Track.stable, "b").tracks[Track.stable].generation == 2


def test_a_rollback_leaves_one_track_with_all_traffic(shared):
    back = policy.rollback(shared, "v1.0.0", 2)
    assert set(back.tracks) == {Track.stable}
    assert (back.weights, back.mirror, back.lease_expires_at) == ({Track.stable: 1.0}, {}, None)
    assert back.tracks[Track.stable].fast
    assert policy.rollback(back, "v1.0.0", 2) == back


def test_scaling_what_is_not_deployed_is_refused(both):
    with pytest.raises(ConfigError):
        policy.scale(both, Track.baseline, 2)


def _simulate(wanted: int, surge: int, replicas: list[View], passes: int, starts_work: bool) -> tuple[list[View], int]:
    """Follow the plan; return the end and the fewest ready replicas seen on the way."""
    fewest = sum(r.ready for r in replicas)
    for count in range(passes):
        step = plan(wanted, surge, replicas)
        replicas = [r for r in replicas if r.name not in step.retire]
        fewest = min(fewest, sum(r.ready for r in replicas))
        replicas += [View(f"new-{count}-{i}", True, False, False) for i in range(step.start)]
        if starts_work:
            replicas = [View(r.name, r.current, r.ready or r.current, r.served or r.current) for r in replicas]
    return replicas, fewest


@given(old=st.integers(0, 6), wanted=st.integers(1, 6), surge=st.integers(1, 6))
def test_a_replacement_ends_and_never_has_less_capacity_than_asked_for_or_had(old, wanted, surge):
    before = [View(f"old-{i}", False, True, True) for i in range(old)]
    after, fewest = _simulate(wanted, surge, before, passes=20, starts_work=True)
    assert [r.current for r in after] == [True] * wanted
    assert fewest >= min(old, wanted)


@given(old=st.integers(1, 6), wanted=st.integers(1, 6), surge=st.integers(1, 6))
def test_a_version_that_never_becomes_ready_takes_nothing_down(old, wanted, surge):
    before = [View(f"old-{i}", False, True, True) for i in range(old)]
    after, _ = _simulate(wanted, surge, before, passes=20, starts_work=False)
    assert sum(r.ready for r in after) == min(old, wanted)


def test_one_replica_is_replaced_after_the_other():
    old = [View("old-0", False, True, True), View("old-1", False, True, True)]
    assert plan(2, 1, old).start == 1
    waiting = [*old, View("new", True, False, False)]
    assert plan(2, 1, waiting) == plan(2, 1, []).__class__()
    assert plan(2, 1, [*old, View("new", True, True, True)]).retire == ("old-1",)


def test_a_failed_attempt_is_cleared_away_at_once():
    stuck = View("stuck", False, False, False)
    assert plan(1, 1, [View("good", True, True, True), stuck]).retire == ("stuck",)


def test_scaling_down_takes_replicas_that_are_not_ready_first():
    replicas = [View("a", True, False, True), View("b", True, True, True), View("c", True, True, True)]
    assert plan(2, 1, replicas).retire == ("a",)


def test_a_removed_track_ends_whole():
    assert plan(0, 1, [View("a", False, True, True), View("b", False, False, False)]).retire == ("a", "b")


@pytest.mark.parametrize(
    ("running", "cores", "free", "largest", "more"),
    [
        (3, 8, 64, 0.1, 5),
        (5, 8, 64, 0.1, 3),
        (3, 2, 64, 0.1, 0),
        (3, 8, 1.2, 0.1, 2),
        (3, 8, 1.2, 0.7, 1),
        (3, 8, 0.0, 0.7, 0),
        (0, 8, 64, 0.1, 5),
    ],
    ids=["cores", "retiring ones count", "never negative", "memory", "large ones", "no memory", "starting ones count"],
)
def test_there_is_room_for_one_replica_a_core_while_memory_lasts(both, running, cores, free, largest, more):
    assert policy.room(both, running, cores, int(free * 1e9), int(largest * 1e9)) == more
