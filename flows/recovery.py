"""After a crash: finish what was judged, undo what was not. The next run, hooks and `khet doctor --fix` use it."""

from __future__ import annotations

import os
import socket
from datetime import datetime

import psutil

from configs.errors import ExternalError, SafetyError
from flows.systems import Systems
from ml.version import Version
from tasks.cluster import Cluster, Memory, Pending, Served, Track
from tasks.cluster.procedures import Update, procedures
from tasks.lease import Lease, break_lease, holder, is_held
from tasks.registry import AliasState
from tasks.rollout import journal as journals
from tasks.rollout.journal import Intent, Journal, Kind, Process, ReleaseRecord
from tasks.rollout.procedure import served_version

# Process start times are read in clock ticks of 10 ms; two readings of one process agree within that.
CLOCK_TICKS_S = 0.02


# An incident does not wait for a rollout to end: what only adds or renews replicas has a lease of its own.
ROLLOUT_LEASE, SCALING_LEASE = "rollout", "scaling"
_SCALING: frozenset[Kind] = frozenset({"scale", "restart"})


def lease_of(kind: Kind) -> str:
    """The lease that a run of this kind holds while it works."""
    return SCALING_LEASE if kind in _SCALING else ROLLOUT_LEASE


def left_behind(systems: Systems, but: str | None = None, lease: str | None = None) -> list[ReleaseRecord]:
    """Runs that were begun and neither ended nor undone, except `but`; with `lease` only those that would hold it."""
    found = journals.unfinished(systems.store, systems.bucket)
    return [r for r in found if r.release_id != but and lease in (None, lease_of(r.kind))]


def this_process() -> Process:
    """How a release's record names this process."""
    return Process(host=socket.gethostname(), pid=os.getpid(), started_at=psutil.Process().create_time())


def is_dead(process: Process | None) -> bool | None:
    """Whether the process of a release is gone; None: it ran on another machine, or is not known."""
    if process is None or process.host != socket.gethostname():
        return None
    try:
        return bool(abs(psutil.Process(process.pid).create_time() - process.started_at) > CLOCK_TICKS_S)
    except psutil.NoSuchProcess:
        return True


def free_lease_of_the_dead(systems: Systems, name: str) -> None:
    """Take lease and turn from a run whose process is known to be gone, instead of waiting until both expire."""
    if name == ROLLOUT_LEASE:
        _free_turn_of_the_dead(systems)
    current = holder(systems.store, systems.bucket, name)
    if current is None or not is_held(current, journals.utc_now()):
        return
    if _died(systems, current.owner):
        break_lease(systems.store, systems.bucket, name, by=f"{current.owner} is dead")


def _free_turn_of_the_dead(systems: Systems) -> None:
    memory = systems.cluster.memory()
    if memory.turn is not None and is_alone(memory) and _died(systems, owner := memory.turn.owner):
        systems.cluster.remember(lambda now: now.given_back(owner))


def _died(systems: Systems, run_id: str) -> bool:
    """Whether a run is on record, and its process is known to be gone."""
    if not systems.store.exists(systems.bucket, journals.key(run_id)):
        return False
    return bool(is_dead(journals.read(systems.store, systems.bucket, run_id).process))


def refuse_running(systems: Systems, name: str, release_id: str) -> None:
    """Raise SafetyError when a live process works on this release."""
    current = holder(systems.store, systems.bucket, name)
    if current is None or current.owner != release_id or not is_held(current, journals.utc_now()):
        return
    raise SafetyError(
        f"Release {release_id} is running (its lease is renewed until {current.expires_at:%H:%M:%S} UTC or later). "
        "Nothing was changed.\nNext: wait for it, or stop its process and try again."
    )


def take_turn(cluster: Cluster, owner: str) -> None:
    """From now on `owner` changes the cluster, and whoever did so before notices.

    Raises:
        SafetyError: somebody is rolling back, who has the cluster alone.
    """
    cluster.remember(lambda memory: memory.taken(owner, journals.utc_now()))


def check_turn(cluster: Cluster, record: ReleaseRecord) -> None:
    """Return while it is this run's turn, or as long as the cluster does not say.

    Raises:
        SafetyError: another run took the cluster over.
    """
    if lease_of(record.kind) != ROLLOUT_LEASE:
        return
    try:
        turn = cluster.memory().turn
    except ExternalError as error:
        if not error.retryable:
            raise
        return
    if turn is not None and turn.owner != record.release_id:
        raise SafetyError(
            f"{turn.owner} took the cluster over from {record.release_id}. Nothing more is changed by this run.\n"
            "Next: `khet rollback --history` shows what serves since."
        )


