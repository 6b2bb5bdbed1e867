"""More, fewer or new replicas (runbook: Service Outage, High Error Rate).

Both run beside a release: an incident does not wait for a rollout to end. They take turns with each other.
"""

from __future__ import annotations

from typing import Annotated

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows import hooks
from flows.change import show_change, show_dry_run
from flows.session import ReleaseSession, new_record, open_session, run_tail
from flows.systems import systems
from tasks.cluster import Track
from tasks.cluster.procedures import procedures, served_replicas
from tasks.prefect_support import RETRY_DELAYS, retry_external
from tasks.progress import report
from tasks.rollout.journal import ReleaseRecord

_MOST = 64


@flow(
    name="scale",
    flow_run_name=lambda: f"scale-{run_tail(runtime.flow_run.get_id())}",
    on_crashed=[hooks.undo_release],
    validate_parameters=True,
)
def scale(
    replicas: Annotated[int, Field(ge=0, le=_MOST)] = 0, track: Track = Track.stable, dry_run: bool = False
) -> ReleaseRecord:
    """Run this many replicas. The next rollout sets the number of cluster.replicas again.

    Args:
        replicas: How many. 0: the configured number (cluster.replicas).
        track: Which replicas: stable is production.
        dry_run: Show the difference, change nothing.

    Raises:
        ConfigError: the track is not deployed.
        SafetyError: an autoscaler owns the number, or another scaling is running.
        ExternalError: the replicas are not ready in time; those that are serve.
    """
    connected = systems()
    asked = {"replicas": replicas or connected.settings.cluster.replicas, "track": track.value}
    serving, before = served_replicas(connected.cluster.status(), track)
    wanted = int(asked["replicas"])
    diff = procedures(connected.cluster).scale(track, wanted, dry_run=True)
    sentence = f"run {wanted} instead of {before} replica(s) of {serving} on {track}"
    if dry_run or not diff:
        record = new_record(connected, run_tail(runtime.flow_run.get_id()), asked, "scale")
        return show_dry_run(record, [sentence], diff, dry_run=dry_run)
    with open_session(run_tail(runtime.flow_run.get_id()), asked, kind="scale") as session:
        session.change(version=str(serving), diff=diff)
        session.audit("scale", track.value, "intended", plan={"steps": [sentence], "diff": diff})
        session.intend("scale", str(serving), str(serving), track=track.value, replicas=wanted, before=before)
        session.run("scale", ask_for_replicas, track, wanted)
        return ready(session, track, f"{wanted} replica(s) of {serving} on {track}, {before} before")


@flow(
    name="restart",
    flow_run_name=lambda: f"restart-{run_tail(runtime.flow_run.get_id())}",
    on_crashed=[hooks.undo_release],
    validate_parameters=True,
)
def restart(track: Track = Track.stable, dry_run: bool = False) -> ReleaseRecord:
    """Replace every replica by a new one of the same version, without a gap.

    Args:
        track: Which replicas: stable is production.
        dry_run: Show the difference, change nothing.

    Raises:
        ConfigError: the track is not deployed.
        SafetyError: a scaling or another restart is running.
        ExternalError: the new replicas are not ready in time; the old ones that are left serve.
    """
    connected = systems()
    asked = {"track": track.value}
    serving, count = served_replicas(connected.cluster.status(), track)
    diff = procedures(connected.cluster).restart(track, dry_run=True)
    sentence = f"replace {count} replica(s) of {serving} on {track} by new ones of the same version"
    if dry_run:
        record = new_record(connected, run_tail(runtime.flow_run.get_id()), asked, "restart")
        return show_dry_run(record, [sentence], diff)
    with open_session(run_tail(runtime.flow_run.get_id()), asked, kind="restart") as session:
        session.change(version=str(serving), diff=diff)
        session.audit("restart", track.value, "intended", plan={"steps": [sentence], "diff": diff})
        session.intend("restart", str(serving), str(serving), track=track.value)
        session.run("restart", ask_for_restart, track)
        return ready(session, track, f"{count} replica(s) of {serving} on {track} were replaced by new ones")


@task(
    name="scale",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=120,
)
def ask_for_replicas(track: Track, replicas: int) -> None:
    """The cluster goes on with it by itself from here on."""
    procedures(systems().cluster).scale(track, replicas)


@task(name="restart", cache_policy=NO_CACHE, timeout_seconds=120)
def ask_for_restart(track: Track) -> None:
    """Not retried: a call whose answer was lost would restart twice. The crash hook asks again where it matters."""
    procedures(systems().cluster).restart(track)


@task(name="wait-ready", cache_policy=NO_CACHE, timeout_seconds=3600)
def wait_ready(track: Track) -> None:
    """Every replica is ready and no other is left."""
    connected = systems()
    report("wait ready", "running")
    connected.cluster.wait_ready(track, connected.settings.cluster.ready_timeout_s)


def ready(session: ReleaseSession, track: Track, sentence: str) -> ReleaseRecord:
    """Wait for the replicas and end the record. What was asked for is in the cluster: nothing is left to finish."""
    session.change(intent=None)
    session.run("wait ready", wait_ready, track)
    record = session.close("done", (sentence,))
    show_change(record)
    return record
