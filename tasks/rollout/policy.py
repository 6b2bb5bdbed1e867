"""The canary's judge: evidence in, a verdict out. Pure: no I/O, no clock, no randomness.

The rule is simple on purpose: counts against limits, with a minimum of samples, and an exact binomial test so that one
unlucky request in forty is not called a failure.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.areas import JudgeSettings

# A limit counts as broken when a system that keeps it exactly would look this bad in fewer than 1 of 100 samples.
SIGNIFICANCE = 0.01


class Decision(enum.StrEnum):
    """What to do next."""

    wait = "continue"
    advance = "advance"
    promote = "promote"
    rollback = "rollback"
    inconclusive = "inconclusive"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was counted for one version since the rollout began. `slow`: over the latency objective."""

    requests: int = 0
    errors: int = 0
    slow: int = 0
    probes: int = 0
    probes_correct: int = 0
    shadow_pairs: int = 0
    shadow_differ: int = 0
    shadow_errors: int = 0
    shadow_slow: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None

    @property
    def shadow_requests(self) -> int:
        """Mirrored requests that were answered or failed."""
        return self.shadow_pairs + self.shadow_errors


@dataclass(frozen=True, slots=True)
class GateReading:
    """One gate: what was seen, what is allowed. `ok` None: too few samples to say."""

    name: str
    value: float
    limit: float
    samples: int
    ok: bool | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do next, and why: `reasons` are sentences for people, `readings` and `evidence` are for machines."""

    decision: Decision
    reasons: tuple[str, ...]
    readings: tuple[GateReading, ...]
    evidence: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the rollout stands: `weight` 0 is the shadow stage.

    `needed` canary samples decide it, on top of those `seen_before` it began. `floor` is the accuracy asked of a
    version that has no champion to be compared with.
    """

    weight: float
    needed: int
    last: bool
    elapsed_s: float
    deadline_s: float
    seen_before: int = 0
    floor: float | None = None


def judge(canary: Evidence, champion: Evidence, stage: Stage, limits: JudgeSettings, *, comparable: bool) -> Verdict:
    """Decide on the canary from all that was counted so far.

    `comparable`: both versions know the same classes, so that their answers can be compared.
    """
    readings = (
        _shadow_gates(canary, limits, comparable)
        if stage.weight == 0
        else _traffic_gates(canary, champion, stage, limits, comparable)
    )
    seen = (canary.shadow_requests if stage.weight == 0 else canary.requests) - stage.seen_before
    broken = [reading.sentence for reading in readings if reading.ok is False]
    if broken:
        return _verdict(Decision.rollback, broken, readings, canary, champion)
    if seen < stage.needed:
        return _undecided(stage, seen, readings, canary, champion)
    return _passed(stage, seen, readings, canary, champion)


def _undecided(
    stage: Stage, seen: int, readings: Sequence[GateReading], canary: Evidence, champion: Evidence
) -> Verdict:
    progress = f"the canary answered {seen} of the {stage.needed} requests this step needs"
    if stage.elapsed_s < stage.deadline_s:
        return _verdict(Decision.wait, [progress], readings, canary, champion)
    sentence = f"{progress}, and the deadline of {stage.deadline_s:.0f} s is over: too little traffic to decide"
    return _verdict(Decision.inconclusive, [sentence], readings, canary, champion)


def _passed(stage: Stage, seen: int, readings: Sequence[GateReading], canary: Evidence, champion: Evidence) -> Verdict:
    where = "mirrored requests" if stage.weight == 0 else f"requests at {stage.weight:.0%} of the traffic"
    sentence = f"no limit was broken in {seen} {where}"
    return _verdict(Decision.promote if stage.last else Decision.advance, [sentence], readings, canary, champion)


def _verdict(
    decision: Decision, reasons: Sequence[str], readings: Sequence[GateReading], canary: Evidence, champion: Evidence
) -> Verdict:
    evidence = {f"canary_{k}": v for k, v in _numbers(canary).items()}
    evidence |= {f"champion_{k}": v for k, v in _numbers(champion).items()}
    return Verdict(decision, tuple(reasons), tuple(readings), evidence)


def _numbers(evidence: Evidence) -> dict[str, float]:
    named = {name: getattr(evidence, name) for name in Evidence.__dataclass_fields__}
    return {name: float(value) for name, value in named.items() if value is not None}


def _shadow_gates(canary: Evidence, limits: JudgeSettings, comparable: bool) -> tuple[GateReading, ...]:
    total = canary.shadow_requests
    gates = [
        _errors(canary.shadow_errors, total, limits.max_error_rate, limits, "mirrored requests"),
        _slow(canary.shadow_slow, canary.shadow_pairs, limits.max_slow_share, limits, "mirrored requests"),
    ]
    if comparable:
        gates.append(_disagreement(canary, limits))
    return tuple(gates)


