"""What a release report says in words: the headline, the numbers that matter, and what to type next."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ml.results import Evaluation
from tasks.report import words
from tasks.report.model import CanaryLook, Outcome, ReleaseReport, VersionCounters

_TIGHT_PERCENT = re.compile(r"(\d)%")

Mood = Literal["good", "bad", "warn", "calm"]

OUTCOME_MOOD: dict[Outcome, Mood] = {
    "promoted": "good",
    "gated": "warn",
    "rolled_back": "bad",
    "declined": "warn",
    "failed": "bad",
    "dry_run": "calm",
}
OUTCOME_SIGN: dict[Outcome, str] = {
    "promoted": "✓",
    "gated": "!",
    "rolled_back": "↩",
    "declined": "!",
    "failed": "✕",
    "dry_run": "○",
}
OUTCOME_WORD: dict[Outcome, str] = {
    "promoted": "Promoted",
    "gated": "Stopped by the gate",
    "rolled_back": "Rolled back",
    "declined": "Not approved",
    "failed": "Failed",
    "dry_run": "Dry run",
}


def subject(report: ReleaseReport) -> str:
    """The challenger's name in a sentence."""
    return report.version or "The challenger"


def headline(report: ReleaseReport) -> str:
    """The verdict in one sentence."""
    name = subject(report)
    if report.outcome == "promoted":
        return f"{name} is in production and answers all traffic."
    if report.outcome == "gated":
        return f"{name} was stopped by the gate, before it saw any traffic."
    if report.outcome == "rolled_back":
        return f"{name} was rolled back {_reached(report)}."
    if report.outcome == "declined":
        return f"{name} was not approved."
    if report.outcome == "failed":
        stage = failed_stage(report)
        return f"The release failed at the stage “{stage}”." if stage else "The release failed."
    return "This was a rehearsal: nothing was changed."


def _reached(report: ReleaseReport) -> str:
    peak = highest_weight(report)
    return f"at {words.percent(peak, 0)} of the traffic" if peak > 0 else "in shadow, before any user saw it"


def highest_weight(report: ReleaseReport) -> float:
    """The largest share of user traffic the challenger had while it was judged."""
    return max((look.weight for look in report.looks), default=0.0)


def failed_stage(report: ReleaseReport) -> str | None:
    """The name of the stage that failed first."""
    return next((stage.name for stage in report.stages if stage.state == "failed"), None)


def lead(report: ReleaseReport) -> str:
    """Who serves now, as far as this release knows."""
    champion = report.champion_version
    if report.outcome == "promoted":
        return f"{champion} is one rollback away." if champion else "It is the first version in production."
    if report.outcome == "failed" and _was_live(report):
        return (
            f"It failed while or after {subject(report)} had user traffic; an unjudged canary loses it when its lease "
            "ends. `khet status` shows who serves now, `khet doctor --fix` finishes or undoes the rest."
        )
    if champion is None:
        return "No version is in production yet."
    before = {"rolled_back": "All traffic is back on", "dry_run": "Production still is"}
    if report.outcome in before:
        return f"{before[report.outcome]} {champion}."
    unseen = "" if _was_live(report) else "; no user saw the challenger"
    return f"Production still is {champion}{unseen}."


def _was_live(report: ReleaseReport) -> bool:
    return highest_weight(report) > 0 or any(look.decision == "promote" for look in report.looks)


def sentence(text: str) -> str:
    """A reason as a sentence: a capital first, a full stop last, and percentages as everywhere on the page."""
    stripped = _TIGHT_PERCENT.sub(r"\1 %", text.strip())
    if not stripped:
        return ""
    return stripped[0].upper() + stripped[1:] + ("" if stripped[-1] in ".!?:" else ".")


@dataclass(frozen=True, slots=True)
class KeyNumber:
    """One number of the challenger beside the champion's; `delta` in words, `mood` says whether it is better."""

    label: str
    value: str
    champion: str | None
    delta: str
    mood: Mood
    hint: str = ""


def same_holdout(report: ReleaseReport) -> bool:
    """Whether both evaluations saw the same images, so that their numbers may be compared."""
    ours, theirs = report.evaluation, report.champion_evaluation
    return ours is not None and theirs is not None and ours.holdout_hash == theirs.holdout_hash


def key_numbers(report: ReleaseReport) -> list[KeyNumber]:
    """The numbers that decide, the holdout's first, then those of live traffic."""
    numbers = _holdout_numbers(report) + _live_numbers(report)
    if report.export is not None:
        numbers.append(
            KeyNumber("Model file", words.size(report.export.size_bytes), None, "", "calm", report.export.sha256[:12])
        )
    return numbers


def _holdout_numbers(report: ReleaseReport) -> list[KeyNumber]:
    ours = report.evaluation
    if ours is None:
        return []
    theirs = report.champion_evaluation if same_holdout(report) else None
    interval = f"95 %: {words.percent(ours.accuracy_low)} to {words.percent(ours.accuracy_high)}"
    rows = [
        _compare("Accuracy", ours, theirs, lambda e: e.accuracy, up=True, noise=_half_interval(ours), hint=interval),
        _compare("Macro F1", ours, theirs, lambda e: e.macro_f1, up=True, noise=_half_interval(ours)),
        _compare(
            "Missed disease", ours, theirs, lambda e: e.missed_disease_rate, up=False, hint="sick, called healthy"
        ),
        _compare("Calibration error", ours, theirs, lambda e: e.ece_after, up=False, hint="ECE after scaling"),
    ]
    return [*rows, _latency_number(ours, theirs)]


