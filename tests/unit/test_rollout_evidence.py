"""Totals to evidence: histograms become shares and quantiles, names stay."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from ml.version import Version
from tasks.cluster import TrackCounters
from tasks.rollout.evidence import above, evidence, quantile
from tasks.rollout.verdict import Evidence

COUNTED = TrackCounters(
    version=Version(1, 1, 0),
    since=datetime(2026, 1, 1, tzinfo=UTC),
    requests=200,
    errors=20,
    latency_ms={10.0: 90, 100.0: 180, math.inf: 180},
    shadow_pairs=50,
    shadow_differ=5,
    shadow_errors=3,
    shadow_latency_ms={10.0: 20, 100.0: 50, math.inf: 50},
    predictions=170,
    ood=7,
    classes={"rust": 100, "scab": 70},
    shadow_by_class={"rust": (30, 1), "scab": (20, 4)},
)


def test_the_judge_is_told_what_was_counted():
    seen = evidence(COUNTED, objective_ms=10)
    assert (seen.requests, seen.errors, seen.slow) == (200, 20, 90)
    assert (seen.predictions, seen.ood, seen.classes) == (170, 7, {"rust": 100, "scab": 70})
    assert (seen.shadow_pairs, seen.shadow_differ, seen.shadow_errors, seen.shadow_slow) == (50, 5, 3, 30)
    assert seen.shadow_by_class == {"rust": (30, 1), "scab": (20, 4)}
    assert (seen.latency, seen.shadow_latency) == (COUNTED.latency_ms, COUNTED.shadow_latency_ms)
    assert (seen.p50_ms, seen.p99_ms) == (pytest.approx(10.0), pytest.approx(98.2))


def test_a_track_that_is_not_there_has_seen_nothing():
    assert evidence(None, objective_ms=10) == Evidence()


def test_quantiles_interpolate_inside_a_bucket():
    assert quantile({10.0: 50, 20.0: 100, math.inf: 100}, 0.75) == pytest.approx(15.0)
    assert quantile({10.0: 0, math.inf: 5}, 0.5) == 10.0
    assert quantile({}, 0.5) is None
    assert quantile({10.0: 0, math.inf: 0}, 0.5) is None


def test_slow_counts_what_lies_above_the_objective():
    buckets = {100.0: 90, 250.0: 95, math.inf: 100}
    assert above(buckets, 250) == 5
    assert above(buckets, 200) == 5
    assert above(buckets, 1e6) == 0
    assert above({}, 250) == 0
