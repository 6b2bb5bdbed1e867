"""The canary's gates: each turns counts of both versions into a reading with its evidence for harm. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from configs.areas import GateRule, JudgeSettings, TailRule
from tasks.rollout import anytime
from tasks.rollout.anytime import Rate
from tasks.rollout.evidence import quantile
from tasks.rollout.verdict import Evidence, GateReading, Paired

_ALIKE: Final = ("shadow errors", "shadow slow", "errors", "slow", "tail latency", "ood")
_ANSWERS: Final = ("disagreement", "class disagreement", "class mix", "accuracy")
_FIRST: Final = ("errors", "slow", "accuracy")
# Odds above this tell nobody more.
_LARGE_ODDS: Final = 1e6


@dataclass(frozen=True, slots=True)
class Sides:
    """Everything the gates look at.

    `champion`: the stable track; `baseline`: what the canary's users are compared with, a track of its own or the
    stable one; `paired`: labelled images that both versions answered; `classes`: how many both know, 0 where answers
    cannot be compared; `floor`: the accuracy asked of a first version.
    """

    canary: Evidence
    champion: Evidence
    baseline: Evidence
    paired: Paired
    classes: int = 0
    floor: float | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a gate found before it is held against its threshold. `words` say value and comparison; `interval` is
    only worked out for a verdict that ends something; `reference` is the other side's value, if there is one."""

    value: float
    limit: float
    samples: int
    log_evidence: float
    words: str
    interval: Callable[[float], tuple[float, float]]
    reference: float | None = None


def rule_of(name: str, limits: JudgeSettings) -> GateRule:
    """The settings of a gate."""
    rules: Mapping[str, GateRule] = {
        "shadow errors": limits.errors,
        "shadow slow": limits.slow,
        "errors": limits.errors,
        "slow": limits.slow,
        "tail latency": limits.tail,
        "ood": limits.ood,
        "disagreement": limits.disagreement,
        "class disagreement": limits.class_disagreement,
        "class mix": limits.class_mix,
        "accuracy": limits.accuracy,
    }
    return rules[name]


def gate_names(*, first: bool, comparable: bool) -> tuple[str, ...]:
    """The gates that apply to a rollout, those that only report included.

    `first`: there is no champion; `comparable`: both versions know the same classes.
    """
    if first:
        return _FIRST
    return _ALIKE + (_ANSWERS if comparable else ())


def log_threshold(names: tuple[str, ...], limits: JudgeSettings) -> float:
    """Each counted gate gets an equal share of alpha (Bonferroni): evidence of (number of gates) / alpha is harm."""
    counted = sum(not rule_of(name, limits).dry_run for name in names)
    return math.log(max(counted, 1) / limits.alpha)


def read(names: tuple[str, ...], sides: Sides, limits: JudgeSettings, *, intervals: bool) -> tuple[GateReading, ...]:
    """Read every named gate. `intervals`: work out confidence sequences too (milliseconds a gate)."""
    threshold = log_threshold(names, limits)
    readers = _READERS if sides.floor is None else _FIRST_READERS
    return tuple(_reading(name, readers[name](sides, limits), limits, threshold, intervals=intervals) for name in names)


def _reading(name: str, seen: _Seen, limits: JudgeSettings, threshold: float, *, intervals: bool) -> GateReading:
    rule = rule_of(name, limits)
    enough = seen.samples >= rule.min_samples
    low, high = seen.interval(limits.alpha) if intervals and seen.samples else (None, None)
    evidence = f"evidence {odds(seen.log_evidence)} against a threshold of {odds(threshold)}"
    return GateReading(
        name,
        seen.value,
        seen.limit,
        seen.samples,
        seen.log_evidence < threshold if enough else None,
        f"{seen.words}; {evidence}",
        seen.log_evidence,
        threshold,
        low,
        high,
        rule.critical,
        rule.dry_run,
        seen.reference,
    )


def harm_shown(critical: Sequence[GateReading], gates: int, alpha: float) -> tuple[str, ...]:
    """The sentences of the gates that show harm: each by itself, or else the mean of all `gates` (those that say
    nothing yet count as zero). Empty where there is none."""
    if broken := tuple(reading.sentence for reading in critical if reading.ok is False):
        return broken
    together, needed = anytime.mean([_log(reading) for reading in critical], gates), -math.log(alpha)
    if together < needed:
        return ()
    summary = f"evidence {odds(together)} against a threshold of {odds(needed)}"
    return (f"no gate shows harm alone, all together do: {summary}", max(critical, key=_log).sentence)


