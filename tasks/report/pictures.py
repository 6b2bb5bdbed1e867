"""Pictures for a report: stored ones as data URIs of a bounded size, and curves as PNG for places without SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ml.results import Epoch
from tasks.report import words
from tasks.report.charts import GOES_ON, mood_of, timeline_words
from tasks.report.evidence import Course, evidence_words, odds_ticks, spread
from tasks.report.model import CanaryLook, VersionCounters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Larger pictures are stored again as JPEG, so that twelve of them keep the page below 2 MB.
_MAX_BYTES = 70_000
_MAX_WIDTH_PX = 640
_SIGNATURES = ((b"\x89PNG\r\n", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"))

# The page's light scheme (template report.css).
_CHALLENGER, _CHAMPION, _INK, _GRID = "#1f5fd0", "#b45309", "#4f5b53", "#dfe4e0"
_MOODS = {"good": "#10713f", "bad": "#b42318", "warn": "#8a5a00", "calm": "#4f5b53"}


def find(pictures: Mapping[str, bytes], name: str) -> bytes | None:
    """The picture stored as `name`, or under the same file name in another folder."""
    if name in pictures:
        return pictures[name]
    wanted = PurePosixPath(name).name
    return next((data for key, data in pictures.items() if wanted and PurePosixPath(key).name == wanted), None)


def data_uri(data: bytes | None) -> str | None:
    """A picture as `data:` URI; None for what is no picture. Large ones are shrunk."""
    kind = _kind(data) if data else None
    if data is None or kind is None:
        return None
    if len(data) > _MAX_BYTES:
        data, kind = _shrunk(data, kind)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _kind(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for signature, kind in _SIGNATURES if data.startswith(signature)), None)


def _shrunk(data: bytes, kind: str) -> tuple[bytes, str]:
    """A smaller JPEG; the original where Pillow cannot read it (the browser may) or it would not be smaller."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.thumbnail((_MAX_WIDTH_PX, 4 * _MAX_WIDTH_PX))
            small = io.BytesIO()
            _on_white(image).save(small, "JPEG", quality=84, optimize=True)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return data, kind
    return (small.getvalue(), "jpeg") if small.tell() < len(data) else (data, kind)


def _on_white(image: Any) -> Any:
    from PIL import Image

    if image.mode in {"RGB", "L"}:
        return image
    layer = image.convert("RGBA")
    flat = Image.new("RGB", layer.size, "white")
    flat.paste(layer, mask=layer.getchannel("A"))
    return flat


def curves_png(history: Sequence[Epoch]) -> bytes:
    """Loss and validation accuracy over training time, as PNG."""
    figure, (loss, accuracy) = _figure(1, 2, (9.0, 3.0))
    seconds = [e.elapsed_s for e in history]
    dot = "o" if len(history) < 3 else ""
    loss.plot(
        seconds, [e.train_loss for e in history], dot + "-", color=_CHALLENGER, alpha=0.5, lw=1.2, label="training"
    )
    loss.plot(seconds, [e.val_loss for e in history], dot + "-", color=_CHALLENGER, lw=2, label="validation")
    accuracy.plot(seconds, [100 * e.val_accuracy for e in history], dot + "-", color=_CHALLENGER, lw=2)
    best = words.percent(max((e.val_accuracy for e in history if words.known(e.val_accuracy)), default=None))
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    for axes, title in ((loss, "Loss (nats)"), (accuracy, f"Validation accuracy (%), best {best}")):
        _dress(axes, title, "training time, s")
    return _png(figure)


def timeline_png(looks: Sequence[CanaryLook]) -> bytes:
    """The canary's weight, errors and p99 over time, as PNG."""
    figure, (weight, errors, latency) = _figure(3, 1, (9.0, 6.0), sharex=True)
    seconds = [(look.at - looks[0].at).total_seconds() for look in looks]
    shares = [100 * look.weight for look in looks]
    weight.fill_between(seconds, shares, step="post", color=_CHALLENGER, alpha=0.25, lw=0)
    weight.step(seconds, shares, where="post", color=_CHALLENGER, lw=1.5)
    weight.set_ylim(bottom=0)
    for name, color, side in _sides(looks):
        dot = "o" if len(looks) < 3 else ""
        errors.plot(seconds, [_errors_percent(c) for c in side], dot + "-", color=color, lw=1.8, label=name)
        latency.plot(seconds, [_p99(c) for c in side], dot + "-", color=color, lw=1.8, label=name)
    worst = max((v for _, _, side in _sides(looks) for v in map(_errors_percent, side) if words.known(v)), default=0.0)
    errors.set_ylim(-0.05 * max(worst, 2.0), 1.1 * max(worst, 2.0))
    latency.set_ylim(bottom=0)
    latency.legend(frameon=False, fontsize=8)
    titles = ("Challenger's share of traffic (%)", "Errors so far (%)", "p99 latency (ms)")
    for axes, title in zip((weight, errors, latency), titles, strict=True):
        _mark_decisions(axes, looks, seconds)
        _dress(axes, title, "time since the canary began, s" if axes is latency else "")
    figure.suptitle(timeline_words(looks), fontsize=8, color=_INK)
    return _png(figure)


