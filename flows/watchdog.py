"""Look every minute whether somebody left a rollout half done, and finish or undo it."""

from __future__ import annotations

from collections.abc import Iterator

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE

from configs.errors import ExternalError, KhetError, SafetyError
from flows import recovery
from flows.books import ANSWER_S
from flows.session import LEASE, LEASE_TTL_S, run_tail
from flows.systems import Systems, requester, systems
from ml.results import Record
from tasks.cluster import Cluster, ClusterStatus, Track
from tasks.cluster.procedures import procedures
from tasks.lease import Lease, holder, is_held
from tasks.prefect_support import RETRY_DELAYS, retry_external, show_table
from tasks.rollout.journal import ReleaseRecord, utc_now
from tasks.rollout.keeping import is_over


class Watch(Record):
    """What the watchdog put right (or, in a dry run, would), and what it could not. Both empty: all is well."""

    done: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@flow(name="rollout-watchdog", validate_parameters=True)
def rollout_watchdog(dry_run: bool = False) -> Watch:
    """Return the traffic of a canary whose lease has expired, finish a rollback that the registry was not there for,
    finish or undo runs whose process is gone, and take away replicas that belong to no run or were kept long enough.

    Args:
        dry_run: Say what it would do, change nothing.

    Raises:
        ExternalError: something could not be put right; the next minute tries again.
    """
    parts = [return_traffic(dry_run), finish_rollback(dry_run), finish_runs(dry_run), remove_orphans(dry_run)]
    watch = Watch(
        done=tuple(text for part in parts for text in part.done),
        failed=tuple(text for part in parts for text in part.failed),
    )
    if watch == Watch():
        get_run_logger().info("all is well")
        return watch
    tell(watch, dry_run=dry_run)
    if watch.failed and not dry_run:
        raise ExternalError("; ".join(watch.failed))
    return watch


@task(
    name="return-traffic",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=120,
)
def return_traffic(dry_run: bool) -> Watch:
    """All traffic to stable where nobody renewed the lease of a split. The local node does it by itself; on Kubernetes
    nothing else does while every flow is dead."""
    lost = procedures(systems().cluster).guard(dry_run=dry_run)
    return Watch(done=(lost,) if lost else ())


@task(name="finish-rollback", cache_policy=NO_CACHE, timeout_seconds=1800)
def finish_rollback(dry_run: bool) -> Watch:
    """What a rollback could not do, as soon as the registry answers."""
    connected = systems()
    what = recovery.unsettled(connected)
    if not what or recovery.is_alone(connected.cluster.memory()):
        return Watch()
    if dry_run:
        return Watch(done=(f"{what}: not finished yet",))
    try:
        done = recovery.settle_under_lease(connected.impatient(ANSWER_S), LEASE_TTL_S)
    except KhetError as error:
        return Watch(failed=(f"{what}: {error}",))
    return Watch(done=(done,) if done else ())


@task(name="finish-runs", cache_policy=NO_CACHE, timeout_seconds=3600)
def finish_runs(dry_run: bool) -> Watch:
    """Finish or undo every run that was left half done; one that cannot be helped now does not stop the others."""
    connected = systems()
    done, failed = [], []
    for record in forsaken(connected):
        try:
            done.append(f"{record.kind} {record.release_id}: {_recover(connected, record, dry_run)}")
        except KhetError as error:
            failed.append(f"{record.kind} {record.release_id}: {error}")
    return Watch(done=tuple(done), failed=tuple(failed))


def forsaken(connected: Systems) -> Iterator[ReleaseRecord]:
    """Unfinished runs that nobody works on: their lease is free, or still that of their own process, which is gone."""
    for record in recovery.left_behind(connected):
        current = holder(connected.store, connected.bucket, recovery.lease_of(record.kind))
        held = current is not None and is_held(current, utc_now())
        own = current is not None and current.owner == record.release_id
        if not held or (own and recovery.is_dead(record.process)):
            yield record


def _recover(connected: Systems, record: ReleaseRecord, dry_run: bool) -> str:
    if dry_run:
        intent = record.intent
        return f"in the middle of {intent.action} {intent.version}" if intent else "had not changed anything yet"
    return recovery.recover_under_lease(connected, record, LEASE_TTL_S)


@task(
    name="remove-orphans",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=300,
)
def remove_orphans(dry_run: bool) -> Watch:
    """Take canary and baseline away where no run is left that they could belong to, and replicas that were kept warm
    for as long as was asked for."""
    connected = systems()
    if not found(connected.cluster) or recovery.left_behind(connected, lease=LEASE):
        return Watch()
    done = []
    try:
        with Lease.acquire(connected.store, connected.bucket, LEASE, f"watchdog-{_run()}", LEASE_TTL_S):
            for track, why in found(connected.cluster).items():
                done.append(f"{track} {why}: removed")
                if not dry_run:
                    connected.cluster.remove(track)
    except SafetyError:  # a rollout has begun meanwhile, or works in its last moments: they are its own
        return Watch()
    return Watch(done=tuple(done))


def found(cluster: Cluster) -> dict[Track, str]:
    """Tracks that nobody needs, and why."""
    status = cluster.status()
    left = dict.fromkeys(orphans(status), "belongs to no rollout and gets no traffic")
    if Track.previous in status.versions and is_over(status, cluster.memory(), utc_now()):
        left[Track.previous] = f"was kept warm with {status.versions[Track.previous]}, and its time is over"
    return left


def orphans(status: ClusterStatus) -> list[Track]:
    """Tracks of a rollout that are deployed and get neither traffic nor copies."""
    used = {track for shares in (status.weights, status.mirror) for track, share in shares.items() if share}
    guests = (Track.canary, Track.baseline)
    return [track for track in status.versions if track in guests and track not in used]


def tell(watch: Watch, *, dry_run: bool) -> None:
    """The log, the UI, and (where something was changed) the audit log."""
    rows = [{"what": text, "": "would be done" if dry_run else "done"} for text in watch.done]
    rows += [{"what": text, "": "failed"} for text in watch.failed]
    for row in rows:
        get_run_logger().warning("%s: %s", row[""], row["what"])
    show_table("rollout-watchdog", rows, "What the watchdog found")
    if dry_run:
        return
    systems().audit.record(
        actor=requester(),
        action="watchdog",
        subject="rollout",
        plan=watch.model_dump(mode="json"),
        outcome="failed" if watch.failed else "done",
        detail="; ".join((*watch.done, *watch.failed)),
        run_id=_run(),
    )


def _run() -> str:
    return run_tail(runtime.flow_run.get_id())
