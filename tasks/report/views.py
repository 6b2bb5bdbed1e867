"""Turn a judge's verdict into rows of a report. Structural types: judge and report do not know each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tasks.report.model import Bound, GateRow, Unit, VerdictView


class Reading(Protocol):
    """One gate as a judge hands it over."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def limit(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def ok(self) -> bool | None: ...
    @property
    def sentence(self) -> str: ...


class JudgeVerdict(Protocol):
    """A decision, its reasons as sentences, the gates it read and the numbers behind them."""

    @property
    def decision(self) -> str: ...
    @property
    def reasons(self) -> Sequence[str]: ...
    @property
    def readings(self) -> Sequence[Reading]: ...
    @property
    def evidence(self) -> Mapping[str, float]: ...


Shape = tuple[str, Unit, Bound]

_HOLDOUT: Mapping[str, Shape] = {
    "accuracy": ("Accuracy", "share", "at_least"),
    "recall": ("Recall of the weakest class", "share", "at_least"),
    "severity": ("Accuracy in the weakest band of severity", "share", "at_least"),
    "source": ("Accuracy on the weakest source", "share", "at_least"),
    "calibration": ("Calibration error", "share", "at_most"),
    "parity": ("Difference from the trained model", "score", "at_most"),
    "latency": ("Time for one image", "ms", "at_most"),
    "size": ("Size of the model", "bytes", "at_most"),
    "accuracy vs champion": ("Accuracy against the champion", "share", "at_least"),
    "accuracy by chance": ("Accuracy: loss explained by chance", "score", "at_least"),
    "missed disease vs champion": ("Missed disease against the champion", "share", "at_most"),
    "missed disease by chance": ("Missed disease: loss explained by chance", "score", "at_least"),
    "holdout reuse": ("Releases decided on this holdout", "count", "at_most"),
}
_TRAFFIC: Mapping[str, Shape] = {
    "errors": ("Errors", "share", "at_most"),
    "latency": ("Slow answers", "share", "at_most"),
    "disagreement": ("Other answer than the champion", "share", "at_most"),
    "accuracy": ("Wrong answers on probes", "share", "at_most"),
}


def holdout_view(verdict: JudgeVerdict) -> VerdictView:
    """The gate's verdict on the holdout."""
    return _view(verdict, _HOLDOUT)


def traffic_view(verdict: JudgeVerdict) -> VerdictView:
    """The judge's verdict on live or mirrored traffic."""
    return _view(verdict, _TRAFFIC)


def _view(verdict: JudgeVerdict, shapes: Mapping[str, Shape]) -> VerdictView:
    return VerdictView(
        decision=str(verdict.decision),
        reasons=tuple(verdict.reasons),
        gates=tuple(_row(reading, shapes) for reading in verdict.readings),
        evidence=dict(verdict.evidence),
    )


def _row(reading: Reading, shapes: Mapping[str, Shape]) -> GateRow:
    label, unit, bound = shapes.get(reading.name, (reading.name, "score", "at_most"))
    return GateRow(
        gate=label,
        value=reading.value,
        limit=reading.limit,
        ok=reading.ok,
        samples=reading.samples,
        bound=bound,
        unit=unit,
        note=reading.sentence,
    )
