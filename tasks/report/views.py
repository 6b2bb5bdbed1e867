"""Turn a judge's verdict into rows of a report. Structural types: judge and report do not know each other."""

from __future__ import annotations

import math
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
    @property
    def log_evidence(self) -> float | None: ...
    @property
    def log_threshold(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def critical(self) -> bool: ...
    @property
    def dry_run(self) -> bool: ...
    @property
    def reference(self) -> float | None: ...


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
_MOST_LOG = 700.0  # exp of more does not fit into a float

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
    "shadow errors": ("Shadow errors", "share", "at_most"),
    "shadow slow": ("Shadow slow answers", "share", "at_most"),
    "disagreement": ("Disagreement", "share", "at_most"),
    "class disagreement": ("Class disagreement", "share", "at_most"),
    "errors": ("Errors", "share", "at_most"),
    "slow": ("Slow answers", "share", "at_most"),
    "latency": ("Slow answers", "share", "at_most"),  # its name in older records
    "tail latency": ("Tail latency", "ms", "at_most"),
    "ood": ("Not a leaf", "share", "at_most"),
    "class mix": ("Class mix", "share", "at_most"),
    "accuracy": ("Wrong answers", "share", "at_most"),
}


def holdout_view(verdict: JudgeVerdict) -> VerdictView:
    """The gate's verdict on the holdout."""
    return _view(verdict, _HOLDOUT)


def traffic_view(verdict: JudgeVerdict) -> VerdictView:
    """The judge's verdict on live or mirrored traffic."""
    return _view(verdict, _TRAFFIC)


def evidence_by_gate(logs: Mapping[str, float | None]) -> dict[str, float | None]:
    """Evidence on traffic by the names that people read."""
    return {_TRAFFIC[name][0] if name in _TRAFFIC else name: _log(log) for name, log in logs.items()}


def _log(evidence: float | None) -> float | None:
    """Evidence without end stays large; none at all, or none that can be told, is None."""
    return _finite(evidence if evidence is None else min(evidence, _MOST_LOG))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


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
        champion=reading.reference,
        note=reading.sentence,
        log_evidence=_log(reading.log_evidence),
        log_threshold=_finite(reading.log_threshold),
        low=_finite(reading.low),
        high=_finite(reading.high),
        critical=reading.critical,
        dry_run=reading.dry_run,
    )
