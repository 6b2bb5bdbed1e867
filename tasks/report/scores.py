"""An evaluation as the page shows it: rows per class and severity, the confusion matrix, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ml.results import ClassScore, Evaluation, Mistake
from tasks.report import words
from tasks.report.charts import bar_row, dot_row
from tasks.report.pictures import data_uri, find

# Beyond this many classes the matrix names its columns by number and prints no zeros.
_DENSE_ABOVE = 12
_STRONGEST_MIX = 46  # percent of colour in a cell, so that text on it keeps its contrast in both schemes


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Recall of one class with its interval, drawn in `dots`."""

    name: str
    support: int
    recall: str
    interval: str
    champion: str
    precision: str
    dots: Markup


def recall_floor(ours: Evaluation, theirs: Evaluation | None) -> float:
    """Where the recall axis begins: the round number below everything drawn, at most .8."""
    drawn = [v for c in ours.classes for v in (c.recall, c.recall_low)]
    drawn += [c.recall for c in theirs.classes] if theirs else []
    return _round_floor(drawn)


def severity_floor(ours: Evaluation, theirs: Evaluation | None) -> float:
    """Where the axis of accuracy by severity begins."""
    bands = [*ours.by_severity, *(theirs.by_severity if theirs else ())]
    return _round_floor([s.accuracy for s in bands if s.images])


def _round_floor(drawn: Sequence[float]) -> float:
    lowest = min((v for v in drawn if math.isfinite(v)), default=0.0)
    return max(0.0, min(0.8, math.floor(lowest * 5) / 5))


def class_rows(ours: Evaluation, theirs: Evaluation | None) -> list[ClassRow]:
    """One row a class, the weakest recall first."""
    floor = recall_floor(ours, theirs)
    before = {c.name: c.recall for c in theirs.classes} if theirs else {}
    ordered = sorted(ours.classes, key=lambda c: (c.recall if math.isfinite(c.recall) else 2.0, c.name))
    return [
        ClassRow(
            c.name,
            c.support,
            words.percent(c.recall),
            _interval(c),
            words.percent(before.get(c.name)),
            words.percent(c.precision),
            dot_row(c.recall, c.recall_low, c.recall_high, before.get(c.name), floor),
        )
        for c in ordered
    ]


def _interval(score: ClassScore) -> str:
    if not (words.known(score.recall_low) and words.known(score.recall_high)):
        return words.DASH
    return f"{words.percent(score.recall_low)} to {words.percent(score.recall_high)}"


def axis_labels(floor: float) -> list[str]:
    """Five labels from `floor` to 100 %."""
    return [f"{100 * (floor + (1 - floor) * k / 4):.0f} %" for k in range(5)]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: `mix` percent of colour, `right` on the diagonal."""

    count: str
    mix: int
    right: bool
    title: str


@dataclass(frozen=True, slots=True)
class Confusion:
    """The matrix, row by row as (number, class, cells), and its most frequent confusions in words."""

    heads: tuple[str, ...]
    rows: tuple[tuple[int, str, tuple[Cell, ...]], ...]
    dense: bool
    worst: tuple[str, ...]


def confusion(evaluation: Evaluation) -> Confusion | None:
    """The confusion matrix; None where there is none."""
    names = [c.name for c in evaluation.classes]
    matrix = evaluation.confusion
    if not matrix or len(matrix) != len(names):
        return None
    dense = len(names) > _DENSE_ABOVE
    heads = tuple(str(i + 1) for i in range(len(names))) if dense else tuple(names)
    rows = tuple((i + 1, names[i], _cells(row, i, names, dense)) for i, row in enumerate(matrix))
    return Confusion(heads, rows, dense, tuple(_worst(matrix, names)))


def _cells(row: Sequence[int], actual: int, names: Sequence[str], dense: bool) -> tuple[Cell, ...]:
    total = sum(row)
    cells = []
    for predicted, images in enumerate(row):
        share = images / total if total else 0.0
        mix = 0 if not images else max(6, round(_STRONGEST_MIX * math.sqrt(share)))
        title = f"{names[actual]} taken for {names[predicted]}: {images} of {total}"
        cells.append(Cell("" if dense and not images else f"{images}", mix, predicted == actual, title))
    return tuple(cells)


def _worst(matrix: Sequence[Sequence[int]], names: Sequence[str], most: int = 5) -> list[str]:
    wrong = [(images, i, j) for i, row in enumerate(matrix) for j, images in enumerate(row) if i != j and images]
    wrong.sort(key=lambda item: (-item[0], item[1], item[2]))
    return [
        f"{names[i]} taken for {names[j]}: {images} of {sum(matrix[i])} ({words.percent(images / sum(matrix[i]))})"
        for images, i, j in wrong[:most]
    ]


@dataclass(frozen=True, slots=True)
class SeverityRow:
    """Accuracy of the diseased images in one band of severity."""

    band: str
    images: int
    accuracy: str
    champion: str
    dots: Markup


def severity_rows(ours: Evaluation, theirs: Evaluation | None) -> list[SeverityRow]:
    """One row a band, the mildest first."""
    before = {(s.low, s.high): s.accuracy for s in theirs.by_severity} if theirs else {}
    floor = severity_floor(ours, theirs)
    return [
        SeverityRow(
            f"{words.percent(s.low, 0)} to {words.percent(s.high, 0)}",
            s.images,
            words.percent(s.accuracy if s.images else None),
            words.percent(before.get((s.low, s.high))),
            dot_row(s.accuracy if s.images else None, None, None, before.get((s.low, s.high)), floor),
        )
        for s in ours.by_severity
    ]


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """Calibration error (ECE), as a bar on an axis that ends at the larger of the two."""

    label: str
    value: str
    bar: Markup


def calibration_rows(evaluation: Evaluation) -> list[CalibrationRow]:
    """ECE before and after temperature scaling."""
    pair = (("before scaling", evaluation.ece_before), ("after scaling", evaluation.ece_after))
    top = max([v for _, v in pair if math.isfinite(v)] + [1e-9])
    return [CalibrationRow(label, words.percent(value, 2), bar_row(value / top)) for label, value in pair]


@dataclass(frozen=True, slots=True)
class MistakeCard:
    """One mistake with its picture (None where it was not kept)."""

    label: str
    predicted: str
    probability: str
    name: str
    picture: str | None


def mistake_cards(mistakes: Sequence[Mistake], pictures: dict[str, bytes]) -> list[MistakeCard]:
    """The worst mistakes, in their order."""
    return [
        MistakeCard(
            m.label,
            m.predicted,
            words.percent(m.probability),
            m.path.rsplit("/", 1)[-1],
            data_uri(find(pictures, m.picture)),
        )
        for m in mistakes
    ]


def named_picture(evaluation: Evaluation, pictures: dict[str, bytes], part: str) -> str | None:
    """The first of the evaluation's pictures whose name contains `part`, as data URI."""
    name = next((name for name in evaluation.pictures if part in name.lower()), None)
    return data_uri(find(pictures, name)) if name else None