def _log(reading: GateReading) -> float:
    return -math.inf if reading.log_evidence is None else reading.log_evidence


def odds(log_evidence: float) -> str:
    """Evidence as people say it: 412:1."""
    if log_evidence >= math.log(_LARGE_ODDS):
        return f"over {_LARGE_ODDS:,.0f}:1"
    if log_evidence < 0:
        return "below 1:1"
    value = math.exp(log_evidence)
    return f"{value:,.0f}:1" if value >= 10 else f"{value:.1f}:1"


def _shadow_errors(sides: Sides, limits: JudgeSettings) -> _Seen:
    ours = Rate(sides.canary.shadow_errors, sides.canary.shadow_requests)
    theirs = Rate(sides.champion.errors, sides.champion.requests)
    return _compared(ours, theirs, limits.errors, "answered {} of {} mirrored requests with an error")


def _shadow_slow(sides: Sides, limits: JudgeSettings) -> _Seen:
    total = anytime.total_of(sides.canary.shadow_latency) or sides.canary.shadow_pairs
    ours = Rate(min(sides.canary.shadow_slow, total), total)
    theirs = _slow_rate(sides.champion)
    objective = f"{limits.latency_objective_ms:.0f} ms"
    return _compared(ours, theirs, limits.slow, f"took over {objective} for {{}} of {{}} mirrored requests")


def _errors(sides: Sides, limits: JudgeSettings) -> _Seen:
    ours, theirs = (Rate(side.errors, side.requests) for side in (sides.canary, sides.baseline))
    return _compared(ours, theirs, limits.errors, "answered {} of {} requests with an error")


def _slow(sides: Sides, limits: JudgeSettings) -> _Seen:
    ours, theirs = _slow_rate(sides.canary), _slow_rate(sides.baseline)
    objective = f"{limits.latency_objective_ms:.0f} ms"
    return _compared(ours, theirs, limits.slow, f"took over {objective} for {{}} of {{}} requests")


def _slow_rate(side: Evidence) -> Rate:
    """Requests that got no answer took no time: only those with a latency count."""
    total = anytime.total_of(side.latency) or side.requests
    return Rate(min(side.slow, total), total)


def _ood(sides: Sides, limits: JudgeSettings) -> _Seen:
    ours, theirs = (Rate(side.ood, side.predictions) for side in (sides.canary, sides.baseline))
    return _compared(ours, theirs, limits.ood, "took {} of {} photos for no leaf")


def _compared(ours: Rate, theirs: Rate, rule: GateRule, what: str) -> _Seen:
    """A rate against the concurrent baseline's."""
    words = f"the canary {what.format(f'{ours.share:.1%}', f'{ours.total:,}')}, the baseline {theirs.share:.1%}"
    return _Seen(
        ours.share,
        min(1.0, theirs.share + rule.margin),
        ours.total if theirs.total else 0,
        anytime.worse(ours, theirs, rule.margin),
        words if theirs.total else f"{words} (of nothing)",
        lambda alpha: anytime.rate_interval(ours, alpha),
        theirs.share if theirs.total else None,
    )


def _tail(sides: Sides, limits: JudgeSettings) -> _Seen:
    rule: TailRule = limits.tail
    ours, theirs = sides.canary.latency, sides.baseline.latency
    q = rule.quantile
    value, reference = quantile(ours, q) or 0.0, quantile(theirs, q) or 0.0
    limit = max(rule.factor * reference, limits.latency_objective_ms)
    samples = anytime.total_of(ours) if theirs else 0
    name = f"{100 * q:g} % of the canary's {anytime.total_of(ours):,} answers came within {value:,.0f} ms"
    return _Seen(
        value,
        limit,
        samples,
        anytime.slower(ours, theirs, q, rule.factor, limits.latency_objective_ms),
        f"{name}, of the baseline's within {reference:,.0f} ms",
        lambda alpha: anytime.quantile_interval(ours, q, alpha),
        reference if theirs else None,
    )


def _disagreement(sides: Sides, limits: JudgeSettings) -> _Seen:
    rate, bound = Rate(sides.canary.shadow_differ, sides.canary.shadow_pairs), limits.disagreement.margin
    words = f"the canary gave another answer than the champion to {rate.share:.1%} of {rate.total:,} mirrored requests"
    return _bounded(rate, bound, f"{words}; {bound:.0%} is the limit")


