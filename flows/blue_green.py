"""Bring a new version up beside the old one and switch all traffic at once (runbook: Blue-Green Deployment)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Annotated

import httpx
from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from configs.errors import ConfigError, GateError
from configs.settings import Settings
from flows import hooks, recovery
from flows.candidate import Candidate, build_candidate
from flows.change import show_dry_run
from flows.release import DEFAULT_CONFIG, finish, load_config, stop
from flows.session import LEASE, LEASE_TTL_S, ReleaseSession, new_record, open_session, run_tail
from flows.systems import Systems, requester, systems
from ml.version import Version
from tasks.cluster import Cluster, Track
from tasks.cluster.procedures import procedures, served_replicas
from tasks.lease import Lease, break_lease
from tasks.prefect_support import RETRY_DELAYS, retry_external
from tasks.progress import report
from tasks.rollout.bluegreen import BlueGreen, Smoke, check_smoke, plan_blue_green
from tasks.rollout.journal import Journal, ReleaseRecord
from tasks.rollout.procedure import Labels, Look
from tasks.rollout.replay import Probe
from tasks.rollout.steps import deploy_canary, undo_canary
from tasks.rollout.verdict import Decision, Verdict

_SMOKE_PHOTOS = 16
_SMOKE_TIMEOUT_S = 15.0
_CONNECTS = 7  # httpx waits 0, 0.5, 1, 2, ... s before each: half a minute in all


@flow(
    name="blue-green",
    flow_run_name=lambda: f"blue-green-{run_tail(runtime.flow_run.get_id())}",
    on_crashed=[hooks.undo_release],
    on_cancellation=[hooks.undo_release],
    validate_parameters=True,
)
def blue_green(
    version: str | None = None,
    watch_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0,
    back: bool = False,
    dry_run: bool = False,
) -> ReleaseRecord:
    """Deploy green beside blue, verify it, send it all traffic, watch it, then take blue away.

    Args:
        version: Published version that becomes green, such as v1.3.0.
        watch_s: Seconds that blue is kept ready after the switch; harm or `back` returns to it at once.
        back: Return all traffic to blue now, and end the blue-green deployment that is running.
        dry_run: Show the difference, change nothing.

    Raises:
        ConfigError: no version was named.
        GateError: green was not good enough, before or after the switch; blue serves as before.
        SafetyError: a rollout is running.
        KhetError: something failed; blue serves as before.
    """
    connected = systems()
    if back:
        return switch_back(connected, dry_run=dry_run)
    target, serving, replicas = green_and_blue(connected, version)
    diff = planned_diff(connected.cluster, target, replicas)
    if dry_run:
        record = new_record(connected, run_tail(runtime.flow_run.get_id()), {"version": version}, "blue_green")
        return show_dry_run(
            record.model_copy(update={"version": version}), describe(target, serving, replicas, watch_s), diff
        )
    asked = {"version": version, "watch_s": watch_s, "config": DEFAULT_CONFIG, "data": None}
    with open_session(run_tail(runtime.flow_run.get_id()), asked, kind="blue_green") as session:
        session.change(diff=diff)
        candidate = build_candidate(session, load_config(DEFAULT_CONFIG, None), version)
        if candidate.gate.decision is Decision.rollback:
            return stop(session, candidate, "gated", candidate.gate)
        green = build_green(session, candidate, target, serving, replicas)
        verdict = try_green(session, green, candidate, watch_s)
        if verdict.decision is not Decision.promote:
            session.run("back to blue", undo_canary, green.rollout)
            return stop(session, candidate, "rolled_back", verdict)
        session.run("settle", settle, green, session, "; ".join(verdict.reasons))
        session.verify(green.rollout)
        return finish(session, candidate, verdict)


def green_and_blue(connected: Systems, version: str | None) -> tuple[Version, Version, int]:
    """The version to come, the one that serves, and on how many replicas.

    Raises:
        ConfigError: no version was named, or it serves already.
    """
    if version is None:
        raise ConfigError("name the version that becomes green. `khet versions` lists them. Nothing was changed.")
    target = Version.parse(version)
    serving, replicas = served_replicas(connected.cluster.status())
    if target == serving:
        raise ConfigError(f"{target} serves already. Nothing was changed.")
    return target, serving, replicas


def planned_diff(cluster: Cluster, target: Version, replicas: int) -> str:
    """What green and the switch change in the cluster."""
    change = procedures(cluster)
    parts = [
        change.deploy(Track.canary, target, replicas, dry_run=True),
        change.switch(Track.canary, None, dry_run=True),
    ]
    return "\n".join(part for part in parts if part)


def describe(target: Version, serving: Version, replicas: int, watch_s: float) -> list[str]:
    """The deployment in sentences."""
    return [
        f"fetch and verify {target}, score it, hold it against {serving} on the same holdout",
        f"green: deploy {target} on {replicas} replica(s) beside {serving}, without traffic",
        f"ask green for {_SMOKE_PHOTOS} predictions, then judge its answers to mirrored traffic",
        f"switch all traffic to green at once and watch it for {watch_s:g} s; harm switches back",
        f"replace blue by {target}, point production at it, take green away",
    ]


def build_green(
    session: ReleaseSession, candidate: Candidate, target: Version, serving: Version, replicas: int
) -> BlueGreen:
    """The rollout of green, and its switch."""
    classes = len(candidate.evaluation.classes) if candidate.comparable else 0
    plan = plan_blue_green(target, serving, replicas, classes)
    session.ensure_champion_serves(plan)
    session.audit(
        "blue_green",
        str(target),
        "intended",
        plan={"blue": str(serving), "replicas": replicas, "diff": session.record.diff},
    )
    change = procedures(session.systems.cluster)
    return BlueGreen(session.rollout(plan), lambda lease_s: change.switch(Track.canary, lease_s))


def try_green(session: ReleaseSession, green: BlueGreen, candidate: Candidate, watch_s: float) -> Verdict:
    """Green without users, then with all of them; the verdict that ended it."""
    session.run("deploy green", deploy_canary, green.rollout)
    probes = candidate.probes(_SMOKE_PHOTOS)
    session.run("smoke predictions", smoke, probes, green.rollout.plan.version)
    with session.replay(candidate) as labels:
        verdict = session.note(session.run("verify green", verify_green, green, labels))
        if verdict.decision is not Decision.promote:
            return verdict
        floor = session.systems.settings.gate.min_accuracy
        look = session.run("switch and watch", switch_and_watch, green, labels, watch_s, floor)
        return session.note(look.verdict)


@task(
    name="smoke-predictions",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=300,
)
def smoke(probes: Sequence[Probe], version: Version) -> None:
    """Green itself answers photos, as the version that it should be.

    Raises:
        GateError: it does not.
    """
    connected = systems()
    url, headers = way_to_green(connected.settings, connected.cluster)
    await_way(url)
    with httpx.Client(timeout=_SMOKE_TIMEOUT_S, headers=headers) as client:
        check_smoke([ask(client, url, probe.body) for probe in probes], version)


def way_to_green(settings: Settings, cluster: Cluster) -> tuple[str, dict[str, str]]:
    """Where green alone answers: its own address, or the gateway with a request that is pinned to it.

    Raises:
        ConfigError: neither is known.
    """
    headers = {"Content-Type": "application/octet-stream", "X-Khet-Probe": "1"}
    if address := cluster.address(Track.canary):
        return f"{address.rstrip('/')}/predict", headers
    area = settings.cluster
    if area.gateway_url is None or area.node_token is None:
        raise ConfigError("cluster.gateway_url and cluster.node_token are needed to ask green. Next: `khet up`.")
    pinned = {"X-Khet-Track": Track.canary.value, "Authorization": f"Bearer {area.node_token.get_secret_value()}"}
    return f"{area.gateway_url.rstrip('/')}/predict", headers | pinned


def await_way(url: str) -> None:
    """Return when something takes connections there, or after half a minute: a node learns of a Service's new pod some
    time after the pod is ready, and that is no fault of the pod."""
    patient = httpx.HTTPTransport(retries=_CONNECTS)
    with contextlib.suppress(httpx.HTTPError), httpx.Client(transport=patient, timeout=_SMOKE_TIMEOUT_S) as client:
        client.get(url)


def ask(client: httpx.Client, url: str, photo: bytes) -> Smoke:
    """One prediction."""
    try:
        answer = client.post(url, content=photo)
        body = answer.json() if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return Smoke(0, "", "")
    return Smoke(answer.status_code, str(body.get("model_version", "")), str(body.get("class", "")))


@task(name="verify-green", cache_policy=NO_CACHE, timeout_seconds=24 * 3600)
def verify_green(green: BlueGreen, labels: Labels) -> Verdict:
    """Judge green on mirrored traffic."""
    report("blue-green", "running", "judging green on mirrored traffic")
    return green.verify(labels)


@task(name="switch-and-watch", cache_policy=NO_CACHE, timeout_seconds=25 * 3600)
def switch_and_watch(green: BlueGreen, labels: Labels, watch_s: float, floor: float) -> Look:
    """All traffic to green; blue stays ready."""
    report("blue-green", "running", f"all traffic to green, watching it for {watch_s:g} s")
    return green.watch(labels, watch_s, floor)


@task(name="settle", cache_policy=NO_CACHE, timeout_seconds=3600)
def settle(green: BlueGreen, session: ReleaseSession, reason: str) -> None:
    """Blue becomes the new version, then green goes."""
    report("blue-green", "running", f"replacing blue by {green.rollout.plan.version}")
    green.settle(session.systems.registry, by=session.record.requested_by, reason=reason)


def switch_back(connected: Systems, *, dry_run: bool) -> ReleaseRecord:
    """All traffic to blue at once; the deployment that is running ends.

    Raises:
        GateError: none is running.
    """
    running = [r for r in recovery.left_behind(connected, lease=LEASE) if r.kind == "blue_green"]
    if not running:
        raise GateError(
            "No blue-green deployment is running: blue is gone once it has ended. Nothing was changed.\n"
            "Next: `khet rollback` returns to the version before."
        )
    record = running[-1]
    change = procedures(connected.cluster)
    diff = change.switch(Track.stable, None, dry_run=True)
    sentence = f"return all traffic from {record.version} to {record.champion} and take green away"
    if dry_run:
        return show_dry_run(record, [sentence], diff)
    by = requester()
    # The lease first: the run that loses its traffic must see that it was somebody's will.
    break_lease(connected.store, connected.bucket, LEASE, by=by)
    recovery.take_turn(connected.cluster, f"back-{record.release_id}")
    change.switch(Track.stable, None)
    with Lease.acquire(connected.store, connected.bucket, LEASE, f"back-{record.release_id}", LEASE_TTL_S):
        connected.cluster.remove(Track.canary)
        ended = Journal(connected.store, connected.bucket, record).close(
            "rolled_back", (f"{by} returned all traffic to {record.champion}",)
        )
        connected.audit.record(
            by, "blue_green", str(record.version), {"diff": diff}, "undone", sentence, ended.release_id
        )
    return ended
