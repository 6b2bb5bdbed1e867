"""The champion's gate: what a challenger must show on the holdout before it meets any traffic. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.areas import GateSettings
from ml.results import Evaluation, ExportResult
from tasks.rollout.paired import Comparison, Pairs, compare
from tasks.rollout.verdict import Decision, GateReading, Verdict

_LISTED = 3  # slices named in one sentence


def gate(
    challenger: Evaluation,
    exported: ExportResult,
    champion: Evaluation | None,
    limits: GateSettings,
    *,
    pairs: Pairs | None = None,
    holdout_uses: int = 1,
) -> Verdict:
    """Compare the challenger with fixed floors, and with the champion image by image.

    A champion that was scored on another holdout, or that knows other classes, cannot be compared: then only the floors
    count, and a reason says so. `holdout_uses`: releases that this holdout has decided, this one included; too many are
    a warning, never a refusal.

    Raises:
        ValueError: a comparable champion came without `pairs`.
    """
    readings = [*_floors(challenger, exported, limits)]
    notes: list[str] = []
    if champion is None:
        notes.append("there is no champion to compare it with: only the floors counted")
    elif not comparable(challenger, champion):
        notes.append("the champion knows other classes or saw another holdout: only the floors counted")
    elif pairs is None:
        raise ValueError("a champion on the same holdout is compared image by image: pairs are needed")
    else:
        readings += against_champion(pairs, limits)
    wear = _wear(holdout_uses, limits.max_holdout_uses)
    readings.append(wear)
    if wear.value > wear.limit:
        notes.append(wear.sentence)
    return _verdict(challenger, readings, notes)


def comparable(challenger: Evaluation, champion: Evaluation) -> bool:
    """Whether both were scored on the same images with the same classes."""
    same_classes = [c.name for c in challenger.classes] == [c.name for c in champion.classes]
    return same_classes and challenger.holdout_hash == champion.holdout_hash


def _verdict(challenger: Evaluation, readings: Sequence[GateReading], notes: Sequence[str]) -> Verdict:
    broken = [reading.sentence for reading in readings if reading.ok is False]
    evidence = {reading.name: reading.value for reading in readings}
    if broken:
        return Verdict(Decision.rollback, (*broken, *notes), tuple(readings), evidence)
    judged = sum(reading.ok is True for reading in readings)
    passed = f"the challenger passed {judged} checks with {challenger.accuracy:.1%} accuracy on the holdout"
    return Verdict(Decision.advance, (passed, *notes), tuple(readings), evidence)


# Floors ---------------------------------------------------------------------------------------------------------------


def _floors(challenger: Evaluation, exported: ExportResult, limits: GateSettings) -> list[GateReading]:
    floor = limits.min_accuracy
    sentence = f"accuracy is {challenger.accuracy:.1%}; at least {floor:.1%} is asked for"
    accuracy = GateReading(
        "accuracy", challenger.accuracy, floor, challenger.images, challenger.accuracy >= floor, sentence,
        low=challenger.accuracy_low, high=challenger.accuracy_high,
    )  # fmt: skip
    return [accuracy, *_slice_floors(challenger, limits), *_limits(challenger, exported, limits)]


@dataclass(frozen=True, slots=True)
class _Slice:
    """Part of the holdout and the share of right answers in it."""

    name: str
    images: int
    share: float

    def __str__(self) -> str:
        return f"{self.name} {self.share:.1%} of {self.images:,}"


def _slice_floors(challenger: Evaluation, limits: GateSettings) -> list[GateReading]:
    classes = [_Slice(c.name, c.support, c.recall) for c in challenger.classes]
    bands = [_Slice(f"{s.low:.0%} to {s.high:.0%}", s.images, s.accuracy) for s in challenger.by_severity]
    sources = [_Slice(s.name, s.images, s.accuracy) for s in challenger.by_source]
    wanted = (
        ("recall", "recall by class", classes, limits.min_recall),
        ("severity", "accuracy by severity", bands, limits.min_slice_accuracy),
        ("source", "accuracy by source", sources, limits.min_slice_accuracy),
    )
    return [
        _slice_floor(name, what, slices, floor, limits.min_slice_images)
        for name, what, slices, floor in wanted
        if slices
    ]


def _slice_floor(name: str, what: str, slices: Sequence[_Slice], floor: float, min_images: int) -> GateReading:
    """The weakest slice that has enough images to be judged; without one, the weakest of all, not judged."""
    ordered = sorted(slices, key=lambda s: s.share)
    judged = [s for s in ordered if s.images >= min_images]
    small = [s for s in ordered if s.images < min_images]
    if not judged:
        sentence = f"{what}: nothing has the {min_images} images needed to be judged (lowest: {_listed(small)})"
        return GateReading(name, small[0].share, floor, small[0].images, None, sentence)
    worst, below = judged[0], [s for s in judged if s.share < floor]
    sentence = f"{what}: {_listed(below or [worst])}; at least {floor:.1%} is asked for"
    if small:
        sentence += f"; not judged for lack of images: {_listed(small)}"
    return GateReading(name, worst.share, floor, worst.images, not below, sentence)


def _listed(slices: Sequence[_Slice]) -> str:
    named = ", ".join(str(s) for s in slices[:_LISTED])
    return f"{named} and {len(slices) - _LISTED} more" if len(slices) > _LISTED else named


def _limits(challenger: Evaluation, exported: ExportResult, limits: GateSettings) -> list[GateReading]:
    ece, took, size = challenger.ece_after, challenger.latency_p50_ms, exported.size_bytes
    return [
        GateReading(
            "calibration", ece, limits.max_ece, challenger.images, ece <= limits.max_ece,
            f"calibration error (ECE) is {ece:.1%}; at most {limits.max_ece:.1%} is allowed",
        ),
        _parity(exported, limits.max_parity_diff),
        GateReading(
            "latency", took, limits.max_latency_ms, 1, took <= limits.max_latency_ms,
            f"one image takes {took:.2f} ms on this machine; {limits.max_latency_ms:.0f} ms is the limit",
        ),
        GateReading(
            "size", float(size), float(limits.max_model_bytes), 1, size <= limits.max_model_bytes,
            f"the model has {size:,} bytes; {limits.max_model_bytes:,} is the limit",
        ),
    ]  # fmt: skip


def _parity(exported: ExportResult, limit: float) -> GateReading:
    diff, same = exported.parity_max_abs_diff, exported.parity_argmax_equal
    sentence = (
        f"on {exported.parity_images:,} images the exported file and the trained model name "
        f"{'the same classes' if same else 'different classes'}; their probabilities differ by {diff:.1e} at most, "
        f"{limit:.1e} is allowed"
    )
    return GateReading("parity", diff, limit, exported.parity_images, same and diff <= limit, sentence)


def _wear(uses: int, limit: int) -> GateReading:
    sentence = f"this holdout has decided {uses:,} release{'' if uses == 1 else 's'}, this one included"
    if uses > limit:
        sentence = (
            f"warning: {sentence}, more than the {limit} it is good for: its scores grow optimistic "
            "(next: add new photos, or import with another data.split_seed)"
        )
    return GateReading("holdout reuse", float(uses), float(limit), uses, True, sentence)


# Against the champion -------------------------------------------------------------------------------------------------


def against_champion(pairs: Pairs, limits: GateSettings) -> list[GateReading]:
    """Readings of both models' answers to the same images: accuracy, and diseases taken for healthy.

    Under `not_shown_worse` (the default) a challenger fails when it loses more than the margin, or when any loss is
    proven: the margin covers what chance takes on a small holdout, the test stops a row of small real losses. Under
    `shown_not_worse` it must prove that it loses less than the margin (non-inferiority, on the 95 % interval).
    """
    accuracy = compare(pairs.challenger_right, pairs.champion_right, pairs.group)
    readings = _judge_paired(_ACCURACY, accuracy, limits.accuracy_margin, limits)
    sick = pairs.diseased
    if sick.any():
        caught = compare(pairs.challenger_caught[sick], pairs.champion_caught[sick], pairs.group[sick])
        readings += _judge_paired(_MISSED, caught, limits.missed_disease_margin, limits)
    return readings


@dataclass(frozen=True, slots=True)
class _Measure:
    """How a comparison is told: as a rate of right answers (`sign` 1) or of wrong ones (-1)."""

    name: str
    images: str
    sign: int

    def rate(self, found: Comparison, difference: float) -> float:
        """The rate of a challenger whose share of right answers differs by `difference` from the champion's."""
        right = min(1.0, max(0.0, found.champion_share + difference))
        return right if self.sign > 0 else 1.0 - right