def settle(systems: Systems) -> str:
    """Finish a rollback that the registry was not there for, or that was cut short; what was done, in a sentence, empty
    where there was nothing to do. Repeatable; whoever calls it holds the rollout lease.

    Raises:
        SafetyError: production was moved to another version since, but the cluster serves that of the rollback.
    """
    memory = systems.cluster.memory()
    if (left := memory.pending) is None:
        return ""
    target, now_at = Version.parse(left.version), systems.registry.alias("production")
    if now_at is not None and now_at.version != target and now_at.since > left.at:
        return _drop_pending(systems, left, now_at)
    try:
        serve(systems, target)
    except ExternalError as error:
        raise ExternalError(
            f"The rollback to {target} by {left.by} cannot be finished yet: {error}\nThe traffic is as it was.\n"
            "Next: `khet rollback --to VERSION` with one that can be served takes its place.",
            retryable=error.retryable,
        ) from error
    systems.registry.move_alias("production", target, by=left.by, reason=left.reason)
    _drop_guests(systems.cluster)
    supersede(systems, left.run_id, before=left.at)
    _enter(systems, left)
    # Last of all: a crash before this does it all again, one after it would let a superseded promotion go on.
    done = Served(version=left.version, at=left.at, by=left.by, reason=left.reason)
    systems.cluster.remember(lambda m: m.with_served(done).without(left))
    sentence = f"the rollback to {target} that {left.by} began at {left.at:%Y-%m-%d %H:%M} UTC was finished"
    audit(systems, left.by, left.run_id, sentence)
    return sentence


def is_alone(memory: Memory) -> bool:
    """Whether somebody is rolling back now, who has the cluster alone."""
    turn = memory.turn
    return turn is not None and turn.until is not None and turn.until > journals.utc_now()


def settle_under_lease(systems: Systems, ttl_s: float) -> str:
    """`settle` in the name of the rollback, whose lease may have outlived it, when nobody else changes the cluster.

    Raises:
        SafetyError: somebody does, or see `settle`.
        ExternalError: the registry or the cluster does not answer.
    """
    free_lease_of_the_dead(systems, ROLLOUT_LEASE)
    memory = systems.cluster.memory()
    if memory.pending is None:
        return ""
    if is_alone(memory):
        raise SafetyError("The rollback is still at work, or was a moment ago. Next: wait for it.")
    owner = memory.pending.run_id
    with Lease.acquire(systems.store, systems.bucket, ROLLOUT_LEASE, owner, ttl_s):
        take_turn(systems.cluster, owner)
        return settle(systems)


def unsettled(systems: Systems) -> str:
    """The rollback that is not finished, in words; empty where there is none."""
    left = systems.cluster.memory().pending
    return f"rollback to {left.version} by {left.by}, {left.at:%Y-%m-%d %H:%M} UTC" if left else ""


def seed_memory(systems: Systems) -> None:
    """Let a cluster that remembers nothing yet learn from the registry which versions it served."""
    if systems.cluster.memory().served:
        return
    moves = [move for move in systems.registry.alias_history("production") if move.to is not None]
    entries = [Served(version=str(move.to), at=move.at, by=move.by, reason=move.reason) for move in moves]

    def learn(memory: Memory) -> Memory:
        if memory.served:
            return memory
        for entry in entries:
            memory = memory.with_served(entry)
        return memory

    systems.cluster.remember(learn)


def _drop_pending(systems: Systems, left: Pending, now_at: AliasState) -> str:
    """Somebody moved production since the rollback: what serves decides who was right."""
    moved = f"{now_at.by} moved production to {now_at.version} at {now_at.since:%Y-%m-%d %H:%M} UTC"
    if served_version(systems.cluster) != now_at.version:
        raise SafetyError(
            f"The rollback to {left.version} of {left.at:%Y-%m-%d %H:%M} UTC was not finished: {moved}, after it, but "
            f"the cluster does not serve that. Nothing was changed.\n"
            f"Next: `khet rollback --to {left.version}` (or --to {now_at.version}) makes both agree."
        )
    systems.cluster.remember(lambda memory: memory.without(left))
    sentence = f"the rollback to {left.version} is out of date: {moved}, after it, and that serves"
    audit(systems, left.by, left.run_id, sentence)
    return sentence


def _enter(systems: Systems, left: Pending) -> None:
    """The record that the rollback could not write, or not close."""
    reasons = (f"production returned from {left.previous or 'nothing'} to {left.version}: {left.reason}",)
    record = ReleaseRecord(
        release_id=left.run_id,
        kind="rollback",
        started_at=left.at,
        requested_by=left.by,
        parameters={},
        version=left.version,
        champion=left.previous,
    )
    if systems.store.exists(systems.bucket, journals.key(left.run_id)):
        record = journals.read(systems.store, systems.bucket, left.run_id)
    if record.finished_at is None:
        Journal(systems.store, systems.bucket, record).close("rolled_back", reasons)


def supersede(systems: Systems, by: str, before: datetime) -> None:
    """A rollout that was begun before a rollback must not finish its promotion after it."""
    for record in left_behind(systems, but=by, lease=ROLLOUT_LEASE):
        if record.started_at < before:
            Journal(systems.store, systems.bucket, record).close("failed", (f"superseded by rollback {by}",))


