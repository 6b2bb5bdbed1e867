"""Prefect tasks of the rollout: thin around the procedure, each with its picture in the UI."""

from __future__ import annotations

import math

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from configs.settings import settings
from ml.objects import ObjectStore
from ml.results import ExportResult
from tasks.prefect_support import RETRY_DELAYS, retry_external, show_table
from tasks.progress import report
from tasks.rollout.gates import odds
from tasks.rollout.holdout import Ledger, Scored
from tasks.rollout.procedure import Aliases, Labels, Rollout, step_label
from tasks.rollout.verdict import GateReading, Verdict


@task(
    name="gate",
    cache_policy=NO_CACHE,
    persist_result=True,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=120,
)
def gate(
    release_id: str,
    challenger: Scored,
    exported: ExportResult,
    champion: Scored | None,
    healthy: tuple[str, ...],
    version: str | None,
) -> Verdict:
    """Hold the challenger against the floors and the champion, and count the use of the holdout.

    Raises:
        IntegrityError: the two models did not answer the same images; nothing was decided.
        ExternalError: the object store, where uses are counted, is away.
    """
    current = settings()
    ledger = Ledger(ObjectStore(current.object_store), current.object_store.models_bucket)
    verdict = ledger.decide(release_id, challenger, exported, champion, healthy, current.gate, version)
    show_table(f"gate-{release_id}", table(verdict.readings), "Champion's gate")
    _say(verdict)
    return verdict


@task(
    name="deploy-canary",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=1800,
)
def deploy_canary(rollout: Rollout) -> None:
    """Start the canary, no traffic yet."""
    report("canary", "running", f"starting {rollout.plan.version}")
    rollout.deploy_canary()


@task(name="canary-step", task_run_name="canary-{weight:.0%}", cache_policy=NO_CACHE, timeout_seconds=24 * 3600)
def canary_step(rollout: Rollout, weight: float, labels: Labels) -> Verdict:
    """One share of the traffic (0: mirrored only), judged."""
    report("canary", "running", f"{step_label(weight)}: judging")
    verdict = rollout.run_step(weight, labels)
    _show(rollout, verdict)
    return verdict


@task(name="first-deploy", cache_policy=NO_CACHE, timeout_seconds=3600)
def first_deploy(rollout: Rollout) -> None:
    """Serve the first version there is."""
    rollout.first_deploy()


@task(name="smoke-test", cache_policy=NO_CACHE, timeout_seconds=3600)
def smoke_test(rollout: Rollout, labels: Labels, floor: float) -> Verdict:
    """Judge the first version on labelled probes."""
    verdict = rollout.judge_first(labels, floor)
    _show(rollout, verdict)
    return verdict


@task(name="promote", cache_policy=NO_CACHE, timeout_seconds=3600)
def promote(rollout: Rollout, aliases: Aliases, by: str, reason: str) -> None:
    """All traffic to the new version, then the alias."""
    report("promote", "running", f"replacing the stable replicas by {rollout.plan.version}")
    rollout.promote(aliases, by=by, reason=reason)


@task(
    name="undo-canary",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=600,
)
def undo_canary(rollout: Rollout) -> None:
    """All traffic back to the champion; the canary goes."""
    report("rollback", "running", "returning all traffic to the champion")
    if rollout.plan.champion is None:
        rollout.remove_first()
    else:
        rollout.undo()


def _show(rollout: Rollout, verdict: Verdict) -> None:
    """The verdict in the log, and its gates as one table that every step replaces."""
    show_table(f"canary-{rollout.journal.record.release_id}", table(verdict.readings), verdict.sentence)
    get_run_logger().info(verdict.sentence)


def table(readings: tuple[GateReading, ...]) -> list[dict[str, object]]:
    """Gate readings as rows for people; evidence has columns where a gate has any."""
    judged = any(reading.log_threshold is not None for reading in readings)
    return [_row(reading) | (_evidence(reading) if judged else {}) | {"": _state(reading)} for reading in readings]


def _row(reading: GateReading) -> dict[str, object]:
    return {
        "gate": reading.name,
        "value": _short(reading.value),
        "compared with": _short(reading.reference),
        "limit": _short(reading.limit),
        "samples": reading.samples,
    }


def _evidence(reading: GateReading) -> dict[str, object]:
    return {
        "evidence": odds(reading.log_evidence) if reading.log_evidence is not None and reading.samples else "–",
        "threshold": odds(reading.log_threshold) if reading.log_threshold is not None else "–",
        "interval": f"{_short(reading.low)} to {_short(reading.high)}" if reading.low is not None else "–",
    }


def _short(value: float | None) -> float | str:
    """Four digits; a dash for what is not known, or has no end."""
    return "–" if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _state(reading: GateReading) -> str:
    harm = {True: "no harm shown", False: "harm", None: "too few samples"}
    limit = {True: "ok", False: "broken", None: "too few samples"}
    word = (limit if reading.log_threshold is None else harm)[reading.ok]
    if reading.dry_run:
        return f"only reported: {word}"
    return word if reading.critical or reading.ok is not False else f"{word}, not critical"


def _say(verdict: Verdict) -> None:
    get_run_logger().info("%s: %s", verdict.decision.value, "; ".join(verdict.reasons))