_ACCURACY = _Measure("accuracy", "images", 1)
_MISSED = _Measure("missed disease", "diseased images", -1)


def _judge_paired(measure: _Measure, found: Comparison, margin: float, limits: GateSettings) -> list[GateReading]:
    must_show = limits.comparison == "shown_not_worse"
    judged = found.low if must_show else found.difference
    sentence = f"{_told(measure, found)}; a loss of {100 * margin:.1f} points is allowed"
    if must_show:
        sentence += f", and {100 * max(0.0, -judged):.1f} cannot be ruled out"
    ends = sorted((measure.rate(found, found.low), measure.rate(found, found.high)))
    kept = GateReading(
        f"{measure.name} vs champion", measure.rate(found, judged), measure.rate(found, -margin), found.images,
        judged >= -margin, sentence, low=ends[0], high=ends[1], reference=measure.rate(found, 0.0),
    )  # fmt: skip
    return [kept] if must_show else [kept, _chance(measure.name, found, limits.significance)]


def _chance(name: str, found: Comparison, significance: float) -> GateReading:
    kept = found.p_worse >= significance
    verb = "explains" if kept else "does not explain"
    sentence = f"{name}: chance {verb} what it lost (McNemar p = {_p(found.p_worse)} one-sided, limit {significance:g})"
    differing = found.lost + found.won
    return GateReading(f"{name} by chance", found.p_worse, significance, differing, kept, sentence)


def _told(measure: _Measure, found: Comparison) -> str:
    """What happened image by image, in the measure's own sign."""
    ours, theirs = measure.rate(found, found.difference), measure.rate(found, 0.0)
    low, high = sorted((measure.sign * found.low, measure.sign * found.high))
    return (
        f"{measure.name} {ours:.1%} against the champion's {theirs:.1%}: lost {found.lost:,} and won {found.won:,} of "
        f"{found.images:,} {measure.images}; difference {_signed(measure.sign * found.difference)} points "
        f"(95 % {_signed(low)} to {_signed(high)}), McNemar p = {_p(found.p_differs)}"
    )


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0" if text[1:] == "0.0" else text


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
