"""From the gateway's running counters to the judge's evidence: what was added since the rollout began. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.cluster import TrackCounters
from tasks.rollout.policy import Evidence


@dataclass(frozen=True, slots=True)
class Probes:
    """Labelled requests that one version answered, and how many it got right."""

    answered: int = 0
    correct: int = 0


def evidence(
    now: TrackCounters | None, start: TrackCounters | None, probes: Probes, *, objective_ms: float
) -> Evidence:
    """What was counted between `start` and `now`. A counter that began anew since `start` counts in full."""
    if now is None:
        return Evidence(probes=probes.answered, probes_correct=probes.correct)
    same = start is not None and start.since == now.since
    base = start if same else None
    latency = _minus(now.latency_ms, base.latency_ms if base else {})
    shadow = _minus(now.shadow_latency_ms, base.shadow_latency_ms if base else {})
    return Evidence(
        requests=now.requests - (base.requests if base else 0),
        errors=now.errors - (base.errors if base else 0),
        slow=above(latency, objective_ms),
        probes=probes.answered,
        probes_correct=probes.correct,
        shadow_pairs=now.shadow_pairs - (base.shadow_pairs if base else 0),
        shadow_differ=now.shadow_differ - (base.shadow_differ if base else 0),
        shadow_errors=now.shadow_errors - (base.shadow_errors if base else 0),
        shadow_slow=above(shadow, objective_ms),
        p50_ms=quantile(latency, 0.5),
        p99_ms=quantile(latency, 0.99),
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


def _minus(now: Mapping[float, int], start: Mapping[float, int]) -> dict[float, int]:
    return {bound: count - start.get(bound, 0) for bound, count in now.items()}
