"""The picture of the judge's evidence: odds for harm of each gate over the canary's requests, up to the decision.

A gate is coloured when it decided; the others stay grey, and those that never had a case are only named. Evidence is
given as natural logarithms; below even odds it says nothing and is drawn at 1:1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from tasks.report import words
from tasks.report.charts import GOES_ON, decision_mark, mood_of
from tasks.report.model import CanaryLook, GateRow
from tasks.report.svg import Frame, Scale, chart, circle, line, nice_ticks, path, text, x_axis, y_axis

# A gate that stayed below these odds gets no label: its line would only hide others.
_WORTH_A_LABEL = math.log(2.0)
_CEILING = math.log(words.MOST_ODDS)
TOGETHER = "All gates together"


@dataclass(frozen=True, slots=True)
class Trace:
    """One gate's evidence: (requests the canary had answered, natural logarithm of the odds, 0 at least)."""

    gate: str
    points: tuple[tuple[int, float], ...]
    last: float | None
    decided: bool
    dry_run: bool

    @property
    def peak(self) -> float:
        """The largest evidence there was."""
        return max((log for _, log in self.points), default=0.0)

    @property
    def label(self) -> str:
        """The gate and what it came to."""
        return f"{self.gate} {words.odds(self.last).replace('over', '>')}"


@dataclass(frozen=True, slots=True)
class Course:
    """The evidence of a whole rollout. `threshold` is that of the traces which decided, as a natural logarithm."""

    traces: tuple[Trace, ...]
    threshold: float | None
    requests: int
    decision: str

    @property
    def labelled(self) -> list[Trace]:
        """The traces that deserve a name beside them, strongest first."""
        named = [trace for trace in self.traces if trace.decided or trace.peak >= _WORTH_A_LABEL]
        return sorted(named, key=lambda trace: (not trace.decided, -trace.peak))

    @property
    def silent(self) -> list[str]:
        """The gates that never had a case."""
        named = {trace.gate for trace in self.labelled}
        return [trace.gate for trace in self.traces if trace.gate not in named]

    @property
    def top(self) -> float:
        """Where the axis ends: above the threshold and the evidence, but not at odds that tell nobody more."""
        peak = max((trace.peak for trace in self.traces), default=0.0)
        return min(max((self.threshold or math.log(100)) + math.log(4), peak + math.log(1.5)), _CEILING)


def course(looks: Sequence[CanaryLook], gates: Sequence[GateRow]) -> Course | None:
    """What there is to draw; None where no look kept evidence (older records). `gates`: rows of the last verdict."""
    told = [look for look in looks if look.evidence]
    if not told:
        return None
    last, rows = told[-1], {row.gate: row for row in gates}
    names = dict.fromkeys(name for look in told for name in look.evidence)
    deciders = _deciders(last, rows)
    threshold = last.log_threshold
    traces = [_trace(name, told, name in deciders, bool((row := rows.get(name)) and row.dry_run)) for name in names]
    if last.decision == "rollback" and not deciders and (together := _together(told, rows)) is not None:
        trace, alone = together
        if trace.peak >= alone:
            traces, threshold = [*traces, trace], alone
    return Course(tuple(traces), threshold, last.challenger.answered, last.decision)


def _deciders(last: CanaryLook, rows: dict[str, GateRow]) -> set[str]:
    if last.decision not in {"rollback", "inconclusive"}:
        return set()
    return {name for name in last.evidence if (row := rows.get(name)) and row.ok is False and not row.dry_run}


def _trace(name: str, looks: Sequence[CanaryLook], decided: bool, dry_run: bool) -> Trace:
    logs = [look.evidence.get(name) for look in looks]
    seen = [look.challenger.answered for look in looks]
    return Trace(name, tuple(zip(seen, map(_drawn, logs), strict=True)), logs[-1], decided, dry_run)


def _drawn(log: float | None) -> float:
    return 0.0 if log is None or math.isnan(log) else min(max(log, 0.0), _CEILING)


def _together(looks: Sequence[CanaryLook], rows: dict[str, GateRow]) -> tuple[Trace, float] | None:
    """The mean of the evidence that counts, and its threshold: that of one gate over their number (Bonferroni)."""
    counted = [row for row in rows.values() if not row.dry_run and row.log_threshold is not None]
    if not counted or looks[-1].log_threshold is None:
        return None
    critical = [row.gate for row in counted if row.critical]
    logs = [_log_mean([look.evidence.get(name) for name in critical], len(counted)) for look in looks]
    points = tuple((look.challenger.answered, _drawn(log)) for look, log in zip(looks, logs, strict=True))
    return Trace(TOGETHER, points, logs[-1], True, False), looks[-1].log_threshold - math.log(len(counted))


def _log_mean(logs: Sequence[float | None], count: int) -> float | None:
    known = [log for log in logs if log is not None]
    if not known:
        return None
    top = max(known)
    return top + math.log(math.fsum(math.exp(log - top) for log in known)) - math.log(count)


def odds_ticks(top: float) -> list[float]:
    """Powers of ten up to `top`, as natural logarithms; every second one where there are many."""
    decades = math.floor(top / math.log(10) + 1e-9)
    return [k * math.log(10) for k in range(0, decades + 1, 2 if decades > 4 else 1)]


def evidence_words(found: Course) -> str:
    """The picture in one sentence, for people who do not see it."""
    needed = f", harm is called at {words.odds(found.threshold)}" if found.threshold is not None else ""
    strongest = max(found.labelled, key=lambda trace: trace.last or 0.0, default=None)
    told = f"strongest: {strongest.label}" if strongest else "no gate shows any"
    asked = words.count(found.requests, "request")
    return f"Evidence for harm over {asked} of the canary{needed}; {told}; last decision {found.decision}."