def recover(systems: Systems, record: ReleaseRecord) -> str:
    """Finish or undo one interrupted release; returns what was done, in a sentence. Repeatable."""
    journal = Journal(systems.store, systems.bucket, record)
    intent = record.intent
    if intent is None:
        sentence = "it had not changed anything yet"
    elif intent.action == "update":
        undo_update(systems, journal)
        sentence = f"its update to {intent.version} was undone; production serves {intent.previous}"
    elif intent.action in ("scale", "restart"):
        sentence = finish_scaling(systems, intent)
        journal.close("done", (f"interrupted, and {sentence}",))
        return _audited(systems, record, sentence)
    elif intent.action == "canary":
        undo_canary(systems, journal)
        sentence = f"its canary {intent.version} was taken away; production serves {intent.previous or 'nothing'}"
    else:
        finish_switch(systems, Version.parse(intent.version), record)
        sentence = f"{intent.version} had been judged; its promotion was finished"
        journal.close("rolled_back" if record.kind == "rollback" else "promoted", (f"interrupted, and {sentence}",))
        return _audited(systems, record, sentence)
    goes_on = f"; `khet release --resume {record.release_id}` goes on" if record.kind == "release" else ""
    journal.close("failed", (f"interrupted: {sentence}{goes_on}",))
    return _audited(systems, record, sentence)


def recover_under_lease(systems: Systems, record: ReleaseRecord, ttl_s: float) -> str:
    """`recover`, when no live run holds the lease that this one held.

    Raises:
        SafetyError: one does.
    """
    lease_name = lease_of(record.kind)
    free_lease_of_the_dead(systems, lease_name)
    refuse_running(systems, lease_name, record.release_id)
    with Lease.acquire(systems.store, systems.bucket, lease_name, record.release_id, ttl_s):
        settled = ""
        if lease_name == ROLLOUT_LEASE:
            take_turn(systems.cluster, record.release_id)
            settled = settle(systems)
        now = journals.read(systems.store, systems.bucket, record.release_id)
        return recover(systems, now) if now.outcome == "running" else settled or "it had ended meanwhile"


def undo_canary(systems: Systems, journal: Journal) -> None:
    """Take an unjudged canary away, if this release had begun one."""
    intent = journal.record.intent
    if intent is None or intent.action != "canary":
        return
    if intent.previous is None:
        systems.cluster.set_weights({})
        systems.cluster.remove(Track.stable)
    else:
        systems.cluster.set_weights({Track.stable: 1.0})
        systems.cluster.remove(Track.canary)
        systems.cluster.remove(Track.baseline)
    if journal.record.kind == "ab_test":
        procedures(systems.cluster).stick(on=False)
    journal.change(intent=None)


def undo_update(systems: Systems, journal: Journal) -> None:
    """Put back what a rolling update had begun to replace, if this run had begun one. Repeatable."""
    intent = journal.record.intent
    if intent is None or intent.action != "update" or intent.previous is None:
        return
    before = Update(
        version=Version.parse(intent.previous),
        replicas=intent.details["replicas"],
        deadline_s=systems.settings.cluster.ready_timeout_s,
        image=intent.details.get("previous_image"),
    )
    change = procedures(systems.cluster)
    change.update(before)
    change.wait_updated(before)
    journal.change(intent=None)


def finish_scaling(systems: Systems, intent: Intent) -> str:
    """Ask again for what was asked: the same number twice is the same number, and a second restart harms nobody."""
    track = Track(intent.details["track"])
    if intent.action == "scale":
        systems.cluster.scale(track, intent.details["replicas"])
        return f"{track} was scaled to {intent.details['replicas']} replica(s)"
    systems.cluster.restart(track)
    return f"{track} was restarted"


def finish_switch(systems: Systems, version: Version, record: ReleaseRecord) -> None:
    """Serve `version` everywhere and point production at it: the end of a promotion or rollback. Repeatable."""
    by, reason = record.requested_by, "finished after an interruption"
    serve(systems, version)
    systems.registry.move_alias("production", version, by=by, reason=reason)
    served = Served(version=str(version), at=journals.utc_now(), by=by, reason=reason)
    systems.cluster.remember(lambda memory: memory.with_served(served))
    _drop_guests(systems.cluster)


def serve(systems: Systems, version: Version) -> None:
    """All traffic to `version` on stable, as soon as stable is ready. Repeatable. It keeps the replicas it has."""
    cluster, wanted = systems.cluster, systems.settings.cluster
    now = sum(replica.track is Track.stable for replica in cluster.status().replicas)
    cluster.deploy(Track.stable, version, max(now, wanted.replicas))
    cluster.wait_ready(Track.stable, wanted.ready_timeout_s)
    cluster.set_weights({Track.stable: 1.0})


def _drop_guests(cluster: Cluster) -> None:
    for track in (Track.canary, Track.baseline, Track.previous):
        cluster.remove(track)


def _audited(systems: Systems, record: ReleaseRecord, sentence: str) -> str:
    audit(systems, record.requested_by, record.release_id, sentence)
    return sentence


def audit(systems: Systems, actor: str, run_id: str, sentence: str) -> None:
    """Leave a record of what was put right."""
    systems.audit.record(
        actor=actor, action="recover", subject=run_id, plan={}, outcome="done", detail=sentence, run_id=run_id
    )


def last_reason(record: ReleaseRecord) -> str:
    """The sentence of the last look, for a record that was interrupted after it."""
    return "; ".join(record.looks[-1]["reasons"]) if record.looks else "its looks were not kept"
