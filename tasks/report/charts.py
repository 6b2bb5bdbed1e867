"""The charts of a release: training curves, the canary's timeline, and the bars and dots that stand in tables.

Colour means the same everywhere: `challenger` and `champion` are CSS classes of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ml.results import Epoch
from tasks.report import words
from tasks.report.model import CanaryLook, StageLine, TimelineEvent, VersionCounters
from tasks.report.svg import (
    Frame,
    Point,
    Scale,
    chart,
    decade_ticks,
    line,
    nice_ticks,
    path,
    step_area,
    text,
    x_axis,
    y_axis,
)

_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
# Beyond this ratio a linear axis hides the smaller latency.
_LOG_ABOVE = 12.0
GOES_ON = frozenset({"continue", "wait"})
_MARKS = {"advance": "▸", "promote": "✓", "rollback": "✕", "inconclusive": "?"}


def time_ticks(span_s: float, wanted: int = 6) -> list[float]:
    """Times from 0 in steps that people count in."""
    step = next((s for s in _TIME_STEPS_S if span_s / s <= wanted), None)
    if step is None or span_s <= 0:
        return nice_ticks(0.0, max(span_s, 1.0), wanted)
    return [float(i * step) for i in range(math.floor(span_s / step) + 1)]


def time_label(seconds: float) -> str:
    """`45 s`, `2:30` or `1:05 h`, short enough for an axis."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def loss_chart(history: Sequence[Epoch], width: float = 440) -> Markup:
    """Training and validation loss in nats over training time."""
    values = [v for e in history for v in (e.train_loss, e.val_loss) if math.isfinite(v)]
    top = max(values, default=1.0)
    ticks = nice_ticks(0.0, top if top > 0 else 1.0)
    series = {
        "line challenger thin": [(e.elapsed_s, e.train_loss) for e in history],
        "line challenger": [(e.elapsed_s, e.val_loss) for e in history],
    }
    labels = [f"{tick:g}" for tick in ticks]
    last = history[-1].val_loss if history else math.nan
    return _curve(history, ticks, labels, series, f"Loss over training time, last {words.number(last)}", width)


def accuracy_chart(history: Sequence[Epoch], width: float = 440) -> Markup:
    """Validation accuracy over training time; the axis starts at a round number below the lowest value."""
    values = [e.val_accuracy for e in history if math.isfinite(e.val_accuracy)]
    low = math.floor(min(values, default=0.0) * 10) / 10
    ticks = nice_ticks(min(low, 0.9), 1.0)
    series = {"line challenger": [(e.elapsed_s, e.val_accuracy) for e in history]}
    labels = [f"{tick * 100:g} %" for tick in ticks]
    best = max(values, default=None)
    return _curve(history, ticks, labels, series, f"Validation accuracy, best {words.percent(best)}", width)


def _curve(
    history: Sequence[Epoch],
    ticks: Sequence[float],
    labels: Sequence[str],
    series: dict[str, list[tuple[float, float]]],
    label: str,
    width: float,
) -> Markup:
    frame = Frame(width, 220)
    span = max((e.elapsed_s for e in history), default=1.0)
    x = Scale(0.0, max(span, 1e-9), frame.left, frame.x_end)
    y = Scale(ticks[0], ticks[-1], frame.y_end, frame.top)
    times = time_ticks(span)
    body = [y_axis(frame, y, ticks, labels), x_axis(frame, x, times, [time_label(t) for t in times])]
    body += [path(points, x, y, kind) for kind, points in series.items()]
    return chart(frame.width, frame.height, label, Markup("").join(body))


@dataclass(frozen=True, slots=True)
class _Panel:
    """One strip of the timeline between two heights."""

    title: str
    top: float
    bottom: float


