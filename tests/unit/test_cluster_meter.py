"""Running totals lose nothing to restarts, and do not depend on how often somebody looked."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.version import Version
from tasks.cluster import Track, TrackCounters
from tasks.cluster.meter import Meter, minus, plus

V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
SINCE = datetime(2026, 1, 1, tzinfo=UTC)
LATER = SINCE + timedelta(hours=1)
STABLE, CANARY = Track.stable, Track.canary


def counted(n: int, since: datetime = SINCE, version: Version = V1) -> TrackCounters:
    """As after `n` times ten requests: one error, nine answers, of which one is no leaf; ten mirrored pairs."""
    return TrackCounters(
        version=version,
        since=since,
        requests=10 * n,
        errors=n,
        latency_ms={10.0: 5 * n, math.inf: 9 * n},
        shadow_pairs=10 * n,
        shadow_differ=2 * n,
        shadow_errors=n,
        shadow_latency_ms={10.0: 4 * n, math.inf: 10 * n},
        predictions=9 * n,
        ood=n,
        classes={"rust": 6 * n, "scab": 3 * n} if n else {},
        shadow_ood=n,
        shadow_classes={"rust": 10 * n},
        shadow_by_class={"rust": (6 * n, n), "scab": (4 * n, n)} if n else {},
    )


def numbers(counters: TrackCounters) -> TrackCounters:
    """Without the zeros of names that were never seen, and without `since`."""
    present = {
        name: {key: value for key, value in getattr(counters, name).items() if value not in (0, (0, 0))}
        for name in ("classes", "shadow_classes", "shadow_by_class")
    }
    return replace(counters, since=SINCE, **present)


def metered(*looks: TrackCounters, track: Track = STABLE) -> TrackCounters:
    meter = Meter()
    for look in looks:
        meter.feed({track: look})
    return numbers(meter.totals[track])


def test_what_was_counted_before_the_first_look_does_not_count():
    assert metered(counted(7)) == numbers(counted(0))
    assert metered(counted(7), counted(9), counted(12)) == numbers(counted(5))


def test_a_look_says_what_was_new_in_it():
    meter = Meter()
    assert numbers(meter.feed({STABLE: counted(7)})[STABLE]) == numbers(counted(0))
    assert numbers(meter.feed({STABLE: counted(9)})[STABLE]) == numbers(counted(2))
    assert meter.feed({}) == {}


def test_a_gateway_that_was_started_anew_loses_nothing_that_was_seen():
    assert metered(counted(7), counted(9), counted(4, LATER), counted(6, LATER)) == numbers(counted(8))


def test_a_restart_is_seen_even_when_the_new_count_has_outgrown_the_old_one():
    assert metered(counted(2), counted(3), counted(9, LATER)) == numbers(counted(10))


@pytest.mark.parametrize("gone", ["requests", "classes", "shadow_by_class", "latency_ms"])
def test_a_counter_that_goes_down_tells_of_a_reset_of_all(gone):
    now = replace(counted(9), **{gone: getattr(counted(4), gone)})
    assert metered(counted(2), counted(6), now) == numbers(plus(counted(4), now))


def test_another_version_on_the_track_starts_anew():
    assert metered(counted(2), counted(6), counted(3, LATER, V2), counted(5, LATER, V2)) == numbers(
        counted(5, version=V2)
    )


def test_a_track_that_comes_later_counts_in_full_and_one_that_was_missing_goes_on():
    meter = Meter()
    for look in (
        {STABLE: counted(3)},
        {STABLE: counted(4), CANARY: counted(2, LATER, V2)},
        {STABLE: counted(5)},
        {STABLE: counted(6), CANARY: counted(5, LATER, V2)},
    ):
        meter.feed(look)
    assert numbers(meter.totals[STABLE]) == numbers(counted(3))
    assert numbers(meter.totals[CANARY]) == numbers(counted(5, version=V2))


def test_each_replica_has_resets_of_its_own():
    meter = Meter()
    for look in (
        {"a": {STABLE: counted(3)}, "b": {STABLE: counted(5)}},
        {"a": {STABLE: counted(6)}, "b": {STABLE: counted(7)}},
        {"a": {STABLE: counted(1, LATER)}, "b": {STABLE: counted(8)}},
        {"b": {STABLE: counted(9)}, "c": {STABLE: counted(2, LATER)}},
    ):
        meter.feed_all(look)
    assert numbers(meter.totals[STABLE]) == numbers(counted(3 + 1 + 4 + 2))


def test_a_bound_that_one_histogram_lacks_calls_nothing_quicker_than_it_is_known_to_be():
    fine = replace(counted(0), latency_ms={10.0: 4, 50.0: 6, math.inf: 8})
    coarse = replace(counted(0), latency_ms={10.0: 1, 100.0: 3, math.inf: 3})
    assert plus(fine, coarse).latency_ms == {10.0: 5, 50.0: 7, 100.0: 9, math.inf: 11}


@given(
    runs=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=8), min_size=1, max_size=4),
    looked=st.randoms(use_true_random=False),
)
def test_the_totals_do_not_depend_on_how_the_stream_is_cut_into_looks(runs, looked):
    """A run is the growth of the counters from one start of the gateway to the next."""
    every, few, total = Meter(), Meter(), 0
    for number, growth in enumerate(runs):
        n, since = 0, SINCE + timedelta(hours=number)
        for index, grown in enumerate(growth):
            n += grown
            snapshot = {STABLE: counted(n, since)}
            every.feed(snapshot)
            is_start = number == index == 0
            if is_start or index == len(growth) - 1 or looked.random() < 0.3:
                few.feed(snapshot)
        total += n
    expected = numbers(counted(total - runs[0][0]))
    assert numbers(every.totals[STABLE]) == numbers(few.totals[STABLE]) == expected


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_what_is_added_can_be_taken_away_again(a, b):
    assert numbers(minus(plus(counted(a), counted(b)), counted(b))) == numbers(counted(a))
