"""What labels that arrive after a promotion say about it: should the version before it return? Pure.

Agronomists label some predictions days later. Each night all labels so far are judged. The evidence is an e-process
(`tasks.rollout.anytime`), so the nights need no correction; `review.alpha` bounds the probability of ever calling a
harmless promotion harmful. The two versions are not compared on the same days or photos: a season that turns between
them looks like harm. Every comparison says so, margins are wide, and a person decides unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, Literal

from configs.areas import ReviewSettings
from tasks.rollout import anytime
from tasks.rollout.anytime import Rate
from tasks.rollout.gates import harm_shown, odds
from tasks.rollout.verdict import Decision, GateReading, Verdict

ACCURACY: Final = "late accuracy"
CLASS_ACCURACY: Final = "late class accuracy"
PROMISE: Final = "promised accuracy"
Phase = Literal["open", "last look", "over"]
_NIGHT: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Window:
    """The review of one promotion: predictions of the version before it count from `since` to `promoted_at`, its own
    from there to `until`, and labels of them until `closes_at`."""

    since: datetime
    promoted_at: datetime
    until: datetime
    closes_at: datetime

    @classmethod
    def after(cls, promoted_at: datetime, limits: ReviewSettings) -> Window:
        """The window that the settings give a promotion."""
        length = timedelta(days=limits.window_days)
        until = promoted_at + length
        return cls(promoted_at - length, promoted_at, until, until + timedelta(days=limits.label_delay_days))

    def phase(self, now: datetime) -> Phase:
        """Whether labels are waited for. The first night after the end looks once more, at what came on the last day;
        then the matter is closed, also where nobody acted on it."""
        if now < self.closes_at:
            return "open"
        return "last look" if now < self.closes_at + _NIGHT else "over"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A version's labelled predictions: wrong answers among the photos of each true class.

    `disputed`: predictions left out because people disagree about them.
    """

    version: str
    by_class: Mapping[str, Rate] = field(default_factory=dict)
    disputed: int = 0

    @property
    def overall(self) -> Rate:
        """All classes together."""
        return Rate(sum(r.bad for r in self.by_class.values()), sum(r.total for r in self.by_class.values()))


@dataclass(frozen=True, slots=True)
class Promise:
    """What was known of the version when it was promoted. `accuracy` on the holdout, None: not recorded; `classes`:
    how many it tells apart."""

    accuracy: float | None
    classes: int


def judge_late(
    current: Labelled,
    previous: Labelled | None,
    promise: Promise,
    limits: ReviewSettings,
    *,
    closed: bool,
    intervals: bool = True,
) -> Verdict:
    """Judge the version in production by the labels of its predictions; `closed`: no more labels are waited for;
    `intervals`: work out confidence sequences too (milliseconds).

    `rollback`: it is worse than the version before it, or, where too little is known of that one, than its holdout
    promised. `continue`: no harm so far; `promote`: none until the end; `inconclusive`: a broken promise that a return
    would not mend, or too few labels. All gates together are held against 1 / alpha by the mean of their evidence
    (Vovk and Wang, Annals of Statistics 2021), one by itself against (number of gates) / alpha.
    """
    gates = _gates(previous, promise)
    before = previous or Labelled("nothing")
    log_threshold = math.log(max(len(gates), 1) / limits.alpha)
    case = _Case(current, before, promise, limits, log_threshold, previous is not None, intervals)
    readings = tuple(_READERS[name](case) for name in gates)
    decision, reasons = _decide(readings, case, closed=closed)
    return Verdict(decision, reasons, readings, _numbers(current, previous, promise))


@dataclass(frozen=True, slots=True)
class _Case:
    """What the gates look at. `returnable`: there is a version before it."""

    current: Labelled
    previous: Labelled
    promise: Promise
    limits: ReviewSettings
    log_threshold: float
    returnable: bool
    intervals: bool

    @property
    def comparable(self) -> bool:
        """Whether both versions have enough labels."""
        return min(self.current.overall.total, self.previous.overall.total) >= self.limits.min_samples

    @property
    def no_return(self) -> str:
        """Why a broken promise is no reason to go back."""
        if not self.returnable:
            return "there is no version before it to return to"
        return f"a return would not help: {self.previous.version} is not shown to be better"

    def reading(
        self, name: str, value: float, limit: float, samples: int, log_evidence: float, words: str, *, enough: bool
    ) -> GateReading:
        """A reading held against the threshold of a single gate."""
        evidence = f"evidence {odds(log_evidence)} against a threshold of {odds(self.log_threshold)}"
        ok = log_evidence < self.log_threshold if enough else None
        return GateReading(name, value, limit, samples, ok, f"{words}; {evidence}", log_evidence, self.log_threshold)


