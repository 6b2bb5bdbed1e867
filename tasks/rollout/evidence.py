"""From the running totals of the gateway's counters to the judge's evidence. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.cluster import TrackCounters
from tasks.cluster.meter import Meter
from tasks.rollout.verdict import Evidence

__all__ = ["Meter", "above", "evidence", "quantile"]  # the rollout's one door to the cluster's counters


def evidence(totals: TrackCounters | None, objective_ms: float) -> Evidence:
    """What a `Meter` has counted of one track, as the judge reads it; None (no such track) has seen nothing.

    Slow is what took longer than `objective_ms`; see `above` for an objective between two buckets.
    """
    if totals is None:
        return Evidence()
    return Evidence(
        requests=totals.requests,
        errors=totals.errors,
        slow=above(totals.latency_ms, objective_ms),
        predictions=totals.predictions,
        ood=totals.ood,
        classes=totals.classes,
        latency=totals.latency_ms,
        shadow_pairs=totals.shadow_pairs,
        shadow_differ=totals.shadow_differ,
        shadow_errors=totals.shadow_errors,
        shadow_slow=above(totals.shadow_latency_ms, objective_ms),
        shadow_latency=totals.shadow_latency_ms,
        shadow_by_class=totals.shadow_by_class,
        p50_ms=quantile(totals.latency_ms, 0.5),
        p99_ms=quantile(totals.latency_ms, 0.99),
    )


def above(buckets: Mapping[float, int], objective_ms: float) -> int:
    """How many answers took longer than the smallest bucket bound that is at least `objective_ms`."""
    if not buckets:
        return 0
    total = max(buckets.values())
    within = [count for bound, count in buckets.items() if bound >= objective_ms]
    return total - min(within, default=total)


def quantile(buckets: Mapping[float, int], q: float) -> float | None:
    """The q-quantile in ms by linear interpolation inside its bucket, as Prometheus' histogram_quantile does.

    None without samples. A quantile in the last, unbounded bucket is the largest finite bound.
    """
    ordered = sorted(buckets.items())
    total = ordered[-1][1] if ordered else 0
    if total <= 0:
        return None
    rank, lower, below = q * total, 0.0, 0
    for bound, count in ordered:
        if count >= rank and count > below:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = bound, count
    return lower
