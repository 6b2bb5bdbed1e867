"""Render a release as one HTML file that needs nothing else: no script, no font, no style from anywhere."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from ml.results import Evaluation, TrainResult
from tasks.report import charts, evidence, scores, story, words
from tasks.report.model import CanaryLook, GateRow, ReleaseReport, VerdictView, VersionCounters

_TEMPLATES = Path(__file__).resolve().parent
# Looks beyond this many are folded away; those that decided something are always shown.
_OPEN_LOOKS = 14
# The chart's proportions on a phone and on a desk; the page shows one of them.
_NARROW, _WIDE = 440.0, 1040.0
_UNIT = re.compile(r"(\d) (?=(?:%|ms|s|min|KiB|MiB)(?![\w]))")
_BREAKS = re.compile(r"(?<=[_/-])")
_CODE = re.compile(r"`([^`\n]+)`")


# Strokes in a box of 24 x 24: drawn, because no font is sure to have these signs.
_ICONS = {
    "promoted": "M5 12.5l4.5 4.5L19 7.5",
    "gated": "M12 5v9M12 18.4v.2",
    "rolled_back": "M9 6L4.5 10.5 9 15M5 10.5h8.5a5 5 0 0 1 0 9H11",
    "declined": "M12 5v9M12 18.4v.2",
    "failed": "M6.5 6.5l11 11M17.5 6.5l-11 11",
    "dry_run": "M7 6v12M12 6v12M17 6v12",
}


def render_html(report: ReleaseReport, pictures: Mapping[str, bytes] | None = None) -> str:
    """The whole report as HTML. `pictures` maps the names in `report.evaluation` to PNG, JPEG, GIF or WebP files."""
    return str(_template().render(page=_page(report, dict(pictures or {})), report=report))


@functools.lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        sentence=story.sentence, coded=coded, soft=soft, duration=words.duration, moment=words.moment,
        clock=words.clock, size=words.size, millis=words.millis,
    )  # fmt: skip
    return environment.get_template("report.html.j2")


def coded(text: str) -> Markup:
    """Escaped text in which backquotes mark code, and numbers stay on one line with their unit."""
    parts = _CODE.split(_UNIT.sub("\\1\u00a0", text))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def soft(name: str) -> Markup:
    """A name that may be broken after its underscores, slashes and dashes."""
    return Markup("<wbr>").join(_BREAKS.split(name))


def _page(report: ReleaseReport, pictures: dict[str, bytes]) -> dict[str, Any]:
    """Everything the template prints, computed."""
    return {
        "mood": story.OUTCOME_MOOD[report.outcome],
        "icon": _ICONS[report.outcome],
        "word": story.OUTCOME_WORD[report.outcome],
        "headline": story.headline(report),
        "lead": story.lead(report),
        "challenger": report.version or "challenger",
        "challenger_legend": f"{report.version}, challenger" if report.version else "challenger",
        "champion": report.champion_version or "champion",
        "took": words.duration((report.finished_at - report.started_at).total_seconds()),
        "numbers": story.key_numbers(report),
        "next_steps": story.next_steps(report),
        "verdicts": _verdicts(report),
        "canary": _canary(report),
        "training": _training(report.train),
        "scores": _scores(report, pictures),
        "mistakes": scores.mistake_cards(report.evaluation.mistakes, pictures) if report.evaluation else [],
        "stages": list(zip(report.stages, charts.stage_bars(report.stages), strict=True)),
        "lineage": _lineage(report),
        "packages": words.flat(report.lineage.get("packages") or {}),
        "config": words.flat(report.config or report.lineage.get("config") or {}),
        "events": sorted(report.events, key=lambda event: event.at),
    }


@dataclass(frozen=True, slots=True)
class GateLine:
    """One row of a verdict's table; `mood` colours the result, which is written out too."""

    gate: str
    value: str
    limit: str
    allowed: str
    champion: str
    samples: str
    evidence: str
    interval: str
    result: str
    mood: str
    note: str


@dataclass(frozen=True, slots=True)
class VerdictBlock:
    """A verdict with its table; `reasons` leaves out what a row already says. `threshold`: the odds at which a gate
    calls harm, None where gates are plain limits."""

    title: str
    word: str
    mood: str
    reasons: tuple[str, ...]
    rows: tuple[GateLine, ...]
    has_champion: bool
    threshold: str | None