def _class_disagreement(sides: Sides, limits: JudgeSettings) -> _Seen:
    """Every answer of the champion by itself; the worst is named, the evidence is the mean over all classes."""
    bound = limits.class_disagreement.margin
    rates = {name: Rate(differ, pairs) for name, (pairs, differ) in sides.canary.shadow_by_class.items() if pairs}
    evidence = dict(zip(rates, anytime.each_above(list(rates.values()), bound), strict=True))
    worst = max(evidence, key=lambda name: evidence[name], default="")
    rate = rates.get(worst, Rate(0, 0))
    words = f'{rate.share:.1%} of {rate.total:,} photos that the champion calls "{worst}"'
    seen = _bounded(rate, bound, f"the canary gave another answer to {words}; {bound:.0%} is the limit")
    together = anytime.mean(list(evidence.values()), max(sides.classes, len(evidence)))
    return _Seen(seen.value, seen.limit, seen.samples, together, seen.words, seen.interval)


def _bounded(rate: Rate, bound: float, words: str) -> _Seen:
    evidence = anytime.above(rate, bound)
    return _Seen(rate.share, bound, rate.total, evidence, words, lambda alpha: anytime.rate_interval(rate, alpha))


def _class_mix(sides: Sides, limits: JudgeSettings) -> _Seen:
    """The class whose share moved most is named; the evidence is over all."""
    margin, ours, theirs = limits.class_mix.margin, sides.canary.classes, sides.baseline.classes
    total, other = sum(ours.values()), sum(theirs.values())

    def rates(name: str) -> tuple[Rate, Rate]:
        return Rate(ours.get(name, 0), total), Rate(theirs.get(name, 0), other)

    def moved(name: str) -> float:
        return abs(ours.get(name, 0) / max(total, 1) - theirs.get(name, 0) / max(other, 1))

    most = max(sorted(ours.keys() | theirs.keys()), key=moved, default="")
    one, two = rates(most)
    more, fewer = (one, two) if one.share >= two.share else (two, one)
    words = f'the canary answered "{most}" to {one.share:.1%} of {total:,} photos, the baseline to {two.share:.1%}'
    return _Seen(
        moved(most),
        margin,
        total if other else 0,
        anytime.shifted(ours, theirs, sides.classes, margin),
        words,
        lambda alpha: anytime.difference_interval(more, fewer, alpha),
    )


def _accuracy(sides: Sides, limits: JudgeSettings) -> _Seen:
    paired, margin = sides.paired, limits.accuracy.margin
    words = (
        f"the canary was wrong on {paired.challenger.share:.1%} of {paired.pairs:,} labelled images, the champion on "
        f"{paired.champion.share:.1%} of the same ({paired.losses} lost, {paired.wins} won)"
    )
    return _Seen(
        paired.challenger.share,
        min(1.0, paired.champion.share + margin),
        paired.pairs,
        anytime.lost(paired.losses, paired.wins, paired.pairs, margin),
        words,
        lambda alpha: anytime.rate_interval(paired.challenger, alpha),
        paired.champion.share if paired.pairs else None,
    )


_Reader = Callable[[Sides, JudgeSettings], _Seen]
_READERS: Final[Mapping[str, _Reader]] = {
    "shadow errors": _shadow_errors,
    "shadow slow": _shadow_slow,
    "disagreement": _disagreement,
    "class disagreement": _class_disagreement,
    "errors": _errors,
    "slow": _slow,
    "tail latency": _tail,
    "ood": _ood,
    "class mix": _class_mix,
    "accuracy": _accuracy,
}


def _first_errors(sides: Sides, limits: JudgeSettings) -> _Seen:
    rate, bound = Rate(sides.canary.errors, sides.canary.requests), limits.first_error_rate
    words = f"the new version answered {rate.share:.1%} of {rate.total:,} requests with an error"
    return _bounded(rate, bound, f"{words}; {bound:.1%} is the limit")


def _first_slow(sides: Sides, limits: JudgeSettings) -> _Seen:
    rate, bound = _slow_rate(sides.canary), limits.first_slow_share
    words = f"the new version took over {limits.latency_objective_ms:.0f} ms for {rate.share:.1%} of {rate.total:,}"
    return _bounded(rate, bound, f"{words} requests; {bound:.1%} is the limit")


def _first_accuracy(sides: Sides, _: JudgeSettings) -> _Seen:
    rate, bound = sides.paired.challenger, 1.0 - (sides.floor or 0.0)
    words = f"the new version was wrong on {rate.share:.1%} of {rate.total:,} labelled images"
    return _bounded(rate, bound, f"{words}; {bound:.1%} is the limit")


# A first version is held to fixed limits: there is nobody to compare it with.
_FIRST_READERS: Final[Mapping[str, _Reader]] = {
    "errors": _first_errors,
    "slow": _first_slow,
    "accuracy": _first_accuracy,
}
