"""Shares of traffic are what they say, at every length, whatever rhythm the traffic has."""

from __future__ import annotations

import pytest

from tasks.cluster import Track
from tasks.cluster.node.answers import Prediction, read_prediction
from tasks.cluster.node.counters import BOUNDS_MS, OTHER_CLASSES, Counters, Histogram, Ledger
from tasks.cluster.node.routing import Router
from tasks.cluster.node.state import utcnow


def _router(share: float, **others: object) -> Router:
    router = Router()
    router.set({Track.stable: 1 - share, Track.canary: share}, {}, None)
    return router


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5, 0.95])
@pytest.mark.parametrize("length", [100, 1_000, 20_000])
def test_a_share_is_met_within_a_few_requests(share, length):
    router = _router(share)
    chosen = sum(router.choose(0.0) is Track.canary for _ in range(length))
    assert abs(chosen - share * length) <= 3


def test_every_window_of_a_thousand_requests_holds_the_share():
    router = _router(0.05)
    picks = [router.choose(0.0) is Track.canary for _ in range(10_000)]
    windows = [sum(picks[start : start + 1000]) for start in range(9_000)]
    assert (min(windows) >= 47, max(windows) <= 53) == (True, True)


def test_a_repeating_stream_of_100_images_shows_all_of_them_to_a_five_percent_canary():
    router = _router(0.05)
    seen = {index % 100 for index in range(10_000) if router.choose(0.0) is Track.canary}
    assert seen == set(range(100))


def test_past_the_lease_everything_goes_to_stable_and_nothing_is_copied():
    router = Router()
    router.set({Track.canary: 1.0}, {Track.canary: 1.0}, deadline=10.0)
    assert router.choose(9.9) is Track.canary
    assert router.choose(10.0) is Track.stable
    assert router.copies(Track.stable, 9.9) == [Track.canary]
    assert router.copies(Track.stable, 10.0) == []


def test_a_track_gets_no_copies_of_what_it_answered_itself():
    router = Router()
    router.set({Track.stable: 1.0}, {Track.canary: 1.0}, None)
    assert router.copies(Track.canary, 0.0) == []


def test_a_share_of_requests_is_copied():
    router = Router()
    router.set({Track.stable: 1.0}, {Track.canary: 0.2}, None)
    assert abs(sum(bool(router.copies(Track.stable, 0.0)) for _ in range(1_000)) - 200) <= 3


def test_a_histogram_is_cumulative_and_ends_with_everything():
    histogram = Histogram()
    for duration in (0.2, 1.0, 1.1, 250.0, 60_000.0):
        histogram.add(duration)
    found = histogram.cumulative()
    assert (found[1], found[1.5], found[200], found[250], found[10_000], found[float("inf")]) == (2, 3, 3, 4, 4, 5)
    assert list(found) == sorted(BOUNDS_MS)


def test_only_server_errors_and_silence_are_errors():
    counters = Counters(Track.canary, "v1.0.0", utcnow())
    for status in (200, 404, 422, 500, 503):
        counters.answered(status, 1.0)
    counters.failed("broken")
    counters.failed("timeout", 10_000.0)
    assert (counters.requests, counters.errors) == (7, 4)
    assert counters.latency.cumulative()[float("inf")] == 6


def test_a_version_put_on_a_track_anew_counts_from_zero():
    ledger = Ledger()
    ledger.of(Track.canary, "v1.0.0", utcnow()).answered(200, 1.0)
    ledger.begin(Track.canary, "v1.0.0", utcnow())
    assert ledger.of(Track.canary, "v1.0.0", utcnow()).requests == 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"class": "rust"}', Prediction("rust", True)),
        (b'{"class": "rust", "is_leaf": false}', Prediction("rust", False)),
        (b'{"class": 3, "is_leaf": true}', None),
        (b'{"is_leaf": false}', None),
        (b"[]", None),
        (b"\xff{", None),
        (b"", None),
    ],
)
def test_what_an_answer_says(body, named):
    assert read_prediction(body) == named


def test_a_pair_is_counted_under_the_class_that_the_user_was_told():
    counters = Counters(Track.canary, "v1.1.0", utcnow())
    rust, scab = Prediction("rust", True), Prediction("scab", False)
    assert [counters.compared(*pair) for pair in ((rust, rust), (rust, scab), (scab, scab))] == [False, True, False]
    assert (counters.shadow_pairs, counters.shadow_differ, counters.shadow_ood) == (3, 1, 2)
    assert (counters.pairs_by_class, counters.differ_by_class) == ({"rust": 2, "scab": 1}, {"rust": 1})
    assert counters.shadow_classes == {"rust": 1, "scab": 2}


def test_a_replica_that_invents_classes_fills_no_memory():
    counters = Counters(Track.canary, "v1.1.0", utcnow())
    counters.predicted(Prediction("x" * 10_000, True))
    for number in range(5_000):
        counters.predicted(Prediction(f"class {number}", True))
    assert counters.predictions == 5_001
    assert len(counters.classes) <= 1_001
    assert counters.classes[OTHER_CLASSES] == 5_001 - (len(counters.classes) - 1)