def _gates(previous: Labelled | None, promise: Promise) -> tuple[str, ...]:
    """Known before the first label is: their number sets the threshold."""
    compared = (ACCURACY, CLASS_ACCURACY) if previous is not None else ()
    return compared if promise.accuracy is None else (*compared, PROMISE)


def _overall(case: _Case) -> GateReading:
    ours, theirs, margin = case.current.overall, case.previous.overall, case.limits.accuracy_margin
    words = (
        f"{case.current.version} was wrong in {ours.share:.1%} of {ours.total:,} labelled answers, "
        f"{case.previous.version} before it in {theirs.share:.1%} of {theirs.total:,} ({_allowance(margin)})"
    )
    reading = case.reading(
        ACCURACY,
        ours.share - theirs.share,
        margin,
        ours.total,
        anytime.worse(ours, theirs, margin),
        words,
        enough=case.comparable,
    )
    low, high = anytime.difference_interval(ours, theirs, case.limits.alpha) if case.intervals else (None, None)
    return replace(reading, low=low, high=high)


def _by_class(case: _Case) -> GateReading:
    """The mean over all classes the version tells apart, so that looking at many classes costs nothing more."""
    margin, nobody = case.limits.class_margin, Rate(0, 0)
    pairs = {name: (rate, case.previous.by_class.get(name, nobody)) for name, rate in case.current.by_class.items()}
    logs = {name: anytime.worse(ours, theirs, margin) for name, (ours, theirs) in pairs.items()}
    worst = max(sorted(logs), key=lambda name: (logs[name], pairs[name][0].total), default="no class")
    ours, theirs = pairs.get(worst, (nobody, nobody))
    words = (
        f"of the photos of {worst} {case.current.version} got {ours.share:.1%} of {ours.total:,} wrong, "
        f"{case.previous.version} before it {theirs.share:.1%} of {theirs.total:,} ({_allowance(margin)})"
    )
    return case.reading(
        CLASS_ACCURACY,
        ours.share - theirs.share,
        margin,
        ours.total,
        anytime.mean(list(logs.values()), max(case.promise.classes, len(logs))),
        words,
        enough=case.comparable,
    )


def _promised(case: _Case) -> GateReading:
    """Against the holdout. Where the version before it has labels too, a broken promise alone undoes nothing: the
    field may have become harder for both, and then a return would not help."""
    margin, promised = case.limits.promise_margin, 1.0 - (case.promise.accuracy or 0.0)
    ours, limit = case.current.overall, min(1.0, promised + margin)
    words = (
        f"{case.current.version} was wrong in {ours.share:.1%} of {ours.total:,} labelled answers, on the holdout in "
        f"{promised:.1%} ({100 * margin:g} points more are allowed)"
    )
    reading = case.reading(
        PROMISE,
        ours.share,
        limit,
        ours.total,
        anytime.above(ours, limit),
        words,
        enough=ours.total >= case.limits.min_samples,
    )
    low, high = anytime.rate_interval(ours, case.limits.alpha) if case.intervals else (None, None)
    return replace(reading, low=low, high=high, critical=case.returnable and not case.comparable)


_READERS: Final[Mapping[str, Callable[[_Case], GateReading]]] = {
    ACCURACY: _overall,
    CLASS_ACCURACY: _by_class,
    PROMISE: _promised,
}


def _decide(readings: Sequence[GateReading], case: _Case, *, closed: bool) -> tuple[Decision, tuple[str, ...]]:
    read = [reading for reading in readings if reading.ok is not None]
    if harm := harm_shown([reading for reading in read if reading.critical], len(readings), case.limits.alpha):
        return Decision.rollback, harm
    if doubts := tuple(reading.sentence for reading in read if reading.ok is False):
        return Decision.inconclusive, (*doubts, case.no_return)
    seen, version = case.current.overall.total, case.current.version
    if not read:
        few = f"{seen} labelled answers of {version} are too few to compare ({case.limits.min_samples} are needed)"
        return (Decision.inconclusive if closed else Decision.wait), (few,)
    span = "its whole review" if closed else "its review so far"
    calm = f"{seen:,} labelled answers of {version} show no harm in {span}"
    return (Decision.promote if closed else Decision.wait), (calm,)


def _numbers(current: Labelled, previous: Labelled | None, promise: Promise) -> dict[str, float]:
    named: dict[str, float] = {}
    for who, labelled in (("current", current), ("previous", previous)):
        if labelled is not None:
            rate = labelled.overall
            named |= {f"{who}_labels": rate.total, f"{who}_wrong": rate.bad, f"{who}_disputed": labelled.disputed}
    return named if promise.accuracy is None else named | {"promised_accuracy": promise.accuracy}


def _allowance(margin: float) -> str:
    return f"{100 * margin:g} points more are allowed; other days and other photos, so not a trial"