def _half_interval(evaluation: Evaluation) -> float:
    half = (evaluation.accuracy_high - evaluation.accuracy_low) / 2
    return half if math.isfinite(half) else 0.0


def _compare(
    label: str,
    ours: Evaluation,
    theirs: Evaluation | None,
    read: Callable[[Evaluation], float | None],
    *,
    up: bool,
    noise: float = 0.005,
    hint: str = "",
) -> KeyNumber:
    """`up`: more is better. A difference within `noise` is not coloured."""
    value, other = read(ours), read(theirs) if theirs else None
    shown = words.percent(other) if theirs else None
    if value is None or other is None or not (math.isfinite(value) and math.isfinite(other)):
        return KeyNumber(label, words.percent(value), shown, "", "calm", hint)
    change = value - other
    return KeyNumber(label, words.percent(value), shown, words.points(change), _mood(change, noise, up=up), hint)


def _mood(change: float, noise: float, *, up: bool) -> Mood:
    if abs(change) <= noise:
        return "calm"
    return "good" if (change > 0) == up else "bad"


def _latency_number(ours: Evaluation, theirs: Evaluation | None) -> KeyNumber:
    value, other = ours.latency_p50_ms, theirs.latency_p50_ms if theirs else None
    label, hint = "Time for one image", "p50, one thread, no HTTP"
    return _ratio_number(label, value, other, hint, shown=theirs is not None)


def _ratio_number(label: str, value: float | None, other: float | None, hint: str, *, shown: bool) -> KeyNumber:
    """Times are compared as a factor; less than a fifth of a difference is not coloured."""
    champion = words.millis(other) if shown else None
    if value is None or other is None or not (value > 0 and other > 0 and math.isfinite(value / other)):
        return KeyNumber(label, words.millis(value), champion, "", "calm", hint)
    factor = value / other
    mood: Mood = "calm" if 0.8 <= factor <= 1.25 else ("bad" if factor > 1 else "good")
    return KeyNumber(label, words.millis(value), champion, f"{factor:.2f} ×", mood, hint)


def _live_numbers(report: ReleaseReport) -> list[KeyNumber]:
    served = [look for look in report.looks if look.challenger.requests]
    if not served:
        return []
    last = served[-1]
    ours, theirs = last.challenger, last.champion
    hint = f"of {words.count(ours.requests, 'canary answer')}"
    errors = _error_share(ours)
    other = _error_share(theirs) if theirs else None
    change = errors - other if errors is not None and other is not None else None
    mood: Mood = _mood(change, 0.005, up=False) if change is not None else "calm"
    shown = words.percent(other, 2) if theirs else None
    delta = words.points(change) if change is not None else ""
    return [
        KeyNumber("Errors in the canary", words.percent(errors, 2), shown, delta, mood, hint),
        _ratio_number(
            "p99 in the canary", ours.p99_ms, theirs.p99_ms if theirs else None, "with HTTP", shown=bool(theirs)
        ),
    ]


def _error_share(counters: VersionCounters) -> float | None:
    return counters.errors / counters.requests if counters.requests else None


def deciding_looks(report: ReleaseReport) -> list[CanaryLook]:
    """The looks that ended a step, and the last one."""
    ended = [look for look in report.looks if look.decision not in {"continue", "wait"}]
    return ended if ended or not report.looks else [report.looks[-1]]


def final_weight(report: ReleaseReport) -> float | None:
    """The challenger's share of traffic after the canary; None where this release cannot know."""
    known: dict[Outcome, float] = {"promoted": 1.0, "rolled_back": 0.0, "declined": 0.0}
    return known.get(report.outcome)


@dataclass(frozen=True, slots=True)
class NextStep:
    """A command and what it is good for."""

    command: str
    why: str


def next_steps(report: ReleaseReport) -> list[NextStep]:
    """What a person would type now."""
    return {
        "promoted": _after_promotion,
        "gated": _after_no,
        "declined": _after_no,
        "rolled_back": _after_rollback,
        "failed": _after_failure,
        "dry_run": _after_rehearsal,
    }[report.outcome](report)


def _after_promotion(report: ReleaseReport) -> list[NextStep]:
    steps = [_show(report.version), NextStep("khet predict photo.jpg", "ask the version that serves now")]
    if report.champion_version:
        back = f"khet rollback --to {report.champion_version}"
        steps.append(NextStep(back, "all traffic back to the champion before it, if users see worse answers"))
    return [step for step in steps if step]


def _after_no(report: ReleaseReport) -> list[NextStep]:
    steps = [_show(report.version), _show(report.champion_version, "the version it had to match")]
    return [step for step in [*steps, _again(report)] if step]


def _after_rollback(report: ReleaseReport) -> list[NextStep]:
    status = NextStep("khet status", "see that all traffic is where it should be")
    return [step for step in [status, _show(report.version, "what was rolled back"), _again(report)] if step]


def _after_failure(report: ReleaseReport) -> list[NextStep]:
    return [
        NextStep("khet doctor --fix", "finish or undo what was begun"),
        NextStep(f"khet release --resume {shlex.quote(report.release_id)}", "go on at the stage that failed"),
        NextStep("khet status", "who serves now"),
    ]


def _after_rehearsal(report: ReleaseReport) -> list[NextStep]:
    return [_again(report, "do it")]


def _show(version: str | None, why: str = "model card, metrics and lineage") -> NextStep | None:
    return NextStep(f"khet show {version}", why) if version else None


def _again(report: ReleaseReport, why: str = "release again, after a change of data or configuration") -> NextStep:
    known = report.evaluation or report.train
    return NextStep(f"khet release --data {shlex.quote(known.dataset)}" if known else "khet release", why)
