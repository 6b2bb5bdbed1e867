"""Release a model: train, export, evaluate, gate, publish, canary, promote (runbook: Model Deployment)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prefect import flow, runtime
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from configs.base import load_yaml
from configs.errors import GateError
from configs.settings import PROJECT_ROOT
from configs.training import TrainingConfig
from flows import hooks, reporting
from flows.candidate import Candidate, build_candidate, plan_candidate
from flows.change import show_dry_run
from flows.planning import foreseen, rollout_diff
from flows.session import ReleaseSession, open_session, run_tail
from flows.systems import systems
from ml.version import Version
from tasks.rollout.journal import ReleaseRecord
from tasks.rollout.procedure import Labels, Rollout, step_label
from tasks.rollout.steps import canary_step, deploy_canary, first_deploy, promote, smoke_test, undo_canary
from tasks.rollout.verdict import Decision, Verdict

DEFAULT_CONFIG = "configs/training/plant_disease.yaml"


class Approval(RunInput):
    """The form a person answers before a release is promoted."""

    approve: bool = Field(default=False, description="Promote this version to all users.")
    comment: str = Field(default="", max_length=500, description="Why; it is kept in the release record.")


@flow(
    name="release",
    flow_run_name=lambda: f"release-{release_id()}",
    on_crashed=[hooks.undo_release],
    on_cancellation=[hooks.undo_release, hooks.end_training],
    validate_parameters=True,
)
def release(
    config: str = DEFAULT_CONFIG,
    data: str | None = None,
    version: str | None = None,
    ask: bool = False,
    dry_run: bool = False,
    resume: str | None = None,
) -> ReleaseRecord:
    """Train a model and bring it to all users, step by step, or stop it where it is not good enough.

    Args:
        config: Training configuration, a YAML file of the project.
        data: Name of an imported dataset. Empty: the configuration's.
        version: Roll out this published version (v1.3.0) instead of training a new one.
        ask: Pause for a person before promoting; no answer means no.
        dry_run: Show what would be done, change nothing.
        resume: Id of an interrupted release to go on with.

    Raises:
        GateError: the gate, the canary's judge or a person said no; production serves the champion.
        KhetError: something failed; production serves the champion, and `--resume` goes on from there.
    """
    asked = {"config": config, "data": data, "version": version, "ask": ask}
    if dry_run:
        return show_plan(release_id(), load_config(config, data), version)
    with open_session(release_id(), asked, resume) as session:
        request = session.record.parameters
        chosen = load_config(request["config"], request["data"])
        candidate = build_candidate(session, chosen, request["version"])
        if candidate.gate.decision is Decision.rollback:
            return stop(session, candidate, "gated", candidate.gate)
        rollout = session.plan_rollout(candidate)
        verdict = try_on_traffic(session, rollout, candidate)
        if verdict.decision is not Decision.promote:
            session.run("undo canary", undo_canary, rollout)
            return stop(session, candidate, "rolled_back", verdict)
        if request["ask"] and not approved(session, rollout):
            session.run("undo canary", undo_canary, rollout)
            return stop(session, candidate, "declined", verdict)
        reason = "; ".join(verdict.reasons)
        session.run("promote", promote, rollout, session.systems.registry, session.record.requested_by, reason)
        session.verify(rollout)
        return finish(session, candidate, verdict)


def release_id() -> str:
    """The id of this release: the tail of the flow run's id (its head is a timestamp, equal for neighbours)."""
    return run_tail(runtime.flow_run.get_id())


def load_config(path: str, data: str | None) -> TrainingConfig:
    """The training configuration; relative paths are taken from here, then from the project."""
    file = Path(path)
    if not file.is_absolute() and not file.exists():
        file = PROJECT_ROOT / path
    overrides = {"dataset": data} if data else {}
    return load_yaml(TrainingConfig, file, **overrides)


def try_on_traffic(session: ReleaseSession, rollout: Rollout, candidate: Candidate) -> Verdict:
    """Shadow and canary steps, each judged; the verdict that ended them."""
    if session.promotion_begun(candidate.version):
        return session.earlier_verdict()
    if rollout.plan.champion is None:
        session.run("first deploy", first_deploy, rollout)
        with session.replay(candidate) as labels:
            floor = session.systems.settings.gate.min_accuracy
            return session.note(session.run("smoke test", smoke_test, rollout, labels, floor))
    session.ensure_champion_serves(rollout.plan)
    for sentence in foreseen(session.systems, rollout.plan):
        session.say(sentence, "warning")
    session.run("deploy canary", deploy_canary, rollout)
    with session.replay(candidate) as labels:
        for weight in rollout.plan.steps:
            verdict = decided_step(session, rollout, weight, labels)
            if verdict.decision is not Decision.advance:
                break
    return verdict


def decided_step(session: ReleaseSession, rollout: Rollout, weight: float, labels: Labels) -> Verdict:
    """One step's verdict; where the judge could not decide and the settings say so, a person does."""
    verdict = session.note(session.run(f"canary {step_label(weight)}", canary_step, rollout, weight, labels))
    if verdict.decision is not Decision.inconclusive or rollout.canary.undecided != "ask":
        return verdict
    if not approved(session, rollout, key=f"undecided-{step_label(weight)}"):
        return verdict
    decision = Decision.promote if weight == rollout.plan.steps[-1] else Decision.advance
    return session.note(replace(verdict, decision=decision, reasons=("a person decided", *verdict.reasons)))


def approved(session: ReleaseSession, rollout: Rollout, key: str = "promote") -> bool:
    """Ask a person. Nobody is served by the canary while the question stands; a timeout means no."""
    rollout.withdraw()
    timeout_s = session.systems.settings.orchestrator.approval_timeout_s
    session.say(f"waiting up to {timeout_s} s for a person: `khet approve {session.record.release_id}` or the UI")
    try:
        answer = pause_flow_run(wait_for_input=Approval, timeout=timeout_s, poll_interval=1, key=key)
    except FlowPauseTimeout:
        session.say("nobody answered in time: not approved", "warning")
        return False
    session.say(f"{'approved' if answer.approve else 'declined'} by a person. {answer.comment}".strip())
    return answer.approve


def stop(session: ReleaseSession, candidate: Candidate, outcome: str, verdict: Verdict) -> ReleaseRecord:
    """End without promotion: record it, report it, and fail the run with the reason.

    Raises:
        GateError: always.
    """
    reasons = verdict.reasons if outcome != "declined" else ("a person did not approve the promotion",)
    record = session.close(outcome, reasons)
    reporting.publish_report(session, candidate)
    serving = f"Production still serves {record.champion}." if record.champion else "Nothing is served, as before."
    words = {"gated": "stopped at the gate", "rolled_back": "rolled back", "declined": "declined"}
    raise GateError(
        f"Release {record.release_id} was {words[outcome]}: {'; '.join(reasons)}.\n{serving}\n"
        f"Next: `khet report {record.release_id}` shows why."
    )


def finish(session: ReleaseSession, candidate: Candidate, verdict: Verdict) -> ReleaseRecord:
    """End a promoted release: close the record, write the report, tidy up."""
    record = session.close("promoted", verdict.reasons)
    reporting.publish_report(session, candidate)
    session.tidy()
    return record


def show_plan(run_id: str, config: TrainingConfig, version: str | None) -> ReleaseRecord:
    """What a release would do, in sentences and as a difference of the cluster; nothing is changed.

    Raises:
        KhetError: what would stop it at once.
    """
    record, sentences = plan_candidate(run_id, config, Version.parse(version) if version else None)
    return show_dry_run(record, sentences, rollout_diff(systems(), record))