def _traffic_gates(
    canary: Evidence, champion: Evidence, stage: Stage, limits: JudgeSettings, comparable: bool
) -> tuple[GateReading, ...]:
    allowed_errors = max(limits.max_error_rate, _share(champion.errors, champion.requests) + limits.error_margin)
    allowed_slow = min(1.0, _share(champion.slow, champion.requests) + limits.max_slow_share)
    gates = [
        _errors(canary.errors, canary.requests, min(1.0, allowed_errors), limits, "requests"),
        _slow(canary.slow, canary.requests, allowed_slow, limits, "requests"),
    ]
    if stage.floor is not None:
        gates.append(_accuracy_floor(canary, stage.floor))
    elif comparable:
        gates.append(_accuracy(canary, champion, limits))
    return tuple(gates)


def _errors(errors: int, total: int, limit: float, limits: JudgeSettings, what: str) -> GateReading:
    all_failed = total >= limits.hard_error_requests and errors == total
    ok = False if all_failed else _within(errors, total, limit)
    sentence = (
        f"the canary answered {_percent(errors, total)} of {total:,} {what} with an error; {limit:.1%} is the limit"
    )
    return GateReading("errors", _share(errors, total), limit, total, ok, sentence)


def _slow(slow: int, total: int, limit: float, limits: JudgeSettings, what: str) -> GateReading:
    sentence = (
        f"the canary answered {_percent(slow, total)} of {total:,} {what} slower than "
        f"{limits.latency_objective_ms:.0f} ms; {limit:.1%} is the limit"
    )
    return GateReading("latency", _share(slow, total), limit, total, _within(slow, total, limit), sentence)


def _disagreement(canary: Evidence, limits: JudgeSettings) -> GateReading:
    differ, pairs, limit = canary.shadow_differ, canary.shadow_pairs, limits.max_disagreement
    sentence = (
        f"the canary gave another answer than the champion on {_percent(differ, pairs)} of {pairs:,} mirrored "
        f"requests; {limit:.1%} is the limit"
    )
    return GateReading("disagreement", _share(differ, pairs), limit, pairs, _within(differ, pairs, limit), sentence)


def _accuracy(canary: Evidence, champion: Evidence, limits: JudgeSettings) -> GateReading:
    """Wrong answers on labelled probes, against the champion's share of wrong answers plus the margin."""
    wrong = canary.probes - canary.probes_correct
    champion_wrong = _share(champion.probes - champion.probes_correct, champion.probes)
    limit = min(1.0, champion_wrong + limits.accuracy_margin)
    ok = _within(wrong, canary.probes, limit) if champion.probes else None
    sentence = (
        f"the canary was wrong on {_percent(wrong, canary.probes)} of {canary.probes:,} labelled probes, the champion "
        f"on {champion_wrong:.1%}; {limit:.1%} is the limit"
    )
    return GateReading("accuracy", _share(wrong, canary.probes), limit, canary.probes, ok, sentence)


def _accuracy_floor(canary: Evidence, floor: float) -> GateReading:
    """Wrong answers on labelled probes, where no champion sets the measure."""
    wrong = canary.probes - canary.probes_correct
    sentence = (
        f"the new version was wrong on {_percent(wrong, canary.probes)} of {canary.probes:,} labelled probes; "
        f"{1 - floor:.1%} is the limit"
    )
    ok = _within(wrong, canary.probes, 1 - floor)
    return GateReading("accuracy", _share(wrong, canary.probes), 1 - floor, canary.probes, ok, sentence)


def _within(bad: int, total: int, limit: float) -> bool | None:
    """Whether `bad` of `total` is compatible with a true share of at most `limit`; None without any sample."""
    if total == 0:
        return None
    if bad <= limit * total:
        return True
    return binomial_tail(bad, total, limit) >= SIGNIFICANCE


def binomial_tail(successes: int, trials: int, share: float) -> float:
    """P(X >= successes) for X ~ Binomial(trials, share): the exact one-sided p-value (Clopper and Pearson, 1934)."""
    if successes <= 0 or share >= 1.0:
        return 1.0
    if share <= 0.0:
        return 0.0
    log_p, log_q = math.log(share), math.log1p(-share)
    terms = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(successes, trials + 1)
    ]
    top = max(terms)
    return min(1.0, math.exp(top) * math.fsum(math.exp(term - top) for term in terms))


def _share(part: int, total: int) -> float:
    return part / total if total else 0.0


def _percent(part: int, total: int) -> str:
    return f"{_share(part, total):.1%}"
