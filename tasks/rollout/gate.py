"""The champion's gate: what a challenger must show on the holdout before it meets any traffic. Pure."""

from __future__ import annotations

from configs.areas import GateSettings
from ml.results import Evaluation, ExportResult
from tasks.rollout.policy import Decision, GateReading, Verdict


def gate(challenger: Evaluation, exported: ExportResult, champion: Evaluation | None, limits: GateSettings) -> Verdict:
    """Compare the challenger with fixed floors, and with the champion on the same holdout.

    A champion that was scored on another holdout, or that knows other classes, cannot be compared: then only the floors
    count, and a reason says so.
    """
    readings = [*_floors(challenger, exported, limits)]
    notes: list[str] = []
    if champion is None:
        notes.append("there is no champion to compare it with: only the floors counted")
    elif not comparable(challenger, champion):
        notes.append("the champion knows other classes or saw another holdout: only the floors counted")
    else:
        readings += _against(challenger, champion, limits)
    broken = [reading.sentence for reading in readings if reading.ok is False]
    evidence = {reading.name: reading.value for reading in readings}
    if broken:
        return Verdict(Decision.rollback, tuple(broken), tuple(readings), evidence)
    passed = f"the challenger passed {len(readings)} checks with {challenger.accuracy:.1%} accuracy on the holdout"
    return Verdict(Decision.advance, (passed, *notes), tuple(readings), evidence)


def comparable(challenger: Evaluation, champion: Evaluation) -> bool:
    """Whether both were scored on the same images with the same classes."""
    same_classes = [c.name for c in challenger.classes] == [c.name for c in champion.classes]
    return same_classes and challenger.holdout_hash == champion.holdout_hash


def _floors(challenger: Evaluation, exported: ExportResult, limits: GateSettings) -> list[GateReading]:
    worst = min(challenger.classes, key=lambda c: c.recall)
    return [
        _at_least("accuracy", challenger.accuracy, limits.min_accuracy, challenger.images, "accuracy"),
        _at_least("recall", worst.recall, limits.min_recall, worst.support, f"recall of {worst.name}"),
        _at_most("calibration", challenger.ece_after, limits.max_ece, challenger.images, "calibration error (ECE)"),
        GateReading(
            "latency",
            exported.latency_p50_ms,
            limits.max_latency_ms,
            1,
            exported.latency_p50_ms <= limits.max_latency_ms,
            f"one image takes {exported.latency_p50_ms:.2f} ms; {limits.max_latency_ms:.0f} ms is the limit",
        ),
        GateReading(
            "size",
            float(exported.size_bytes),
            float(limits.max_model_bytes),
            1,
            exported.size_bytes <= limits.max_model_bytes,
            f"the model has {exported.size_bytes:,} bytes; {limits.max_model_bytes:,} is the limit",
        ),
    ]


def _against(challenger: Evaluation, champion: Evaluation, limits: GateSettings) -> list[GateReading]:
    readings = [
        _at_least(
            "accuracy vs champion",
            challenger.accuracy,
            champion.accuracy - limits.accuracy_margin,
            challenger.images,
            f"accuracy (champion {champion.accuracy:.1%})",
        )
    ]
    if challenger.missed_disease_rate is not None and champion.missed_disease_rate is not None:
        readings.append(
            _at_most(
                "missed disease vs champion",
                challenger.missed_disease_rate,
                min(1.0, champion.missed_disease_rate + limits.missed_disease_margin),
                challenger.images,
                f"missed-disease rate (champion {champion.missed_disease_rate:.1%})",
            )
        )
    return readings


def _at_least(name: str, value: float, limit: float, samples: int, what: str) -> GateReading:
    sentence = f"{what} is {value:.1%}; at least {limit:.1%} is asked for"
    return GateReading(name, value, limit, samples, value >= limit, sentence)


def _at_most(name: str, value: float, limit: float, samples: int, what: str) -> GateReading:
    sentence = f"{what} is {value:.1%}; at most {limit:.1%} is allowed"
    return GateReading(name, value, limit, samples, value <= limit, sentence)
