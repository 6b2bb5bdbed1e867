"""Roll the service back to a version that served before (runbook: Model Rollback).

Users come first: replicas that were kept warm get all traffic at once, else new ones as soon as they are ready; then
stable, the registry and the records follow. Where the registry does not answer, they follow later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE

from configs.errors import ConfigError, ExternalError, GateError, IntegrityError
from flows import hooks, recovery
from flows.books import Books, from_registry
from flows.change import show_dry_run
from flows.history import read_history
from flows.session import run_tail, settled_version
from flows.systems import Systems, requester, systems
from ml.version import Version
from tasks.cluster import Cluster, Memory, Pending, Served, Track
from tasks.cluster.procedures import procedures
from tasks.prefect_support import RETRY_DELAYS, retry_external
from tasks.progress import report
from tasks.registry import VerifyReport
from tasks.rollout.journal import ReleaseRecord, utc_now
from tasks.rollout.procedure import served_version

_VERIFY_S = 15.0  # replicas verify what they load themselves; a store that is slow may not hold a rollback up
_WARM_S = 20.0  # replicas that were kept are ready, or they are no help
_REASON = "rollback"


@dataclass(frozen=True, slots=True)
class Switch:
    """What is changed, and how. `warm`: the target is kept on replicas, so many of them ready; `replicas`: as many as
    stable has now. `expected`: how long it will take, in words."""

    target: Version
    current: Version | None
    warm: int
    replicas: int
    expected: str

    def sentences(self) -> list[str]:
        """The plan for people."""
        last = [f"replace {self.current} on stable by {self.target}", f"point production at {self.target}"]
        if self.warm:
            first = f"send all traffic to {self.target} on {self.warm} replica(s) that were kept warm"
            return [f"{first} ({self.expected})", *last]
        return [
            f"verify every file of {self.target}",
            f"deploy {self.target} on stable beside {self.current}, wait until it is ready, send it all traffic "
            f"({self.expected})",
            last[-1],
        ]


@flow(name="rollback", flow_run_name="rollback-to-{to}", on_crashed=[hooks.undo_release], validate_parameters=True)
def rollback(
    to: str = "previous",
    dry_run: bool = False,
    force: bool = False,
) -> ReleaseRecord:
    """Return all traffic to a version that served production before, and verify it. Works while the registry is down.

    Args:
        to: Version such as v1.2.0, or previous.
        dry_run: Show the history and what would be done, change nothing.
        force: Take over from a release or rollback that is running.

    Raises:
        GateError: it never served production.
        IntegrityError: its files do not verify.
        SafetyError: a release is running; `force` takes over from it.
        ExternalError: the cluster did not reach the desired state; the next run finishes it.
    """
    began = time.monotonic()
    books = Books(systems())
    switch = plan_switch(books, to)
    record = new_record(switch, to)
    if dry_run:
        return show(books, record, switch)
    with books.hold(record, force=force):
        if not switch.warm:
            verify_files(switch.target, books)
        pending = intent(record)
        books.intend(pending)
        warm = bool(switch.warm) and switch_to_kept(switch, books)
        if warm:
            serving(books, record, switch, time.monotonic() - began, warm=True)
        if not warm or books.lost is None:
            with put_back(books, pending, switch, warm=warm):
                switch_traffic.with_options(retries=2 if books.lost is None else 0)(switch, books)
            serving(books, record, switch, time.monotonic() - began, warm=False)
        return finish(books, record, pending, switch)


def plan_switch(books: Books, to: str) -> Switch:
    """The version to return to, and the fastest way there.

    Raises:
        GateError: there is no such version to return to.
    """
    known = books.known(to)
    target, cluster = known.choose(to), books.systems.cluster
    status, wanted = cluster.status(), books.systems.settings.cluster
    kept = [r for r in status.replicas if r.track is Track.previous and r.version == target and r.ready]
    stable = sum(replica.track is Track.stable for replica in status.replicas)
    how_long = expected(cluster.memory(), warm=bool(kept), most_s=wanted.ready_timeout_s)
    return Switch(target, known.current, len(kept), max(stable, wanted.replicas), how_long)


def expected(memory: Memory, *, warm: bool, most_s: float) -> str:
    """How long it will take until all traffic has moved: as the last time, or as long as it may at most."""
    last = next((e.took_s for e in memory.served if e.took_s is not None and e.warm is warm), None)
    if last is not None:
        return f"about {last:.0f} s, as the last time"
    return f"within {_WARM_S:g} s" if warm else f"as long as a replica takes to start, at most {most_s:g} s"


def resolve_version(connected: Systems, to: str) -> tuple[Version, Version | None]:
    """The version that `to` means to the registry, and the one that production points at.

    Raises:
        GateError: there is no such version to return to.
    """
    known = from_registry(connected, to)
    return known.choose(to), known.current


def new_record(switch: Switch, to: str) -> ReleaseRecord:
    """The record of this rollback."""
    return ReleaseRecord(
        release_id=run_tail(runtime.flow_run.get_id()),
        kind="rollback",
        started_at=utc_now(),
        requested_by=requester(),
        process=recovery.this_process(),
        parameters={"to": to},
        version=str(switch.target),
        champion=str(switch.current) if switch.current else None,
    )


def intent(record: ReleaseRecord) -> Pending:
    """What the cluster is to remember until the rollback is done."""
    return Pending(
        run_id=record.release_id,
        version=str(record.version),
        previous=record.champion,
        by=record.requested_by,
        reason=_REASON,
        at=record.started_at,
    )


def show(books: Books, record: ReleaseRecord, switch: Switch) -> ReleaseRecord:
    """What a rollback would do, and what served before; nothing is changed."""
    past = read_history(books, verified=False).lines()
    plan = switch.sentences()
    if books.lost is not None:
        plan.append("the registry does not answer: it is told when it does again")
    for line in past:
        get_run_logger().info("history: %s", line)
        report("plan", "note", f"history: {line}")
    return show_dry_run(record, plan, difference(books.systems.cluster, switch) or "no difference in the cluster")


def difference(cluster: Cluster, switch: Switch) -> str:
    """What the rollback changes in the cluster, as `kubectl diff` shows it."""
    change = procedures(cluster)
    traffic = change.switch(Track.previous, None, dry_run=True) if switch.warm else ""
    stable = change.deploy(Track.stable, switch.target, switch.replicas, dry_run=True)
    return "\n".join(filter(None, (traffic, stable)))


@task(name="verify-files", cache_policy=NO_CACHE, retries=2, retry_condition_fn=retry_external, timeout_seconds=600)
def verify_files(target: Version, books: Books | None = None) -> None:
    """Every file matches its manifest, and the manifest its signature. With `books` only as long as a rollback can
    wait: the replicas that load it verify it too.

    Raises:
        IntegrityError: one does not. Nothing was deployed.
    """
    report("verify files", "running")
    checked: VerifyReport | None
    if books is None:
        checked = systems().registry.verify(target)
    else:
        checked = books.ask("verifying files", lambda registry: registry.registry.verify(target), _VERIFY_S)
    if checked is None:
        report("verify files", "skipped", "the replicas verify what they load")
        return
    if not checked.ok:
        problems = "; ".join(checked.problems)
        raise IntegrityError(f"{target} does not verify: {problems}. Nothing was deployed; traffic is as it was.")
    report("verify files", "done")


@task(name="switch-to-kept", cache_policy=NO_CACHE, timeout_seconds=300)
def switch_to_kept(switch: Switch, books: Books) -> bool:
    """All traffic to the replicas that were kept warm, as soon as they can carry it. False: they cannot."""
    report("switch traffic", "running", f"to the warm replicas of {switch.target}")
    cluster = books.systems.cluster
    try:
        if switch.warm < switch.replicas and books.lost is None:
            cluster.scale(Track.previous, switch.replicas)
        wait_for_kept(cluster, alone=books.lost is not None)
        cluster.set_weights({Track.previous: 1.0})
    except (ExternalError, ConfigError) as error:
        get_run_logger().warning("the warm replicas are no help: %s", error)
        report("switch traffic", "note", "the warm replicas are not ready: starting new ones")
        return False
    report("switch traffic", "done")
    return True


def wait_for_kept(cluster: Cluster, *, alone: bool) -> None:
    """Return when the kept replicas are ready.

    `alone`: no new replica can be had. Then those that are ready do: fewer that answer well beat more that do not.

    Raises:
        ExternalError: they are not.
    """
    try:
        cluster.wait_ready(Track.previous, _WARM_S)
    except ExternalError:
        ready = sum(replica.ready for replica in cluster.status().replicas if replica.track is Track.previous)
        if not alone or not ready:
            raise
        get_run_logger().error("only %d kept replica(s) are ready; they get all traffic", ready)


@task(
    name="switch-traffic",
    cache_policy=NO_CACHE,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=600,
)
def switch_traffic(switch: Switch, books: Books) -> None:
    """Stable gets the version: replicas first, then traffic."""
    report("replace stable", "running", f"starting {switch.target}")
    books.stay_alone()
    books.systems.cluster.rollback(switch.target, switch.replicas)
    report("replace stable", "done")


@contextlib.contextmanager
def put_back(books: Books, pending: Pending, switch: Switch, *, warm: bool) -> Iterator[None]:
    """Where the version can never be served, stable is to have what it had, and nobody is to try again.

    Raises:
        ExternalError: it could not be served, or not yet: then the watchdog or the next run goes on.
    """
    try:
        yield
    except ExternalError as error:
        if error.retryable or warm or switch.current is None:
            serves = f"{switch.target} has all traffic on its warm replicas" if warm else "The traffic is as it was"
            raise ExternalError(
                f"{error}\n{serves}; stable is not replaced yet.\nNext: the watchdog goes on with it every minute; "
                "`khet doctor --fix` does at once.",
                retryable=False,
            ) from error
        books.systems.cluster.deploy(Track.stable, switch.current, switch.replicas)
        books.forget(pending)
        raise ExternalError(
            f"{switch.target} cannot be served: {error}\n{switch.current} goes on serving.\n"
            "Next: `khet rollback --history` shows the other versions.",
            retryable=False,
        ) from error


@task(name="verify-serving", cache_policy=NO_CACHE, retries=2, retry_condition_fn=retry_external, timeout_seconds=120)
def verify_serving(target: Version) -> None:
    """The cluster and the gateway agree on the version.

    Raises:
        GateError: they do not.
    """
    connected = systems()
    found = {served_version(connected.cluster), settled_version(connected.settings.cluster.gateway_url, target)}
    if found != {target}:
        names = " and ".join(sorted(str(version) for version in found))
        raise GateError(f"After the change to {target} the service answers as {names}. Next: `khet status`.")
    report("verify serving", "done", f"{target} answers")


def serving(books: Books, record: ReleaseRecord, switch: Switch, took_s: float, *, warm: bool) -> None:
    """Verify that the version has all traffic, and let the cluster remember it."""
    verify_serving(switch.target)
    entry = Served(
        version=str(switch.target),
        at=utc_now(),
        by=record.requested_by,
        reason=_REASON,
        took_s=round(took_s, 1),
        warm=warm,
    )
    books.served(entry)


@task(name="move-alias", cache_policy=NO_CACHE, timeout_seconds=300)
def move_alias(books: Books, pending: Pending) -> None:
    """Point production at the version that now serves; a registry that does not answer is told later."""
    books.settle(pending)


def finish(books: Books, record: ReleaseRecord, pending: Pending, switch: Switch) -> ReleaseRecord:
    """Tell the registry, the audit log and the reader how it ended."""
    move_alias(books, pending)
    reasons = [f"production returned from {switch.current or 'nothing'} to {switch.target}"]
    if books.lost is not None:
        stable = "" if served_on_stable(books.systems.cluster) else "stable is replaced and "
        reasons.append(f"the registry did not answer: {stable}production is pointed at it when it does again")
    books.systems.audit.record(
        actor=record.requested_by,
        action="rollback",
        subject=str(switch.target),
        plan={"from": record.champion, "warm": switch.warm, "registry": str(books.lost or "answers")},
        outcome="done",
        detail="; ".join(reasons),
        run_id=record.release_id,
    )
    return books.close(record, "rolled_back", tuple(reasons))


def served_on_stable(cluster: Cluster) -> bool:
    """Whether stable has all traffic."""
    return cluster.status().weights.get(Track.stable) == 1.0
