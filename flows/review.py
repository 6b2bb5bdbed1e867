"""Judge a promotion again by labels that arrive later (runbook: Model Rollback, which it calls for)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from configs.errors import GateError, SafetyError
from flows import hooks
from flows.rollback import rollback
from flows.session import run_tail
from flows.systems import requester, systems
from ml.results import Record
from ml.version import Version
from tasks.feedback.store import FeedbackStore
from tasks.prefect_support import RETRY_DELAYS, announce, retry_external, show_table
from tasks.registry import AliasMove
from tasks.registry.metadata import model_metadata
from tasks.rollout import journal
from tasks.rollout.anytime import Rate
from tasks.rollout.gates import odds
from tasks.rollout.journal import ReleaseRecord, utc_now
from tasks.rollout.late import Labelled, Promise, Window, judge_late
from tasks.rollout.verdict import Decision, GateReading, Verdict

Action = Literal["none", "called for", "rolled back"]


@dataclass(frozen=True, slots=True)
class Promotion:
    """The version in production, since when, and what it took over from (None: it is the first)."""

    version: Version
    previous: Version | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Labels:
    """What people said about both versions, and what the newer one promised."""

    current: Labelled
    previous: Labelled | None
    promise: Promise


class Review(Record):
    """What a night's look found. `decision` None: there was nothing to judge, and `sentence` says why."""

    version: str | None = None
    previous: str | None = None
    promoted_at: datetime | None = None
    closes_at: datetime | None = None
    decision: Decision | None = None
    sentence: str
    verdict: dict[str, Any] = Field(default={}, description="As Verdict.to_json writes it.")
    action: Action = "none"


@flow(name="release-review", on_crashed=[hooks.undo_release], validate_parameters=True)
def release_review(act: bool = False, dry_run: bool = False) -> Review:
    """Hold the version in production against the labels that its predictions got since it was promoted.

    Args:
        act: Roll back at once where harm is shown, instead of calling for it.
        dry_run: Show the verdict; write nothing, change nothing.

    Raises:
        GateError: harm is shown and `act` is off.
        SafetyError: a release is running or production moved meanwhile; nothing was changed.
        ExternalError: a system does not answer; the next night looks again.
    """
    promotion = find_promotion()
    if promotion is None:
        return log(Review(sentence="nothing to review: production points at no version that a release brought there"))
    window = Window.after(promotion.at, systems().settings.review)
    phase = window.phase(utc_now())
    if phase == "over":
        return log(_unjudged(promotion, window))
    labels = count_labels(promotion, window)
    limits = systems().settings.review
    verdict = judge_late(labels.current, labels.previous, labels.promise, limits, closed=phase == "last look")
    review = log(_judged(promotion, window, verdict))
    show_table("release-review", table(verdict.readings), review.sentence)
    if dry_run:
        return review
    harmful = verdict.decision is Decision.rollback
    keep(review.model_copy(update={"action": "called for"}) if harmful else review)
    return review if not harmful else answer_harm(review, act)


@task(
    name="find-promotion",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=300,
)
def find_promotion() -> Promotion | None:
    """The promotion that production rests on."""
    connected = systems()
    history = connected.registry.alias_history("production")
    return last_promotion(history, journal.releases(connected.store, connected.bucket))


def last_promotion(history: Sequence[AliasMove], records: Sequence[ReleaseRecord]) -> Promotion | None:
    """The last move of production, oldest moves and records first. None where there is none, or where it was a
    rollback: the version that came back has been reviewed in its own time."""
    if not history or (move := history[-1]).to is None:
        return None
    begun = [record for record in records if record.version == str(move.to) and record.started_at <= move.at]
    if begun and begun[-1].kind == "rollback":
        return None
    return Promotion(move.to, move.moved_from, move.at)


@task(
    name="count-labels",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=300,
)
def count_labels(promotion: Promotion, window: Window) -> Labels:
    """The labelled predictions of the version after its promotion, and of the one before it up to then."""
    connected, version, previous = systems(), promotion.version, promotion.previous
    store = FeedbackStore(connected.settings.database)
    metrics = connected.registry.manifest(version).metrics
    promise = Promise(metrics.get("accuracy"), len(model_metadata(connected.registry, version).classes))
    current = _labelled(store, version, window.promoted_at, window.until)
    before = _labelled(store, previous, window.since, window.promoted_at) if previous else None
    return Labels(current, before, promise)


