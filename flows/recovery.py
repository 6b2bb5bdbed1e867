"""After a crash: finish what was judged, undo what was not. The next run, hooks and `khet doctor --fix` use it."""

from __future__ import annotations

import os
import socket

import psutil

from configs.errors import SafetyError
from flows.systems import Systems
from ml.version import Version
from tasks.cluster import Track
from tasks.lease import Lease, break_lease, holder, is_held
from tasks.rollout import journal as journals
from tasks.rollout.journal import Journal, Process, ReleaseRecord

# Process start times are read in clock ticks of 10 ms; two readings of one process agree within that.
CLOCK_TICKS_S = 0.02


def left_behind(systems: Systems, but: str | None = None) -> list[ReleaseRecord]:
    """Releases that were begun and neither ended nor undone, except `but`."""
    return [r for r in journals.unfinished(systems.store, systems.bucket) if r.release_id != but]


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
    """Take the lease from a release whose process is known to be gone, instead of waiting until it expires."""
    current = holder(systems.store, systems.bucket, name)
    if current is None or not is_held(current, journals.utc_now()):
        return
    if not systems.store.exists(systems.bucket, journals.key(current.owner)):
        return
    record = journals.read(systems.store, systems.bucket, current.owner)
    if is_dead(record.process):
        break_lease(systems.store, systems.bucket, name, by=f"{current.owner} is dead")


def refuse_running(systems: Systems, name: str, release_id: str) -> None:
    """Raise SafetyError when a live process works on this release."""
    current = holder(systems.store, systems.bucket, name)
    if current is None or current.owner != release_id or not is_held(current, journals.utc_now()):
        return
    raise SafetyError(
        f"Release {release_id} is running (its lease is renewed until {current.expires_at:%H:%M:%S} UTC or later). "
        "Nothing was changed.\nNext: wait for it, or stop its process and try again."
    )


def recover(systems: Systems, record: ReleaseRecord) -> str:
    """Finish or undo one interrupted release; returns what was done, in a sentence. Repeatable."""
    journal = Journal(systems.store, systems.bucket, record)
    intent = record.intent
    if intent is None:
        sentence = "it had not changed anything yet"
    elif intent.action == "canary":
        undo_canary(systems, journal)
        sentence = f"its canary {intent.version} was taken away; production serves {intent.previous or 'nothing'}"
    else:
        finish_switch(systems, Version.parse(intent.version), record)
        sentence = f"{intent.version} had been judged; its promotion was finished"
        journal.close("promoted" if record.kind == "release" else "rolled_back", (f"interrupted, and {sentence}",))
        return _audited(systems, record, sentence)
    journal.close("failed", (f"interrupted: {sentence}; `khet release --resume {record.release_id}` goes on",))
    return _audited(systems, record, sentence)


def recover_under_lease(systems: Systems, record: ReleaseRecord, lease_name: str, ttl_s: float) -> str:
    """`recover`, when no live run holds the lease.

    Raises:
        SafetyError: one does.
    """
    free_lease_of_the_dead(systems, lease_name)
    refuse_running(systems, lease_name, record.release_id)
    with Lease.acquire(systems.store, systems.bucket, lease_name, record.release_id, ttl_s):
        return recover(systems, journals.read(systems.store, systems.bucket, record.release_id))


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
    journal.change(intent=None)


def finish_switch(systems: Systems, version: Version, record: ReleaseRecord) -> None:
    """Serve `version` everywhere and point production at it: the end of a promotion or rollback. Repeatable."""
    cluster, wanted = systems.cluster, systems.settings.cluster
    cluster.deploy(Track.stable, version, wanted.replicas)
    cluster.wait_ready(Track.stable, wanted.ready_timeout_s)
    cluster.set_weights({Track.stable: 1.0})
    systems.registry.move_alias("production", version, by=record.requested_by, reason="finished after an interruption")
    cluster.remove(Track.canary)
    cluster.remove(Track.baseline)


def _audited(systems: Systems, record: ReleaseRecord, sentence: str) -> str:
    systems.audit.record(
        actor=record.requested_by,
        action="recover",
        subject=record.release_id,
        plan={},
        outcome="done",
        detail=sentence,
        run_id=record.release_id,
    )
    return sentence


def last_reason(record: ReleaseRecord) -> str:
    """The sentence of the last look, for a record that was interrupted after it."""
    return "; ".join(record.looks[-1]["reasons"]) if record.looks else "its looks were not kept"
