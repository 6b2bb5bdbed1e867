"""Probabilities that mean what they say, and a threshold for images unlike the training data. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.errors import GateError

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]
_RANGE = (0.05, 20.0)  # temperatures outside say that the logits, not their scale, are wrong
_STEPS = 60


def softmax(logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Probabilities [N, classes] in double precision."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def temperature(logits: Floats, labels: Labels) -> float:
    """The temperature that minimises the log loss on held-out logits [N, classes] (Guo et al., ICML 2017).

    The loss is convex in b = 1 / temperature: its slope is mean(E[logit] - logit of the label), so bisection on the
    slope's sign in log b finds the one minimum, or the end of the range towards which it lies.

    Raises:
        GateError: a logit is not a finite number.
    """
    if not np.isfinite(logits).all():
        raise GateError(
            "The model gives logits that are no finite numbers. Nothing was exported. Next: train it again."
        )
    low, high = -np.log(_RANGE[1]), -np.log(_RANGE[0])
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        if _slope(logits, labels, float(np.exp(middle))) > 0.0:
            high = middle
        else:
            low = middle
    return float(np.exp(-0.5 * (low + high)))


def _slope(logits: Floats, labels: Labels, b: float) -> float:
    wide = logits.astype(np.float64)
    expected = (softmax(wide, 1.0 / b) * wide).sum(axis=1)
    return float((expected - wide[np.arange(len(labels)), labels]).mean())


def threshold(scores: Floats, accepted_share: float) -> float:
    """The score that `accepted_share` of held-out images do not exceed."""
    return float(np.quantile(scores.astype(np.float64), accepted_share, method="higher"))


def expected_calibration_error(probabilities: Floats, labels: Labels, bins: int = 15) -> float:
    """Mean gap of confidence and accuracy over equal-width bins, weighted by images (Naeini et al., AAAI 2015)."""
    return float(sum(b.share * abs(b.confidence - b.accuracy) for b in reliability(probabilities, labels, bins)))


@dataclass(frozen=True, slots=True)
class Bin:
    """One bar of a reliability diagram: its range, mean confidence, accuracy, and the share of images in it."""

    low: float
    high: float
    confidence: float
    accuracy: float
    share: float


def reliability(probabilities: Floats, labels: Labels, bins: int = 15) -> list[Bin]:
    """The bins that hold images; confidence is the largest probability."""
    top = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == labels
    place = np.minimum((top * bins).astype(int), bins - 1)
    found = []
    for i in range(bins):
        inside = place == i
        if inside.any():
            values = float(top[inside].mean()), float(hit[inside].mean()), float(inside.mean())
            found.append(Bin(i / bins, (i + 1) / bins, *values))
    return found