# From the edge of the drawing to the plot: room for a label on the right, for the decision and the steps above.
_RIGHT, _RIGHT_NARROW, _LEFT, _TOP, _LINE, _CHARACTER = 180.0, 128.0, 78.0, 50.0, 14.0, 6.4
_NARROW = 600.0  # below this width labels leave the odds to the table


def evidence_chart(found: Course, looks: Sequence[CanaryLook], width: float) -> Markup:
    """Draw it, `width` user units wide."""
    narrow = width < _NARROW
    right = _RIGHT_NARROW if narrow else _RIGHT
    frame = Frame(width, 300 if narrow else 330, left=_LEFT, right=right, top=_TOP, bottom=44)
    x = Scale(0.0, max(found.requests, 1), frame.left, frame.x_end)
    y = Scale(0.0, found.top, frame.y_end, frame.top)
    ticks = odds_ticks(found.top)
    body = [text(0, 12, "Evidence for harm, as odds (logarithmic)", "pt")]
    body += [y_axis(frame, y, ticks, [f"{math.exp(tick):,.0f}:1" for tick in ticks]), _requests_axis(found, frame, x)]
    body += [_steps(looks, x, frame), _threshold(found, frame, y)]
    body += [_curve(trace, x, y, mood_of(found.decision)) for trace in reversed(_by_weight(found))]
    body += [_decision(found, x, y, frame), _labels(found, y, frame)]
    return chart(frame.width, frame.height, evidence_words(found), Markup("").join(body), "chart evidence")


def _by_weight(found: Course) -> list[Trace]:
    """What matters is drawn last, above the rest."""
    return found.labelled + [trace for trace in found.traces if trace not in found.labelled]


def _requests_axis(found: Course, frame: Frame, x: Scale) -> Markup:
    wanted = 2 if frame.width < _NARROW else 6
    ticks = [tick for tick in nice_ticks(0.0, max(found.requests, 1), wanted) if tick <= found.requests]
    title = text(frame.left, frame.height - 4, "requests the canary was given, mirrored ones included", "t")
    return x_axis(frame, x, ticks, [f"{tick:,.0f}" for tick in ticks]) + title


def _steps(looks: Sequence[CanaryLook], x: Scale, frame: Frame) -> Markup:
    """A hairline where a step ended, and its name above its part where there is room."""
    borders = [(a.challenger.answered, a.step) for a, b in pairwise(looks) if a.step != b.step]
    borders.append((looks[-1].challenger.answered, looks[-1].step))
    parts, begin = [], 0
    for end, name in borders:
        if end < looks[-1].challenger.answered:
            parts.append(line(x(end), frame.top, x(end), frame.y_end, "step"))
        if x(end) - x(begin) >= _CHARACTER * len(name) + 8:
            parts.append(text(x(begin) + 5, frame.top - 4, name, "t"))
        begin = end
    return Markup("").join(parts)


def _threshold(found: Course, frame: Frame, y: Scale) -> Markup:
    if found.threshold is None:
        return Markup("")
    at = y(found.threshold)
    words_at = f"harm is called at {words.odds(found.threshold)}"
    return line(frame.left, at, frame.x_end, at, "threshold") + text(frame.left + 6, at - 6, words_at, "tt")


def _curve(trace: Trace, x: Scale, y: Scale, mood: str) -> Markup:
    kind = f"gate hot {mood}" if trace.decided else "gate" if trace.peak >= _WORTH_A_LABEL else "gate silent"
    # The odds are even before the first request.
    return path([(0, 0.0), *trace.points], x, y, f"{kind} dashed" if trace.dry_run else kind)


def _decision(found: Course, x: Scale, y: Scale, frame: Frame) -> Markup:
    """A line through the decision, what it was, and a dot on each gate that brought it about."""
    if found.decision in GOES_ON:
        return Markup("")
    mood, at = mood_of(found.decision), x(found.requests)
    said = f"{decision_mark(found.decision)} {found.decision} after {found.requests:,} requests"
    parts = [line(at, frame.top - 12, at, frame.y_end, f"decided {mood}")]
    parts.append(text(at, frame.top - 17, said, f"said {mood}", "end" if frame.width < _NARROW else "middle"))
    parts += [circle(at, y(t.points[-1][1]), 4.5, f"hot {mood}") for t in found.traces if t.decided]
    return Markup("").join(parts)


def _labels(found: Course, y: Scale, frame: Frame) -> Markup:
    """Each gate's name right of its line, moved apart where lines end close to each other."""
    named = sorted(found.labelled, key=lambda trace: -trace.points[-1][1])
    places = spread([y(trace.points[-1][1]) for trace in named], _LINE, frame.top, frame.y_end)
    mood = mood_of(found.decision)
    return Markup("").join(
        text(
            frame.x_end + 10,
            at + 4,
            trace.gate if frame.width < _NARROW else trace.label,
            f"said {mood}" if trace.decided else "t",
        )
        for trace, at in zip(named, places, strict=True)
    )


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending places as near to the `wanted` ones as fits, `apart` from each other, below `low` and above `high`."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + apart if places else low))
    for i in range(len(places) - 1, -1, -1):
        limit = places[i + 1] - apart if i + 1 < len(places) else high
        places[i] = min(places[i], limit)
    return places
