"""Scores of a classifier on labelled images, with their uncertainty. Pure functions of numpy arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ml.results import ClassScore, SeverityScore, SourceScore

Labels = npt.NDArray[np.int64]
Confusion = npt.NDArray[np.int64]
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
SEVERITY_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
UNSORTED = "no folder of its own"
_MOST_SOURCES = 50  # a folder for every plant would make a record of thousands of slices too small to judge


def wilson(hits: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, JASA 1927); (0, 1) where nothing was seen."""
    if total == 0:
        return 0.0, 1.0
    share, slack = hits / total, z * z / total
    centre = (share + slack / 2) / (1 + slack)
    half = z * math.sqrt(share * (1 - share) / total + slack / (4 * total)) / (1 + slack)
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(labels: Labels, predicted: Labels, classes: int) -> Confusion:
    """Counts [classes, classes]: row is the true class, column the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def per_class(matrix: Confusion, names: Sequence[str]) -> tuple[ClassScore, ...]:
    """Recall with its interval, precision and F1 of each class; 0 where nothing was there or predicted."""
    return tuple(_class_score(matrix, i, name) for i, name in enumerate(names))


def _class_score(matrix: Confusion, i: int, name: str) -> ClassScore:
    hits, support, predicted = int(matrix[i, i]), int(matrix[i].sum()), int(matrix[:, i].sum())
    low, high = wilson(hits, support)
    precision_low, precision_high = wilson(hits, predicted)
    return ClassScore(
        name=name, support=support, recall=hits / max(support, 1), recall_low=low, recall_high=high,
        precision=hits / max(predicted, 1), precision_low=precision_low, precision_high=precision_high,
        f1=2 * hits / max(support + predicted, 1),
    )  # fmt: skip


def macro_f1(scores: Sequence[ClassScore]) -> float:
    """Mean F1 of the classes that occur in the split."""
    seen = [s.f1 for s in scores if s.support]
    return float(np.mean(seen)) if seen else 0.0


def missed_disease(matrix: Confusion, names: Sequence[str], healthy: Sequence[str]) -> tuple[int, int] | None:
    """(diseased images taken for healthy, diseased images); None where no class is healthy or none is diseased."""
    well = np.array([name in healthy for name in names])
    diseased = int(matrix[~well].sum())
    return (int(matrix[~well][:, well].sum()), diseased) if well.any() and diseased else None


def by_severity(severity: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> tuple[SeverityScore, ...]:
    """Accuracy of images with a known severity (NaN: unknown), in fifths. The last bin includes 1."""
    scores = []
    for low, high in itertools.pairwise(SEVERITY_EDGES):
        inside = (severity >= low) & ((severity < high) | (high == SEVERITY_EDGES[-1]) & (severity <= high))
        if inside.any():
            score = SeverityScore(low=low, high=high, images=int(inside.sum()), accuracy=float(correct[inside].mean()))
            scores.append(score)
    return tuple(scores)


def by_source(files: Sequence[str], correct: npt.NDArray[np.bool_]) -> tuple[SourceScore, ...]:
    """Accuracy per source, largest first, at most 50; empty where the photos lie directly in their class folders.

    `files` are names relative to the imported folder: in `rust/farm_a/1.jpg` the source is `farm_a`.
    """
    parts = [name.split("/") for name in files]
    sources = np.array([p[1] if len(p) > 2 else UNSORTED for p in parts], dtype=object)
    names, index, images = np.unique(sources, return_inverse=True, return_counts=True)
    if names.tolist() == [UNSORTED]:
        return ()
    hits = np.bincount(index, weights=correct)
    order = sorted(range(len(names)), key=lambda i: (-images[i], names[i]))[:_MOST_SOURCES]
    return tuple(SourceScore(name=names[i], images=int(images[i]), accuracy=float(hits[i] / images[i])) for i in order)
