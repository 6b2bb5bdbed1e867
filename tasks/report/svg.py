"""Small pure functions that draw charts as inline SVG. Colours come from the page's CSS, so both schemes work.

Coordinates are in user units of the chart's viewBox; a chart is as wide as its box and keeps its proportions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float | None]
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to coordinates in [start, end]; `log` by decades (values must be positive then)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of `value`, clamped to the scale's ends."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area inside a chart of `width` x `height`."""

    width: float
    height: float
    left: float = 46.0
    right: float = 12.0
    top: float = 14.0
    bottom: float = 26.0

    @property
    def x_end(self) -> float:
        """Right edge of the plotting area."""
        return self.width - self.right

    @property
    def y_end(self) -> float:
        """Bottom edge of the plotting area."""
        return self.height - self.bottom


def num(value: float) -> str:
    """A coordinate with one decimal, without a trailing `.0`."""
    return f"{value:.1f}".removesuffix(".0")


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover [low, high] in about `wanted` steps (1, 2, 2.5 or 5 times a power of ten)."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(1, wanted)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(s * magnitude for s in _STEPS if s * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def decade_ticks(low: float, high: float) -> list[float]:
    """1, 10, 100, ... around [low, high]; with 3 and 30 between where that spans less than two decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = [10.0**k for k in range(first, max(last, first + 1) + 1)]
    if len(decades) > 3:
        return decades
    dense = sorted(decades + [3 * d for d in decades[:-1]])
    lower = max((t for t in dense if t <= low), default=dense[0])
    upper = min((t for t in dense if t >= high and t > lower), default=dense[-1])
    return [t for t in dense if lower <= t <= upper]


def text(x: float, y: float, content: str, kind: str = "t", anchor: str = "start") -> Markup:
    """One line of text; `kind` is a CSS class."""
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        num(x), num(y), kind, anchor, escape(content)
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(num(x1), num(y1), num(x2), num(y2), kind)


def circle(x: float, y: float, radius: float, kind: str) -> Markup:
    """A filled dot."""
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}"/>').format(num(x), num(y), num(radius), kind)


def path(points: Sequence[Point], x: Scale, y: Scale, kind: str) -> Markup:
    """A polyline with gaps where a value is missing; a point between two gaps becomes a dot."""
    runs = _runs(points)
    if not runs:
        return Markup("")
    commands = "".join(_run_path(run, x, y) for run in runs)
    return Markup('<path d="{}" class="{}"/>').format(commands, kind)


def _run_path(run: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    if len(run) == 1:  # a zero-length segment with round caps shows as a dot
        at = f"{num(x(run[0][0]))} {num(y(run[0][1]))}"
        return f"M{at}L{at}"
    return "M" + "L".join(f"{num(x(a))} {num(y(b))}" for a, b in run)


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((at, value))
    return [run for run in runs if run]


def step_area(points: Sequence[tuple[float, float]], until: float, x: Scale, y: Scale, kind: str) -> Markup:
    """A filled area under a value that holds until the next point, closed at `until`."""
    if not points:
        return Markup("")
    commands = [f"M{num(x(points[0][0]))} {num(y(0))}V{num(y(points[0][1]))}"]
    commands += [f"H{num(x(at))}V{num(y(value))}" for at, value in points[1:]]
    commands.append(f"H{num(x(until))}V{num(y(0))}Z")
    return Markup('<path d="{}" class="{}"/>').format("".join(commands), kind)


def y_axis(frame: Frame, scale: Scale, ticks: Sequence[float], labels: Sequence[str]) -> Markup:
    """Horizontal grid lines with their labels on the left."""
    parts = []
    for tick, label in zip(ticks, labels, strict=True):
        at = scale(tick)
        parts.append(line(frame.left, at, frame.x_end, at, "grid"))
        parts.append(text(frame.left - 7, at + 4, label, "t", "end"))
    return Markup("").join(parts)


def x_axis(frame: Frame, scale: Scale, ticks: Sequence[float], labels: Sequence[str]) -> Markup:
    """Labels under the plotting area; the outer ones turn inwards so that none is cut."""
    parts = [line(frame.left, frame.y_end, frame.x_end, frame.y_end, "axis")]
    for tick, label in zip(ticks, labels, strict=True):
        at = scale(tick)
        anchor = "end" if at > frame.x_end - 14 else "middle"
        parts.append(line(at, frame.y_end, at, frame.y_end + 4, "axis"))
        parts.append(text(at, frame.y_end + 18, label, "t", anchor))
    return Markup("").join(parts)


def chart(width: float, height: float, label: str, body: Markup, kind: str = "chart") -> Markup:
    """The SVG element around a chart. `label` says in words what the chart shows."""
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        kind, num(width), num(height), label, body
    )