def _labelled(store: FeedbackStore, version: Version, start: datetime, end: datetime) -> Labelled:
    tally = store.tally(str(version), start, end)
    rates = {name: Rate(wrong, total) for name, (wrong, total) in tally.by_class.items()}
    return Labelled(str(version), rates, tally.disputed)


def _unjudged(promotion: Promotion, window: Window) -> Review:
    version = promotion.version
    sentence = f"nothing to review: the review of {version} closed on {window.closes_at:%Y-%m-%d}"
    return Review(version=str(version), promoted_at=promotion.at, closes_at=window.closes_at, sentence=sentence)


def _judged(promotion: Promotion, window: Window, verdict: Verdict) -> Review:
    sentence = f"{_heading(promotion, window, verdict)}: {'; '.join(verdict.reasons)}"
    return Review(
        version=str(promotion.version),
        previous=str(promotion.previous) if promotion.previous else None,
        promoted_at=promotion.at,
        closes_at=window.closes_at,
        decision=verdict.decision,
        sentence=sentence,
        verdict=verdict.to_json() | {"sentence": sentence},
    )


def _heading(promotion: Promotion, window: Window, verdict: Verdict) -> str:
    version, decision = promotion.version, verdict.decision
    if decision is Decision.rollback:
        return f"{version} does harm and should give way to {promotion.previous}"
    if decision is Decision.inconclusive:
        broken = any(reading.ok is False for reading in verdict.readings)
        return f"{version} breaks a promise but stays" if broken else f"nothing can be concluded on {version}"
    until = f", under review until {window.closes_at:%Y-%m-%d}" if decision is Decision.wait else ""
    return f"{version} stays{until}"


def log(review: Review) -> Review:
    """Tell the log."""
    get_run_logger().info(review.sentence)
    return review


def table(readings: Sequence[GateReading]) -> list[dict[str, Any]]:
    """The gates as rows: shares in percent, evidence as odds."""
    return [
        {
            "gate": reading.name,
            "value": f"{reading.value:.1%}",
            "limit": f"{reading.limit:.1%}",
            "true value between": "–" if reading.low is None else f"{reading.low:.1%} and {reading.high:.1%}",
            "labels": reading.samples,
            "evidence": odds(reading.log_evidence or 0.0),
            "needed": odds(reading.log_threshold or 0.0),
            "says": {None: "too few labels", True: "no harm shown", False: "harm"}[reading.ok],
        }
        for reading in readings
    ]


@task(name="record-review", cache_policy=NO_CACHE)
def keep(review: Review) -> None:
    """Leave the verdict in the audit log, and tell whoever listens for it."""
    systems().audit.record(
        actor=requester(),
        action="review",
        subject=str(review.version),
        plan=review.verdict,
        outcome="done",
        detail=review.sentence,
        run_id=run_tail(runtime.flow_run.get_id()),
    )
    names = ["khet.release.review", *(["khet.release.harmful"] if review.decision is Decision.rollback else [])]
    for name in names:
        announce(name, f"khet.version.{review.version}", str(review.version), review.model_dump(mode="json"))


def answer_harm(review: Review, act: bool) -> Review:
    """Return to the version before, or say how.

    Raises:
        GateError: `act` is off.
        SafetyError: production moved after the verdict, which is about another version.
    """
    if not act:
        raise GateError(
            f"{review.sentence}.\nNothing was changed: {review.version} serves all traffic.\n"
            f"Next: `khet rollback --to {review.previous}`, or `khet review --act` to let a review do it."
        )
    serving = systems().registry.alias("production")
    if serving is None or str(serving.version) != review.version:
        raise SafetyError(f"Production left {review.version} during its review. Nothing was changed.")
    # Not as a subflow: its record then carries this run's id, by which the crash hook finishes it after a kill.
    rollback.fn(to=str(review.previous))
    return log(
        review.model_copy(
            update={"action": "rolled back", "sentence": f"rolled back to {review.previous}: {review.sentence}"}
        )
    )