def _verdicts(report: ReleaseReport) -> list[VerdictBlock]:
    titled = (("On the holdout, before any traffic", report.gate), ("On live traffic, last look", report.canary))
    return [_verdict(title, verdict, holdout=verdict is report.gate) for title, verdict in titled if verdict]


def _verdict(title: str, verdict: VerdictView, *, holdout: bool) -> VerdictBlock:
    mood = charts.mood_of(verdict.decision)
    word = ("stopped" if mood == "bad" else "passed") if holdout else verdict.decision
    rows = tuple(_gate_line(row) for row in verdict.gates)
    logs = [row.log_threshold for row in verdict.gates if row.log_threshold is not None]
    told = set() if logs else {row.note for row in verdict.gates}  # with evidence, rows have no words
    reasons = tuple(reason for reason in verdict.reasons if reason not in told)
    threshold = words.odds(max(logs)) if logs else None
    has_champion = any(row.champion is not None for row in verdict.gates)
    return VerdictBlock(title, word, mood, reasons, rows, has_champion, threshold)


def _gate_line(row: GateRow) -> GateLine:
    result, mood = words.gate_state(row)
    # A verdict on one image, or on one file, needs no number of samples.
    few = row.samples is None or (row.samples <= 1 and not row.by_evidence)
    return GateLine(
        gate=row.gate,
        value=words.in_unit(row.value, row.unit) if row.samples or not row.by_evidence else words.DASH,
        limit=words.limit(row.limit, row.bound, row.unit),
        allowed=words.difference_allowed(row.limit, row.champion, row.unit),
        champion=words.in_unit(row.champion, row.unit),
        samples=words.DASH if few else f"{row.samples:,}",
        evidence=words.gate_evidence(row),
        interval=words.interval(row.low, row.high, row.unit),
        result=result,
        mood=mood,
        note=row.note,
    )


@dataclass(frozen=True, slots=True)
class LookLine:
    """One look: each cell holds the challenger's number and, where there is a champion, its number."""

    at: str
    step: str
    cells: tuple[tuple[str, str | None], ...]
    decision: str
    mood: str
    why: str


@dataclass(frozen=True, slots=True)
class CanaryBlock:
    """The canary's charts, its looks as rows (`shown` open, `folded` all of them), and what happened meanwhile."""

    wide: Markup
    narrow: Markup
    shown: tuple[LookLine, ...]
    folded: tuple[LookLine, ...]
    evidence: EvidenceBlock | None


@dataclass(frozen=True, slots=True)
class EvidenceBlock:
    """The evidence over requests, and the gates that never had a case."""

    wide: Markup
    narrow: Markup
    silent: str


def _canary(report: ReleaseReport) -> CanaryBlock | None:
    if not report.looks:
        return None
    final, events = story.final_weight(report), report.events
    few = len(report.looks) <= _OPEN_LOOKS
    shown = report.looks if few else tuple(story.deciding_looks(report))
    return CanaryBlock(
        charts.timeline_chart(report.looks, events, final, _WIDE),
        charts.timeline_chart(report.looks, events, final, _NARROW),
        _look_rows(shown),
        () if few else _look_rows(report.looks),
        _evidence(report),
    )


def _evidence(report: ReleaseReport) -> EvidenceBlock | None:
    found = evidence.course(report.looks, report.canary.gates if report.canary else ())
    if found is None:
        return None
    return EvidenceBlock(
        evidence.evidence_chart(found, report.looks, _WIDE),
        evidence.evidence_chart(found, report.looks, _NARROW),
        ", ".join(found.silent),
    )


def _look_rows(looks: tuple[CanaryLook, ...]) -> tuple[LookLine, ...]:
    return tuple(_look_line(look) for look in looks)


def _look_line(look: CanaryLook) -> LookLine:
    ours, theirs = _counter_cells(look.challenger), _counter_cells(look.champion) if look.champion else None
    cells = tuple((cell, theirs[i] if theirs else None) for i, cell in enumerate(ours))
    why = " ".join(story.sentence(reason) for reason in look.reasons)
    return LookLine(words.clock(look.at), look.step, cells, look.decision, charts.mood_of(look.decision), why)


