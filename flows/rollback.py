"""Roll the service back to a version that served before (runbook: Model Rollback)."""

from __future__ import annotations

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE

from configs.errors import GateError, IntegrityError
from flows import hooks, recovery
from flows.reporting import show_plan
from flows.session import LEASE, LEASE_TTL_S, answering_version, run_tail
from flows.systems import Systems, requester, systems
from ml.version import Version
from tasks.lease import Lease, break_lease
from tasks.prefect_support import RETRY_DELAYS, retry_external
from tasks.progress import report
from tasks.rollout.journal import Journal, ReleaseRecord, utc_now
from tasks.rollout.procedure import served_version


@flow(name="rollback", flow_run_name="rollback-to-{to}", on_crashed=[hooks.undo_release], validate_parameters=True)
def rollback(
    to: str = "previous",
    dry_run: bool = False,
    force: bool = False,
) -> ReleaseRecord:
    """Return all traffic to a version that served production before, and verify it.

    Args:
        to: Version such as v1.2.0, or previous.
        dry_run: Show what would be done, change nothing.
        force: Take over from a release that is running.

    Raises:
        GateError: it never served production, or it serves already.
        IntegrityError: its files do not verify.
        SafetyError: a release is running; `force` takes over from it.
        ExternalError: the cluster did not reach the desired state; the next run finishes it.
    """
    connected = systems()
    target, current = resolve_version(connected, to)
    record = new_record(target, current, to)
    if dry_run:
        return show(record)
    recovery.free_lease_of_the_dead(connected, LEASE)
    if force:
        break_lease(connected.store, connected.bucket, LEASE, by=record.requested_by)
    with Lease.acquire(connected.store, connected.bucket, LEASE, record.release_id, LEASE_TTL_S):
        journal = Journal.start(connected.store, connected.bucket, record)
        verify_files(target)
        journal.intend("rollback", str(target), str(current) if current else None)
        switch_traffic(target)
        verify_serving(target)
        move_alias(target, record.requested_by)
        supersede_others(connected, record.release_id)
        return journal.close("rolled_back", (f"production returned from {current or 'nothing'} to {target}",))


def resolve_version(connected: Systems, to: str) -> tuple[Version, Version | None]:
    """The version to return to, and the one that production points at.

    Raises:
        GateError: there is no such version to return to.
    """
    production = connected.registry.alias("production")
    current = production.version if production else None
    served = sorted({move.to for move in connected.registry.alias_history("production") if move.to})
    if to == "previous":
        before = connected.registry.alias("previous")
        if before is None:
            raise GateError("There is no previous version to roll back to. Nothing was changed.")
        return before.version, current
    target = Version.parse(to)
    if target not in served:
        known = ", ".join(str(version) for version in served) or "none"
        raise GateError(f"{target} never served production (those that did: {known}). Nothing was changed.")
    return target, current


def new_record(target: Version, current: Version | None, to: str) -> ReleaseRecord:
    """The record of this rollback."""
    return ReleaseRecord(
        release_id=run_tail(runtime.flow_run.get_id()),
        kind="rollback",
        started_at=utc_now(),
        requested_by=requester(),
        process=recovery.this_process(),
        parameters={"to": to},
        version=str(target),
        champion=str(current) if current else None,
    )


def show(record: ReleaseRecord) -> ReleaseRecord:
    """What a rollback would do; nothing is changed."""
    sentences = [
        f"verify every file of {record.version}",
        f"deploy {record.version} on stable beside {record.champion}, wait until it is ready, send it all traffic",
        f"point production at {record.version}",
    ]
    for sentence in sentences:
        get_run_logger().info("would: %s", sentence)
        report("plan", "note", sentence)
    show_plan(record, sentences)
    return record.model_copy(update={"outcome": "dry_run", "finished_at": utc_now()})


@task(name="verify-files", cache_policy=NO_CACHE, retries=2, retry_condition_fn=retry_external, timeout_seconds=600)
def verify_files(target: Version) -> None:
    """Every file matches its manifest, and the manifest its signature."""
    report("verify files", "running")
    checked = systems().registry.verify(target)
    if not checked.ok:
        problems = "; ".join(checked.problems)
        raise IntegrityError(f"{target} does not verify: {problems}. Nothing was deployed; traffic is as it was.")
    report("verify files", "done")


@task(
    name="switch-traffic",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=600,
)
def switch_traffic(target: Version) -> None:
    """Replicas first, then traffic."""
    report("switch traffic", "running", f"starting {target}")
    connected = systems()
    connected.cluster.rollback(target, connected.settings.cluster.replicas)
    report("switch traffic", "done")


@task(name="verify-serving", cache_policy=NO_CACHE, retries=2, retry_condition_fn=retry_external, timeout_seconds=120)
def verify_serving(target: Version) -> None:
    """The cluster and the gateway agree on the version.

    Raises:
        GateError: they do not.
    """
    connected = systems()
    found = {served_version(connected.cluster), answering_version(connected.settings.cluster.gateway_url)}
    if found != {target}:
        raise GateError(f"After the rollback to {target} the service answers as {found}. Next: `khet status`.")
    report("verify serving", "done", f"{target} answers")


@task(
    name="move-alias",
    cache_policy=NO_CACHE,
    retries=4,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=300,
)
def move_alias(target: Version, by: str) -> None:
    """Point production at the version that now serves."""
    connected = systems()
    connected.registry.move_alias("production", target, by=by, reason="rollback")
    connected.audit.record(
        actor=by, action="rollback", subject=str(target), plan={}, outcome="done", detail="", run_id=None
    )


def supersede_others(connected: Systems, but: str) -> None:
    """A release that was interrupted or taken over must not finish its promotion after this rollback."""
    for record in recovery.left_behind(connected, but=but):
        journal = Journal(connected.store, connected.bucket, record)
        journal.close("failed", (f"superseded by rollback {but}",))
