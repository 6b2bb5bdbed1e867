"""Pictures of a training and of an evaluation, as PNG files. No display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ml.calibration import Bin
from ml.results import ClassScore, Epoch

_DPI = 130
_BLUE, _ORANGE, _GREY, _RED = "#2364aa", "#e07a1f", "#8a8f98", "#b3261e"


def _figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """An empty figure and its axes, drawn by the Agg canvas: safe in threads and without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**options)


def _save(figure: Any, path: Path) -> Path:
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=_DPI, format="png")
    return partial.replace(path)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def curves(history: Sequence[Epoch], path: Path) -> Path:
    """Losses, validation accuracy and learning rate over the seconds of training."""
    figure, (left, right) = _figure(9.5, 3.6, ncols=2)
    seconds = [e.elapsed_s for e in history]
    left.plot(seconds, [e.train_loss for e in history], color=_GREY, label="training")
    left.plot(seconds, [e.val_loss for e in history], color=_BLUE, label="validation")
    left.set(xlabel="seconds of training", ylabel="cross-entropy (nats)", title="Loss")
    left.legend(frameon=False)
    accuracy = [100 * e.val_accuracy for e in history]
    right.plot(seconds, accuracy, color=_BLUE)
    top = max(range(len(accuracy)), key=accuracy.__getitem__)
    right.plot(seconds[top], accuracy[top], "o", color=_ORANGE)
    right.set(xlabel="seconds of training", ylabel="%", title=f"Validation accuracy, best {accuracy[top]:.1f} %")
    for axes in (left, right):
        _plain(axes)
    return _save(figure, path)


def confusion(matrix: npt.NDArray[np.int64], names: Sequence[str], path: Path) -> Path:
    """Counts by true and predicted class; colour is the share of the row, so that rare classes show."""
    n = len(names)
    side = 3.2 + 0.62 * n
    figure, axes = _figure(side + 0.6, side)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(n, n):
        if matrix[i, j]:
            wrong = i != j
            colour = "white" if shares[i, j] > 0.5 else (_RED if wrong else "black")
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=colour, fontsize=9)
    short = short_names(names)
    axes.set_xticks(range(n), short, rotation=40, ha="right")
    axes.set_yticks(range(n), short)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion (images)")
    return _save(figure, path)


def recall(scores: Sequence[ClassScore], path: Path) -> Path:
    """Recall of each class with its 95 % interval."""
    figure, axes = _figure(7.5, 1.2 + 0.42 * len(scores))
    y = np.arange(len(scores))[::-1]
    values = np.array([100 * s.recall for s in scores])
    low = values - [100 * s.recall_low for s in scores]
    high = np.array([100 * s.recall_high for s in scores]) - values
    axes.barh(y, values, color="#bcd3ea", height=0.62)
    axes.errorbar(values, y, xerr=np.maximum([low, high], 0), fmt="o", color=_BLUE, capsize=3, markersize=4)
    labels = short_names([s.name for s in scores])
    axes.set_yticks(y, [f"{name} ({s.support})" for name, s in zip(labels, scores, strict=True)])
    axes.set(xlim=(0, 101), xlabel="recall in %, with 95 % interval", title="Recall by class (images)")
    _plain(axes)
    return _save(figure, path)


def reliability(before: Sequence[Bin], after: Sequence[Bin], eces: tuple[float, float], path: Path) -> Path:
    """Accuracy against confidence, before and after temperature scaling, and how many images each bin holds."""
    figure, (top, bottom) = _figure(5.6, 6.2, nrows=2, height_ratios=(3, 1), sharex=True)
    top.plot((0, 1), (0, 1), color=_GREY, linestyle="--", linewidth=1, label="perfect")
    for bins, ece, colour, label in ((before, eces[0], _ORANGE, "logits"), (after, eces[1], _BLUE, "calibrated")):
        points = [b.confidence for b in bins], [b.accuracy for b in bins]
        top.plot(*points, "o-", color=colour, markersize=4, label=f"{label}, ECE {ece:.3f}")
        middles, width = [(b.low + b.high) / 2 for b in bins], 0.9 * (bins[0].high - bins[0].low) if bins else 0.05
        if colour == _BLUE:
            bottom.bar(middles, [100 * b.share for b in bins], width=width, color="#bcd3ea")
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", title="Reliability")
    top.legend(frameon=False, loc="lower right")
    bottom.set(xlabel="confidence (largest probability)", ylabel="% of images")
    for axes in (top, bottom):
        _plain(axes)
    return _save(figure, path)


def mistake(image: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32], lines: Sequence[str], path: Path) -> Path:
    """The photo beside the places its prediction rests on."""
    figure, axes = _figure(6.2, 3.6, ncols=2)
    _show_mistake(axes[0], axes[1], image, heat)
    figure.suptitle("\n".join(lines), fontsize=9)
    return _save(figure, path)


def contact_sheet(
    items: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], Sequence[str]]], path: Path
) -> Path:
    """All mistakes on one sheet, three pairs a row."""
    rows = max(1, -(-len(items) // 3))
    figure, axes = _figure(13.5, 2.9 * rows, nrows=rows, ncols=6, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for k, (image, heat, lines) in enumerate(items):
        left, right = axes[k // 3, 2 * (k % 3)], axes[k // 3, 2 * (k % 3) + 1]
        _show_mistake(left, right, image, heat)
        left.set_title("\n".join(lines), fontsize=8, loc="left")
    figure.suptitle("Most confident mistakes; red: what the wrong answer rests on, blue: what speaks against it")
    return _save(figure, path)


def _show_mistake(left: Any, right: Any, image: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> None:
    reach = max(float(np.abs(heat).max()), 1e-6)
    grey = image.mean(axis=2)
    left.imshow(image)
    right.imshow(grey, cmap="gray", vmin=-60, vmax=255)
    right.imshow(heat, cmap="RdBu_r", vmin=-reach, vmax=reach, alpha=0.55)
    for axes in (left, right):
        axes.axis("off")


def short_names(names: Sequence[str]) -> list[str]:
    """Class names as people read them: without a common `Crop___` prefix, spaces for underscores."""
    heads = {name.partition("___")[0] for name in names if "___" in name}
    shared = len(heads) == 1 and all("___" in name for name in names)
    return [(name.partition("___")[2] if shared else name.replace("___", ": ")).replace("_", " ") for name in names]
