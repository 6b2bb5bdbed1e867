"""Counters to evidence: differences, restarts, histograms."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from ml.version import Version
from tasks.cluster import TrackCounters
from tasks.rollout.evidence import Probes, above, evidence, quantile

SINCE = datetime(2026, 1, 1, tzinfo=UTC)


def counters(requests: int, since: datetime = SINCE) -> TrackCounters:
    latency = {10.0: requests // 2, 100.0: requests, math.inf: requests}
    return TrackCounters(Version(1, 1, 0), since, requests, requests // 10, latency, requests, requests // 5)


def test_only_what_was_added_since_the_start_counts() -> None:
    seen = evidence(counters(300), counters(100), Probes(7, 6), objective_ms=10)
    assert (seen.requests, seen.errors, seen.slow) == (200, 20, 100)
    assert (seen.shadow_pairs, seen.shadow_differ, seen.probes, seen.probes_correct) == (200, 40, 7, 6)


def test_counters_that_began_anew_count_in_full() -> None:
    seen = evidence(counters(50, SINCE + timedelta(hours=1)), counters(100), Probes(), objective_ms=10)
    assert seen.requests == 50


def test_a_track_that_is_not_there_has_no_requests() -> None:
    assert evidence(None, None, Probes(3, 3), objective_ms=10).requests == 0


def test_quantiles_interpolate_inside_a_bucket() -> None:
    assert quantile({10.0: 50, 20.0: 100, math.inf: 100}, 0.75) == pytest.approx(15.0)
    assert quantile({10.0: 0, math.inf: 5}, 0.5) == 10.0
    assert quantile({}, 0.5) is None
    assert quantile({10.0: 0, math.inf: 0}, 0.5) is None


def test_slow_counts_what_lies_above_the_objective() -> None:
    buckets = {100.0: 90, 250.0: 95, math.inf: 100}
    assert above(buckets, 250) == 5
    assert above(buckets, 200) == 5
    assert above(buckets, 1e6) == 0
    assert above({}, 250) == 0
