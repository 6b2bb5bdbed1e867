"""The report as Prefect shows it: a markdown card and tables of short texts.

The UI renders GitHub's markdown, pictures with `data:` sources included, and shows tables ten rows at a time; every
value here is text.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from tasks.report import story, words
from tasks.report.model import CanaryLook, GateRow, ReleaseReport, StageLine, VersionCounters

Row = dict[str, str]


def gate_table(report: ReleaseReport) -> list[Row]:
    """One row a gate, the holdout's first."""
    rows = (*(report.gate.gates if report.gate else ()), *(report.canary.gates if report.canary else ()))
    holdout = len(report.gate.gates) if report.gate else 0
    cells = gate_rows(rows)
    return [{"where": "holdout" if i < holdout else "canary"} | row for i, row in enumerate(cells)]


def gate_rows(gates: Sequence[GateRow]) -> list[Row]:
    """One row a gate; the other side's value and evidence have columns where a gate knows them."""
    compared = any(gate.champion is not None for gate in gates)
    judged = any(gate.by_evidence for gate in gates)
    return [_gate_row(gate, compared=compared, judged=judged) for gate in gates]


def _gate_row(gate: GateRow, *, compared: bool, judged: bool) -> Row:
    row = {
        "gate": gate.gate,
        "result": words.gate_state(gate)[0],
        "value": words.in_unit(gate.value, gate.unit) if gate.samples or not gate.by_evidence else words.DASH,
    }
    if compared:
        row["champion"] = words.in_unit(gate.champion, gate.unit)
    row["limit"] = words.limit(gate.limit, gate.bound, gate.unit)
    if judged:
        row |= _evidence_cells(gate)
    return row


def _evidence_cells(gate: GateRow) -> Row:
    return {
        "samples": f"{gate.samples or 0:,}",
        "evidence": words.gate_evidence(gate),
        "threshold": words.odds(gate.log_threshold) if gate.by_evidence else words.DASH,
        "interval": words.interval(gate.low, gate.high, gate.unit),
    }


def stage_table(report: ReleaseReport) -> list[Row]:
    """One row a stage, in order."""
    return [_stage_row(stage) for stage in report.stages]


def _stage_row(stage: StageLine) -> Row:
    return {
        "stage": stage.name,
        "state": stage.state,
        "started": words.clock(stage.started_at) if stage.started_at else words.DASH,
        "took": words.duration(stage.duration_s),
        "note": stage.note,
    }


def looks_table(report: ReleaseReport) -> list[Row]:
    """One row a look at the canary, newest first: the UI shows ten rows and sorts nothing."""
    return [look_row(look) for look in reversed(report.looks)]


def look_row(look: CanaryLook) -> Row:
    """A look at the canary; numbers are the challenger's, with the champion's after a stroke."""
    ours, theirs = look.challenger, look.champion
    return {
        "at": words.clock(look.at),
        "step": look.step,
        "decision": look.decision,
        "requests": _pair(f"{ours.requests:,}", f"{theirs.requests:,}" if theirs else None),
        "errors": _pair(f"{ours.errors:,}", f"{theirs.errors:,}" if theirs else None),
        "p50": _pair(words.millis(ours.p50_ms), words.millis(theirs.p50_ms) if theirs else None),
        "p99": _pair(words.millis(ours.p99_ms), words.millis(theirs.p99_ms) if theirs else None),
        "probes right": _pair(_probes(ours), _probes(theirs) if theirs else None),
        "shadow differs": words.percent(ours.shadow_differ / ours.shadow_pairs) if ours.shadow_pairs else words.DASH,
        "why": " ".join(story.sentence(reason) for reason in look.reasons),
    }


def _pair(ours: str, theirs: str | None) -> str:
    return ours if theirs is None else f"{ours} / {theirs}"


def _probes(counters: VersionCounters) -> str:
    return words.percent(counters.probes_correct / counters.probes) if counters.probes else words.DASH


def render_markdown_card(report: ReleaseReport, images: Sequence[str] = ()) -> str:
    """The release on one card. `images` are lines from `markdown_image`."""
    parts = [f"# {story.OUTCOME_SIGN[report.outcome]} {plain(story.headline(report))}", plain(story.lead(report))]
    parts += [_bullets([story.sentence(reason) for reason in report.reasons])]
    parts += [_numbers(report), _gates(report), *images, _steps(report), _footer(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text that markdown and HTML leave alone. Code spans (backquotes) are kept."""
    for sign in ("\\", "|", "*", "_", "[", "]", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {plain(line)}" for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """A GitHub table; empty without rows."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = ["| " + " | ".join(plain(name) for name in head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(plain(row[name]) or words.DASH for name in head) + " |" for row in rows]
    return "\n".join(lines)


def _numbers(report: ReleaseReport) -> str:
    ours, theirs = report.version or "challenger", report.champion_version or "champion"
    rows = [
        {"": n.label, ours: n.value, theirs: n.champion or words.DASH, "difference": n.delta or words.DASH}
        for n in story.key_numbers(report)
    ]
    return markdown_table(rows)


def _gates(report: ReleaseReport) -> str:
    table = markdown_table(gate_table(report))
    return f"## Gates\n\n{table}" if table else ""


def _steps(report: ReleaseReport) -> str:
    lines = [f"- `{step.command}`: {plain(step.why)}" for step in story.next_steps(report)]
    return "## What to do next\n\n" + "\n".join(lines)


def _footer(report: ReleaseReport) -> str:
    took = words.duration((report.finished_at - report.started_at).total_seconds())
    facts = [f"Release `{report.release_id}`", f"by {plain(report.requested_by)}", words.moment(report.started_at)]
    return ", ".join([*facts, f"took {took}"]) + "."


def markdown_image(png: bytes, alt: str) -> str:
    """A picture inside markdown, without an address to fetch. Prefect's UI allows `data:` sources there."""
    return f"![{plain(alt)}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"
