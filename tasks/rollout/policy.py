"""The canary's judge: evidence in, a verdict out. Pure: no I/O, no clock, no randomness.

It may be asked after every request. Harm of a gate is claimed when its evidence reaches (number of gates) / alpha, harm
of all gates together when the mean of their evidence reaches 1 / alpha; a mean of e-processes is one (Vovk and Wang,
"E-values: calibration, combination and applications", Annals of Statistics 2021) and is never below the largest over
their number, so the probability that a version harmless in every gate is rolled back is at most alpha over the whole
rollout, however often and whenever it is looked at.
"""

from __future__ import annotations

from configs.areas import JudgeSettings
from tasks.rollout.gates import Sides, gate_names, harm_shown, read
from tasks.rollout.verdict import Decision, Evidence, GateReading, Paired, Stage, Verdict


def judge(
    canary: Evidence,
    champion: Evidence,
    paired: Paired,
    stage: Stage,
    limits: JudgeSettings,
    *,
    baseline: Evidence | None = None,
) -> Verdict:
    """Decide on the canary from all that was counted so far.

    `champion` is the stable track; `baseline`, where one runs, a track of the champion that was started beside the
    canary and gets as much traffic: then users' requests are compared with that one.
    """
    sides = Sides(canary, champion, baseline or champion, paired, stage.classes, stage.floor)
    names = gate_names(first=stage.floor is not None, comparable=stage.classes > 0)
    readings = read(names, sides, limits, intervals=False)
    decision, reasons = _decide(readings, sides, stage, limits)
    if decision is not Decision.wait:
        readings = read(names, sides, limits, intervals=True)
    return Verdict(decision, reasons, readings, _numbers(sides))


def _decide(
    readings: tuple[GateReading, ...], sides: Sides, stage: Stage, limits: JudgeSettings
) -> tuple[Decision, tuple[str, ...]]:
    if broken := _guard(stage, limits):
        return Decision.rollback, (broken,)
    counted = [reading for reading in readings if reading.counts and reading.ok is not None]
    critical = [reading for reading in counted if reading.critical]
    if harm := harm_shown(critical, sum(reading.counts for reading in readings), limits.alpha):
        return Decision.rollback, harm
    seen = _samples(sides, stage) - stage.seen_before
    if seen < stage.needed:
        return _undecided(stage, seen)
    if doubts := tuple(reading.sentence for reading in counted if reading.ok is False):
        return Decision.inconclusive, (*doubts, "this gate does not roll back, but it stops the promotion")
    return _passed(stage, seen)


def _guard(stage: Stage, limits: JudgeSettings) -> str:
    """What needs no statistics."""
    if not stage.ready:
        return f"no replica of the canary has taken requests for {limits.unready_s:g} s"
    recent = stage.recent
    if recent.total >= limits.hard_error_requests and recent.bad == recent.total:
        return f"the canary answered each of its last {recent.total:,} requests with an error"
    return ""


def _samples(sides: Sides, stage: Stage) -> int:
    return sides.canary.shadow_requests if stage.weight == 0 else sides.canary.requests


def _undecided(stage: Stage, seen: int) -> tuple[Decision, tuple[str, ...]]:
    progress = f"the canary answered {seen} of the {stage.needed} requests this step needs"
    if stage.elapsed_s < stage.deadline_s:
        return Decision.wait, (progress,)
    late = f"{progress}, and the deadline of {stage.deadline_s:.0f} s is over: too little traffic to decide"
    return Decision.inconclusive, (late,)


def _passed(stage: Stage, seen: int) -> tuple[Decision, tuple[str, ...]]:
    where = "mirrored requests" if stage.weight == 0 else f"requests at {stage.weight:.0%} of the traffic"
    sentence = f"no harm was shown in {seen:,} {where}"
    return (Decision.promote if stage.last else Decision.advance), (sentence,)


def _numbers(sides: Sides) -> dict[str, float]:
    named = {f"canary_{name}": value for name, value in sides.canary.numbers().items()}
    named |= {f"champion_{name}": value for name, value in sides.champion.numbers().items()}
    if sides.baseline is not sides.champion:
        named |= {f"baseline_{name}": value for name, value in sides.baseline.numbers().items()}
    paired = sides.paired
    return named | {
        "pairs": paired.pairs,
        "pairs_lost": paired.losses,
        "pairs_won": paired.wins,
        "pairs_both": paired.both,
    }
