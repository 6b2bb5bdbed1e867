"""Pictures of a training and of an evaluation, as PNG files. No display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml.results import Epoch

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
