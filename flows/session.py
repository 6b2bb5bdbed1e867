"""One release from lease to record: what `flows.release` needs around its steps, so that it reads like the runbook."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import httpx
from prefect import Task, get_run_logger

from configs.errors import ConfigError, ExternalError, IntegrityError, KhetError, SafetyError
from flows import recovery
from flows.systems import Systems, requester, systems
from flows.tidy import tidy_trainings, tidy_work_folders
from ml.version import Version
from tasks.cluster import Served, Track
from tasks.lease import Lease, holder
from tasks.progress import report
from tasks.rollout import looks
from tasks.rollout.journal import (
    Action,
    Journal,
    Kind,
    Outcome,
    ReleaseRecord,
    Severity,
    StageRecord,
    StageState,
    utc_now,
)
from tasks.rollout.keeping import keep_previous
from tasks.rollout.procedure import Clock, Labels, Look, Plan, Rollout, plan_rollout, served_version, wants_baseline
from tasks.rollout.replay import Replayer
from tasks.rollout.shadow import Shadow
from tasks.rollout.verdict import Decision, Paired, Verdict

if TYPE_CHECKING:
    from flows.candidate import Candidate

P = ParamSpec("P")
R = TypeVar("R")
LEASE = recovery.ROLLOUT_LEASE
LEASE_TTL_S = 45.0
# Looks closer together than this are not all kept: a long rollout would grow its record without telling more.
LOOK_EVERY_S = 2.0
# Longer than a pod answers after it was told to end (cluster.kubernetes.pre_stop_s), and a proxy needs to hear of it.
_SETTLING_S = 30.0
_IN_A_ROW = 5
_ASK_AGAIN_S = 0.1
RESUMABLE: frozenset[Outcome] = frozenset({"running", "failed"})


class ReleaseSession:
    """A release in progress: its record, its lease, and the systems it changes."""

    def __init__(self, connected: Systems, journal: Journal, lease: Lease) -> None:
        self.systems = connected
        self._journal = journal
        self._lease = lease
        self._looked_at = 0.0
        self._clock = Clock()
        self._shadow = Shadow()

    @property
    def record(self) -> ReleaseRecord:
        """The record as it stands in the object store."""
        return self._journal.record

    @property
    def id(self) -> str:
        """The release's id."""
        return self.record.release_id

    @property
    def champion(self) -> Version | None:
        """The version that production pointed at when the release began."""
        return Version.parse(self.record.champion) if self.record.champion else None

    def run(self, stage: str, step: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one Prefect task as a stage of the record."""
        self.check()
        report(stage, "running")
        self._journal.change(stage=stage)
        started, began = utc_now(), time.monotonic()
        state = step(*args, return_state=True, **kwargs)
        seconds = time.monotonic() - began
        result = state.result(raise_on_failure=False)
        failed = isinstance(result, BaseException)
        kind: StageState = "failed" if failed else "cached" if state.name == "Cached" else "done"
        note = str(result).splitlines()[0] if failed and str(result) else ""
        line = StageRecord(name=stage, state=kind, started_at=started, duration_s=round(seconds, 3), note=note)
        if not (failed and self.taken_over()):
            self._journal.change(stage=None, stages=(*self.record.stages, line))
        report(stage, kind, note or f"{seconds:.1f} s")
        if isinstance(result, BaseException):
            raise result
        return result

    def check(self) -> None:
        """Return while this process may change something.

        Raises:
            SafetyError: its lease was lost, or another run, a rollback say, took the cluster over.
        """
        self._lease.check()
        recovery.check_turn(self.systems.cluster, self.record)

    def say(self, text: str, severity: Severity = "info") -> None:
        """Add a line to the timeline, the log and the terminal."""
        self._journal.say(text, severity)
        get_run_logger().info(text)
        report("release", "note", text)

    def change(self, **values: Any) -> None:
        """Write fields of the record."""
        self._journal.change(**values)

    def guard(self) -> None:
        """Return while this process may go on.

        Raises:
            SafetyError: it lost its lease.
        """
        self._lease.check()

    def intend(self, action: Action, version: str, previous: str | None, **details: Any) -> None:
        """Write down what is about to change; this process must still be allowed to."""
        self.check()
        self._journal.intend(action, version, previous, **details)

    def audit(
        self, action: str, subject: str, outcome: str, detail: str = "", plan: Mapping[str, Any] | None = None
    ) -> None:
        """Leave a record of a change to a system."""
        self.systems.audit.record(
            actor=self.record.requested_by,
            action=action,
            subject=subject,
            plan=dict(plan or {}),
            outcome=outcome,  # type: ignore[arg-type]
            detail=detail,
            run_id=self.id,
        )

    def plan_rollout(self, candidate: Candidate) -> Rollout:
        """The rollout of a candidate on the configured cluster."""
        if candidate.version is None:
            raise SafetyError("a candidate without a published version cannot be rolled out. Nothing was changed.")
        current = self.systems.settings
        plan = plan_rollout(
            candidate.version,
            self.champion,
            current.canary,
            replicas=current.cluster.replicas,
            canary=current.cluster.canary_replicas,
            classes=len(candidate.evaluation.classes) if candidate.comparable else 0,
            baseline=baseline_wanted(self.systems),
        )
        self.audit("rollout", str(plan.version), "intended", plan={"steps": plan.describe()})
        return self.rollout(plan)

    def rollout(self, plan: Plan) -> Rollout:
        """A rollout of `plan` that stops when this process may change nothing any more."""
        current = self.systems.settings
        return Rollout(
            self.systems.cluster,
            self._journal,
            plan,
            current.canary,
            current.judge,
            current.cluster.ready_timeout_s,
            guard=self.check,
            on_look=self._keep_look,
            clock=self._clock,
            shadow=self._shadow,
            keep_previous_s=current.cluster.keep_previous_s,
        )

    def _keep_look(self, look: Look) -> None:
        now = self._clock.monotonic()
        report("canary", "running", f"{look.step}: {'; '.join(look.verdict.reasons)}")
        if look.verdict.decision is Decision.wait and now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        self._journal.change(looks=looks.with_look(self.record.looks, looks.to_json(look)))

    def note(self, verdict: Verdict) -> Verdict:
        """Write a step's verdict into the timeline, and with all its numbers into the audit log."""
        severity: Severity = "error" if verdict.decision in (Decision.rollback, Decision.inconclusive) else "info"
        # Before the canary is deployed there is nothing to roll back.
        stopped = verdict.decision is Decision.rollback and self.record.intent is None
        sentence = f"stopped: {'; '.join(verdict.reasons)}" if stopped else verdict.sentence
        self.say(sentence, severity)
        self.audit("judge", self.record.version or self.id, "done", detail=sentence, plan=verdict.to_json())
        return verdict

    @contextlib.contextmanager
    def replay(self, candidate: Candidate) -> Iterator[Labels]:
        """Labelled traffic through the gateway while the block runs, where settings or a first release ask for it."""
        current = self.systems.settings
        gateway = current.cluster.gateway_url
        if gateway is None or not (current.replay.enabled or self.champion is None):
            yield lambda _champion, _challenger: Paired()
            return
        with Replayer(gateway, candidate.probes(current.replay.max_images), current.replay, self._shadow) as replayer:
            yield replayer.paired
        if replayer.failed:
            sample = "; ".join(replayer.failures())
            self.say(
                f"{replayer.failed} of {replayer.sent} replayed requests failed for the client: {sample}", "warning"
            )

    def ensure_champion_serves(self, plan: Plan) -> None:
        """Production must be served before a canary is tried beside it.

        Raises:
            SafetyError: the cluster serves another version than the alias names.
        """
        served = served_version(self.systems.cluster)
        if served == plan.champion or plan.champion is None:
            return
        if served is not None:
            raise SafetyError(
                f"The cluster serves {served} but production points at {plan.champion}. Nothing was changed.\n"
                "Next: `khet rollback --to VERSION` makes both agree."
            )
        self.say(f"nothing is served yet: deploying the champion {plan.champion} first")
        cluster = self.systems.cluster
        cluster.deploy(Track.stable, plan.champion, plan.replicas)
        cluster.wait_ready(Track.stable, self.systems.settings.cluster.ready_timeout_s)
        cluster.set_weights({Track.stable: 1.0})

    def promotion_begun(self, version: Version | None) -> bool:
        """Whether an earlier attempt of this release had been judged and was promoting."""
        intent = self.record.intent
        return intent is not None and intent.action == "promote" and intent.version == str(version)

    def earlier_verdict(self) -> Verdict:
        """The verdict of the attempt that was interrupted while it promoted."""
        reasons = (f"judged good before the interruption: {recovery.last_reason(self.record)}",)
        return Verdict(Decision.promote, reasons, (), {})

    def verify(self, rollout: Rollout) -> None:
        """Check from outside that all agree: cluster, gateway and alias.

        Raises:
            IntegrityError: they do not.
        """
        wanted = rollout.plan.version
        found = {
            "cluster": served_version(self.systems.cluster),
            "gateway": settled_version(self.systems.settings.cluster.gateway_url, wanted),
            "alias": state.version if (state := self.systems.registry.alias("production")) else None,
        }
        wrong = {name: str(version) for name, version in found.items() if version != wanted}
        if wrong:
            raise IntegrityError(f"Promoted {wanted}, but {wrong}. Next: `khet doctor --fix`.")
        self.say(f"verified: cluster, gateway and alias agree on {wanted}")

    def remember_served(self, version: Version, before: Version, reason: str) -> None:
        """Tell the cluster what it serves now, and to keep what it served before, by the settings."""
        cluster, now = self.systems.cluster, utc_now()
        served = Served(version=str(version), at=now, by=self.record.requested_by, reason=reason)
        cluster.remember(lambda memory: memory.with_served(served))
        if kept := keep_previous(cluster, before, self.systems.settings.cluster.keep_previous_s, now):
            self.say(kept)

    def close(self, outcome: str, reasons: tuple[str, ...]) -> ReleaseRecord:
        """End the record."""
        done = "done" if outcome in ("promoted", "done") else "undone"
        self._clear_candidate(outcome)
        self.audit(self.record.kind, self.record.version or self.id, done, detail=f"{outcome}: {'; '.join(reasons)}")
        return self._journal.close(outcome, reasons)  # type: ignore[arg-type]

    def _clear_candidate(self, outcome: str) -> None:
        """A version that was promoted or refused is no candidate any more."""
        registry = self.systems.registry
        candidate = registry.alias("candidate")
        if candidate is not None and str(candidate.version) == self.record.version:
            registry.clear_alias("candidate", by=self.record.requested_by, reason=f"release {self.id} {outcome}")

    def tidy(self) -> None:
        """Remove copies that no rollback and no resumed release needs."""
        tidy_work_folders(self.systems.settings.registry.keep_work_folders)
        tidy_trainings(self.systems.store, self.systems.bucket, RESUMABLE)

    def taken_over(self) -> bool:
        """Whether somebody else took this run's lease or its turn: the record and the cluster are theirs then."""
        try:
            recovery.check_turn(self.systems.cluster, self.record)
            current = holder(self.systems.store, self.systems.bucket, recovery.lease_of(self.record.kind))
        except SafetyError:
            return True
        except ExternalError:
            return False
        return current is None or current.owner != self.id

    def fail(self, error: BaseException) -> None:
        """An error ended the release: no unjudged canary is left behind, and the record says why.

        One that somebody else has ended meanwhile is left as they left it: the cluster may be another's by now.
        """
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(ExternalError):  # then the watchdog in the cluster and `khet doctor --fix` act
            if self.taken_over():
                report(self.record.kind.replace("_", " "), "failed", f"somebody else ended it: {text}")
                return
            recovery.undo_canary(self.systems, self._journal)
            recovery.undo_update(self.systems, self._journal)
            # A promotion that was begun stays open: it was judged, so the next run finishes it.
            outcome = "running" if self.record.intent else "failed"
            self._journal.change(outcome=outcome, reasons=(text,), finished_at=utc_now())
            self.audit(self.record.kind, self.record.version or self.id, "failed", detail=text)
        report(self.record.kind.replace("_", " "), "failed", text)


def run_tail(flow_run_id: str | None) -> str:
    """A short id of a run: the tail of its flow run's (the head is a timestamp, equal for neighbours)."""
    return (flow_run_id or "").replace("-", "")[-10:]


@contextlib.contextmanager
def open_session(
    run_id: str, asked: Mapping[str, Any], resume: str | None = None, kind: Kind = "release"
) -> Iterator[ReleaseSession]:
    """Hold the one lease for runs of this kind, finish or undo what others left, and open this run's record.

    Raises:
        SafetyError: another run holds the lease.
        ConfigError: nothing to resume under that id.
    """
    connected = systems()
    owner, name = resume or run_id, recovery.lease_of(kind)
    recovery.free_lease_of_the_dead(connected, name)
    recovery.refuse_running(connected, name, owner)
    with Lease.acquire(connected.store, connected.bucket, name, owner, LEASE_TTL_S) as lease:
        if name == LEASE:
            recovery.take_turn(connected.cluster, owner)
            recovery.settle(connected)
            recovery.seed_memory(connected)
        for left in recovery.left_behind(connected, but=owner, lease=name):
            recovery.recover(connected, left)
        session = ReleaseSession(connected, _open_journal(connected, run_id, asked, resume, kind), lease)
        report("release", "note", f"{kind.replace('_', ' ')} {session.id}")
        try:
            yield session
        except KhetError as error:
            if session.record.outcome == "running":
                session.fail(error)
            raise
        except BaseException as error:
            session.fail(error)
            raise


def _open_journal(connected: Systems, run_id: str, asked: Mapping[str, Any], resume: str | None, kind: Kind) -> Journal:
    if resume is None:
        return Journal.start(connected.store, connected.bucket, new_record(connected, run_id, asked, kind))
    journal = connected.journal(resume)
    if journal.record.outcome not in RESUMABLE:
        raise ConfigError(
            f"Release {resume} ended as {journal.record.outcome}: there is nothing to resume. Nothing was changed."
        )
    journal.change(outcome="running", finished_at=None, reasons=(), process=recovery.this_process())
    journal.say("resumed")
    return journal


def new_record(connected: Systems, run_id: str, asked: Mapping[str, Any], kind: Kind) -> ReleaseRecord:
    """The record of a run that begins now."""
    production = connected.registry.alias("production")
    return ReleaseRecord(
        release_id=run_id,
        kind=kind,
        started_at=utc_now(),
        requested_by=requester(),
        process=recovery.this_process(),
        parameters=dict(asked),
        champion=str(production.version) if production else None,
    )


def baseline_wanted(connected: Systems) -> bool:
    """Whether releases run the champion once more beside the canary, by the settings and the cluster's room."""
    current = connected.settings
    sizes = {"replicas": current.cluster.replicas, "canary": current.cluster.canary_replicas}
    return wants_baseline(connected.cluster, current.canary, **sizes)


def settled_version(gateway_url: str | None, wanted: Version | None) -> Version | None:
    """The version that answers at the gateway, as soon as it is `wanted` several times in a row; else the other one.

    Replicas that end go on answering for seconds, until everybody who routes to them has heard of it.

    Raises:
        ExternalError: the gateway itself cannot be reached.
    """
    over, agreed = time.monotonic() + _SETTLING_S, 0
    while True:
        found = answering_version(gateway_url)
        agreed = agreed + 1 if found == wanted else 0
        if agreed == _IN_A_ROW or gateway_url is None or (not agreed and time.monotonic() > over):
            return found
        time.sleep(_ASK_AGAIN_S)


def answering_version(gateway_url: str | None) -> Version | None:
    """The version that answers at the gateway, None when nobody does.

    Raises:
        ExternalError: the gateway itself cannot be reached.
    """
    if gateway_url is None:
        return None
    try:
        answer = httpx.get(f"{gateway_url.rstrip('/')}/version", timeout=10)
    except httpx.HTTPError as error:
        raise ExternalError(f"The gateway at {gateway_url} does not answer: {error}. Next: `khet status`.") from error
    return Version.parse(answer.json()["version"]) if answer.status_code == 200 else None