def evidence_png(found: Course) -> bytes:
    """The evidence for harm over the canary's requests, up to the decision, as PNG."""
    figure, axes = _figure(1, 1, (9.0, 3.6))
    mood = _MOODS[mood_of(found.decision)]
    for trace in found.traces:
        requests, logs = zip((0, 0.0), *trace.points, strict=True)
        loud, style = trace in found.labelled, ":" if trace.dry_run else "-"
        width = 2.4 if trace.decided else 1.4 if loud else 0.8
        color = mood if trace.decided else _INK if loud else _GRID
        axes.plot(requests, logs, style, color=color, lw=width, zorder=3 if trace.decided else 2)
    if found.threshold is not None:
        axes.axhline(found.threshold, color=_INK, lw=1, ls="--")
        told = f" harm is called at {words.odds(found.threshold)}"
        axes.annotate(told, (0, found.threshold), (2, 4), textcoords="offset points", fontsize=8, color=_INK)
    if found.decision not in GOES_ON:
        axes.axvline(found.requests, color=mood, lw=1, ls=":")
        axes.set_title(f"{found.decision} after {found.requests:,} requests", fontsize=9, loc="right", color=mood)
    _dress(axes, "Evidence for harm, as odds", "requests the canary was given, mirrored ones included")
    _name_evidence(axes, found, mood)
    figure.suptitle(evidence_words(found), fontsize=8, color=_INK)
    return _png(figure)


def _name_evidence(axes: Axes, found: Course, mood: str) -> None:
    """Odds on the axis, and the names of lines right of their ends."""
    ticks = odds_ticks(found.top)
    axes.set_yticks(ticks, [f"{math.exp(tick):,.0f}:1" for tick in ticks])
    axes.set_ylim(-0.02 * found.top, found.top)
    axes.set_xlim(0, max(found.requests, 1))
    named = sorted(found.labelled, key=lambda trace: trace.points[-1][1])
    places = spread([trace.points[-1][1] for trace in named], 0.07 * found.top, 0.0, found.top)
    for trace, at in zip(named, places, strict=True):
        color = mood if trace.decided else _INK
        axes.annotate(
            trace.label, (found.requests, at), (6, 0), textcoords="offset points", va="center", fontsize=8, color=color
        )


def _sides(looks: Sequence[CanaryLook]) -> list[tuple[str, str, list[VersionCounters | None]]]:
    sides: list[tuple[str, str, list[VersionCounters | None]]] = []
    if champion := next((look.champion.version for look in looks if look.champion), None):
        sides.append((f"{champion} (champion)", _CHAMPION, [look.champion for look in looks]))
    name = f"{looks[-1].challenger.version} (challenger)"
    return [*sides, (name, _CHALLENGER, [look.challenger for look in looks])]


def _p99(counters: VersionCounters | None) -> float:
    return float("nan") if counters is None or counters.p99_ms is None else counters.p99_ms


def _errors_percent(counters: VersionCounters | None) -> float:
    return 100 * counters.errors / counters.requests if counters and counters.requests else float("nan")


def _mark_decisions(axes: Axes, looks: Sequence[CanaryLook], seconds: Sequence[float]) -> None:
    for at, look in zip(seconds, looks, strict=True):
        if look.decision not in GOES_ON:
            axes.axvline(at, color=_MOODS[mood_of(look.decision)], lw=1, ls=":")


def _figure(rows: int, columns: int, inches: tuple[float, float], *, sharex: bool = False) -> tuple[Figure, Any]:
    """A figure of its own, without pyplot's global state: flows draw from several threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=sharex)


def _dress(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
    axes.set_xlabel(x_label, fontsize=8, color=_INK)
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.tick_params(labelsize=8, colors=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