def timeline_chart(
    looks: Sequence[CanaryLook], events: Sequence[TimelineEvent], final_weight: float | None, width: float
) -> Markup:
    """Weight, errors, probes and latency of both versions over the canary's time, with the judge's decisions.

    `final_weight`: the challenger's share after the last look, drawn to the right of it.
    """
    begin = looks[0].at
    times = [(look.at - begin).total_seconds() for look in looks]
    span = max(times[-1], 1.0)
    until = span * 1.06
    frame = Frame(width, _panels_height(looks), left=52, top=_HEAD)
    x = Scale(0.0, until, frame.left, frame.x_end)
    body = [_decision_lines(looks, times, x, frame)]
    body += [_weights(looks, times, final_weight, until, x, frame)]
    body += _live_panels(looks, times, x, frame)
    ticks = time_ticks(until, 5 if width < 600 else 10)
    body.append(x_axis(frame, x, ticks, [time_label(t) for t in ticks]))
    body.append(_event_marks(events, begin.timestamp(), until, x, frame))
    return chart(frame.width, frame.height, timeline_words(looks), Markup("").join(body), "chart timeline")


def timeline_words(looks: Sequence[CanaryLook]) -> str:
    """The timeline in one sentence, for people who do not see it."""
    last = looks[-1]
    asked = words.count(last.challenger.requests, "request")
    errors = words.count(last.challenger.errors, "error")
    steps = ", ".join(dict.fromkeys(look.step for look in looks))
    return (
        f"Canary of {last.challenger.version} through {steps}: {asked}, {errors}, "
        f"p99 {words.millis(last.challenger.p99_ms)}; last decision {last.decision}."
    )


_HEAD, _WEIGHT_H, _PANEL_H, _LATENCY_H, _GAP = 40.0, 84.0, 66.0, 110.0, 42.0


def _panels_height(looks: Sequence[CanaryLook]) -> float:
    panels = _WEIGHT_H + _GAP + _PANEL_H + _GAP + _LATENCY_H
    return _HEAD + panels + (_PANEL_H + _GAP if _has_probes(looks) else 0) + 26


def _has_probes(looks: Sequence[CanaryLook]) -> bool:
    return any(side is not None and side.probes for look in looks for side in (look.challenger, look.champion))


def _weights(
    looks: Sequence[CanaryLook], times: Sequence[float], final: float | None, until: float, x: Scale, frame: Frame
) -> Markup:
    bottom = frame.top + _WEIGHT_H
    high = max([look.weight for look in looks] + [final or 0.0])
    y = Scale(0.0, 1.0 if high > 0.5 else 0.5, bottom, frame.top)
    points = [(at, look.weight) for at, look in zip(times, looks, strict=True)]
    if final is not None:
        points.append((times[-1], final))
    ticks = [0.0, y.high / 2, y.high]
    parts = [
        text(0, frame.top - 26, "Challenger's share of user traffic", "pt"),
        y_axis(_strip(frame, bottom), y, ticks, [f"{t * 100:g} %" for t in ticks]),
        step_area(points, until, x, y, "area challenger"),
        _step_labels(looks, times, until, x, y),
    ]
    return Markup("").join(parts)


def _step_labels(looks: Sequence[CanaryLook], times: Sequence[float], until: float, x: Scale, y: Scale) -> Markup:
    """The name of each step above its part of the area, where there is room for it."""
    parts, start = [], 0
    for i in range(1, len(looks) + 1):
        if i < len(looks) and looks[i].step == looks[start].step:
            continue
        end = times[i] if i < len(looks) else until
        room = x(end) - x(times[start])
        if room >= 7.0 * len(looks[start].step) + 6:
            parts.append(
                text(x(times[start]) + 5, max(y(looks[start].weight) - 6, y.end + 12), looks[start].step, "st")
            )
        start = i
    return Markup("").join(parts)


def _decision_lines(looks: Sequence[CanaryLook], times: Sequence[float], x: Scale, frame: Frame) -> Markup:
    """A vertical line through all panels, with its sign on top, where a look ended a step."""
    parts = []
    for at, look in zip(times, looks, strict=True):
        if look.decision in GOES_ON:
            continue
        mood = mood_of(look.decision)
        parts.append(line(x(at), frame.top - 2, x(at), frame.y_end, f"decided {mood}"))
        parts.append(text(x(at), frame.top - 5, decision_mark(look.decision), f"mark {mood}", "middle"))
    return Markup("").join(parts)