def _counter_cells(counters: VersionCounters) -> tuple[str, ...]:
    probes, pairs = counters.probes, counters.shadow_pairs
    return (
        f"{counters.requests:,}",
        f"{counters.errors:,}",
        words.millis(counters.p50_ms),
        words.millis(counters.p99_ms),
        words.percent(counters.probes_correct / probes) if probes else words.DASH,
        words.percent(counters.shadow_differ / pairs) if pairs else words.DASH,
    )


@dataclass(frozen=True, slots=True)
class TrainingBlock:
    """Curves and facts of a training run."""

    loss: Markup | None
    accuracy: Markup | None
    facts: tuple[tuple[str, str], ...]


def _training(train: TrainResult | None) -> TrainingBlock | None:
    if train is None:
        return None
    facts: tuple[tuple[str, str], ...] = (
        ("Net", f"{train.net}, {train.px} px"),
        ("Data", f"{train.dataset} ({train.dataset_hash[:12]})"),
        ("Trained", f"{words.count(train.epochs, 'epoch')}, {words.count(train.steps, 'step')}"),
        ("Time", words.duration(train.elapsed_s)),
        (
            "Speed",
            f"{words.number(round(train.images_per_s))} images/s" if words.known(train.images_per_s) else words.DASH,
        ),
        ("Best validation accuracy", words.percent(train.best_val_accuracy)),
        ("Seed", str(train.seed)),
    )
    if train.resumed_from_step is not None:
        facts += (("Resumed", f"from step {train.resumed_from_step:,}"),)
    if not train.history:
        return TrainingBlock(None, None, facts)
    return TrainingBlock(charts.loss_chart(train.history), charts.accuracy_chart(train.history), facts)


@dataclass(frozen=True, slots=True)
class ScoresBlock:
    """The evaluation's tables."""

    classes: list[scores.ClassRow]
    axis: list[str]
    confusion: scores.Confusion | None
    severity: list[scores.SeverityRow]
    severity_axis: list[str]
    calibration: list[scores.CalibrationRow]
    reliability: str | None
    compared: bool
    note: str
    facts: tuple[tuple[str, str], ...]


def _scores(report: ReleaseReport, pictures: dict[str, bytes]) -> ScoresBlock | None:
    ours = report.evaluation
    if ours is None:
        return None
    theirs = report.champion_evaluation if story.same_holdout(report) else None
    return ScoresBlock(
        scores.class_rows(ours, theirs),
        scores.axis_labels(scores.recall_floor(ours, theirs)),
        scores.confusion(ours),
        scores.severity_rows(ours, theirs),
        scores.axis_labels(scores.severity_floor(ours, theirs)),
        scores.calibration_rows(ours),
        scores.named_picture(ours, pictures, "reliab"),
        theirs is not None,
        _comparison_note(report),
        _score_facts(ours),
    )


def _comparison_note(report: ReleaseReport) -> str:
    if report.champion_version is None:
        return "There was no champion to compare with."
    if report.champion_evaluation is None:
        return f"{report.champion_version} was not measured on this holdout."
    if not story.same_holdout(report):
        return f"{report.champion_version} was measured on another holdout, so its numbers are not shown beside these."
    return ""


def _score_facts(ours: Evaluation) -> tuple[tuple[str, str], ...]:
    return (
        ("Images", f"{ours.images:,} of {ours.dataset}, {ours.split}"),
        ("Holdout", ours.holdout_hash[:12] or words.DASH),
        ("Temperature", words.number(round(ours.temperature, 3)) if words.known(ours.temperature) else words.DASH),
        ("Flagged as no leaf", words.percent(ours.ood_flagged_share)),
    )


def _lineage(report: ReleaseReport) -> list[tuple[str, str]]:
    """Who, when and from what; configuration and packages have places of their own."""
    facts = {key: value for key, value in report.lineage.items() if key not in {"config", "packages"}}
    hardware = {f"hardware.{k}": v for k, v in report.train.hardware.items()} if report.train else {}
    known = words.flat(facts)
    names = {name for name, _ in known}
    return known + [(name, value) for name, value in hardware.items() if name not in names]