def decision_mark(decision: str) -> str:
    """The sign of a decision."""
    return _MARKS.get(decision, "•")


def mood_of(decision: str) -> str:
    """`good`, `bad`, `warn` or `calm`: how a decision is coloured (it is always written out, too)."""
    if decision in GOES_ON:
        return "calm"
    if decision in {"advance", "promote", "passed", "approve", "approved"}:
        return "good"
    return "warn" if decision == "inconclusive" else "bad"


def _live_panels(looks: Sequence[CanaryLook], times: Sequence[float], x: Scale, frame: Frame) -> list[Markup]:
    top = frame.top + _WEIGHT_H + _GAP
    parts = [_share_panel("Errors so far, share of answers", _error_share, looks, times, x, frame, top)]
    top += _PANEL_H + _GAP
    if _has_probes(looks):
        parts.append(_share_panel("Right answers so far on labelled probes", _probe_share, looks, times, x, frame, top))
        top += _PANEL_H + _GAP
    parts.append(_latency_panel(looks, times, x, frame, top))
    return parts


def _error_share(counters: VersionCounters) -> float | None:
    return counters.errors / counters.requests if counters.requests else None


def _probe_share(counters: VersionCounters) -> float | None:
    return counters.probes_correct / counters.probes if counters.probes else None


def _share_panel(
    title: str,
    share: Callable[[VersionCounters], float | None],
    looks: Sequence[CanaryLook],
    times: Sequence[float],
    x: Scale,
    frame: Frame,
    top: float,
) -> Markup:
    champion, challenger = _both(looks, times, share)
    values = [v for _, v in champion + challenger if v is not None]
    if share is _probe_share:
        low, high = math.floor(min(values, default=0.0) * 10 - 1e-9) / 10, 1.0
    else:
        low, high = 0.0, max([*values, 0.02])
    ticks = nice_ticks(low, high, 2)
    y = Scale(ticks[0], ticks[-1], top + _PANEL_H, top)
    axis = y_axis(_strip(frame, top + _PANEL_H), y, ticks, [f"{t * 100:g} %" for t in ticks])
    lines = path(champion, x, y, "line champion") + path(challenger, x, y, "line challenger")
    return text(0, top - 14, title, "pt") + axis + lines


def _latency_panel(looks: Sequence[CanaryLook], times: Sequence[float], x: Scale, frame: Frame, top: float) -> Markup:
    p50, p99 = _both(looks, times, lambda c: c.p50_ms), _both(looks, times, lambda c: c.p99_ms)
    y, ticks = _latency_scale([*p50[0], *p50[1], *p99[0], *p99[1]], top)
    title = "Latency in ms: p50 solid, p99 dotted" + (" (logarithmic)" if y.log else "")
    parts = [text(0, top - 14, title, "pt")]
    parts.append(y_axis(_strip(frame, top + _LATENCY_H), y, ticks, [f"{t:g}" for t in ticks]))
    for kind, fifty, ninety in zip(("champion", "challenger"), p50, p99, strict=True):
        parts.append(path(ninety, x, y, f"line dotted {kind}"))
        parts.append(path(fifty, x, y, f"line {kind}"))
    return Markup("").join(parts)


def _latency_scale(points: Sequence[Point], top: float) -> tuple[Scale, list[float]]:
    values = [v for _, v in points if v is not None and math.isfinite(v) and v > 0]
    low, high = min(values, default=1.0), max(values, default=10.0)
    log = high / low > _LOG_ABOVE
    ticks = decade_ticks(low, high) if log else nice_ticks(0.0, high)
    return Scale(ticks[0], ticks[-1], top + _LATENCY_H, top, log=log), ticks


def _both(
    looks: Sequence[CanaryLook], times: Sequence[float], read: Callable[[VersionCounters], float | None]
) -> tuple[list[Point], list[Point]]:
    pairs = list(zip(times, looks, strict=True))
    champion: list[Point] = [(at, read(look.champion) if look.champion else None) for at, look in pairs]
    return champion, [(at, read(look.challenger)) for at, look in pairs]


def _strip(frame: Frame, bottom: float) -> Frame:
    return Frame(frame.width, bottom + frame.bottom, frame.left, frame.right, frame.top, frame.bottom)


def _event_marks(events: Sequence[TimelineEvent], begin: float, until: float, x: Scale, frame: Frame) -> Markup:
    """Ticks on the time axis where something happened during the canary; the list under the chart says what."""
    parts = []
    for event in events:
        at = event.at.timestamp() - begin
        if 0 <= at <= until:
            parts.append(line(x(at), frame.y_end - 5, x(at), frame.y_end + 5, f"event {event.severity}"))
    return Markup("").join(parts)


def dot_row(value: float | None, low: float | None, high: float | None, champion: float | None, floor: float) -> Markup:
    """A dot with its interval on an axis from `floor` to 1; the champion's value as a hollow diamond."""
    at = Scale(floor, 1.0, 2.0, 98.0)
    parts = [line_at(at(floor + (1 - floor) * k / 4), "grid") for k in range(5)]
    if words.known(low) and words.known(high):
        span = Markup('<line x1="{}%" x2="{}%" y1="11" y2="11" class="whisker challenger"/>')
        parts.append(span.format(num1(at(low or 0.0)), num1(at(high or 0.0))))
    if champion is not None and math.isfinite(champion):
        diamond = Markup(
            '<svg x="{}%" y="11" overflow="visible"><path d="M0-5.5 5.5 0 0 5.5-5.5 0Z" class="{}"/></svg>'
        )
        parts.append(diamond.format(num1(at(champion)), "diamond champion"))
    if value is not None and math.isfinite(value):
        parts.append(Markup('<circle cx="{}%" cy="11" r="4.5" class="dot challenger"/>').format(num1(at(value))))
    return Markup('<svg class="row" height="22" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


def line_at(percent: float, kind: str) -> Markup:
    """A vertical line through a row at `percent` of its width."""
    return Markup('<line x1="{0}%" x2="{0}%" y1="0" y2="22" class="{1}"/>').format(num1(percent), kind)


def num1(value: float) -> str:
    """A percentage with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def bar_row(share: float | None, kind: str = "challenger", offset: float = 0.0) -> Markup:
    """A horizontal bar of `share` of the row's width that begins at `offset` (both in [0, 1])."""
    width = 0.0 if share is None or not math.isfinite(share) else min(max(share, 0.0), 1.0 - offset)
    bar = Markup('<rect x="{}%" y="4" width="{}%" height="14" rx="2" class="bar {}"/>')
    drawn = bar.format(num1(offset * 100), num1(max(width * 100, 0.4)), kind) if width > 0 else Markup("")
    return Markup('<svg class="row" height="22" aria-hidden="true">{}</svg>').format(drawn)


def stage_bars(stages: Sequence[StageLine]) -> list[Markup]:
    """For each stage its bar on the release's time axis; empty where it has no time."""
    timed = [s for s in stages if s.started_at is not None and s.duration_s is not None]
    starts = [s.started_at.timestamp() for s in timed if s.started_at is not None]
    ends = [start + (s.duration_s or 0.0) for start, s in zip(starts, timed, strict=True)]
    if not starts:
        return [Markup("") for _ in stages]
    begin, span = min(starts), max(max(ends) - min(starts), 1e-9)
    return [_stage_bar(stage, begin, span) for stage in stages]


def _stage_bar(stage: StageLine, begin: float, span: float) -> Markup:
    if stage.started_at is None or stage.duration_s is None:
        return bar_row(None)
    kind = {"failed": "bad", "cached": "calm"}.get(stage.state, "challenger")
    return bar_row(stage.duration_s / span, kind, min((stage.started_at.timestamp() - begin) / span, 0.996))
