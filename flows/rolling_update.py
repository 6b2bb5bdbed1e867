"""Replace the replicas by another model version or image, one after the other (runbook: Rolling Updates)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from configs.errors import ConfigError, ExternalError, GateError
from flows import hooks
from flows.change import show_change, show_dry_run
from flows.rollback import resolve_version, verify_files, verify_serving
from flows.session import ReleaseSession, new_record, open_session, run_tail
from flows.systems import Systems, systems
from ml.version import Version
from tasks.cluster.procedures import Update, procedures, served_replicas
from tasks.prefect_support import RETRY_DELAYS, retry_external
from tasks.progress import report
from tasks.rollout.journal import ReleaseRecord


@dataclass(frozen=True, slots=True)
class Asked:
    """The form as it was filled in."""

    version: str | None
    image: str | None
    surge: int
    unavailable: int
    deadline_s: float | None


@flow(
    name="rolling-update",
    flow_run_name=lambda: f"rolling-update-{run_tail(runtime.flow_run.get_id())}",
    on_crashed=[hooks.undo_release],
    on_cancellation=[hooks.undo_release],
    validate_parameters=True,
)
def rolling_update(
    version: str | None = None,
    image: str | None = None,
    surge: Annotated[int, Field(ge=0)] = 1,
    unavailable: Annotated[int, Field(ge=0)] = 0,
    deadline_s: Annotated[float, Field(gt=0)] | None = None,
    unjudged: bool = False,
    dry_run: bool = False,
) -> ReleaseRecord:
    """Replace every replica of production, and put the old ones back where the new ones do not become ready.

    Args:
        version: Model version such as v1.3.0. Empty: the one that is served.
        image: Image of the serving container (Kubernetes). Empty: the one that runs.
        surge: Replicas that may run beyond the wanted number.
        unavailable: Replicas that may be missing from it.
        deadline_s: Seconds without progress after which the update is undone. Empty: cluster.ready_timeout_s.
        unjudged: Allow a version that never served production, and so was never judged on traffic.
        dry_run: Show the difference, change nothing.

    Raises:
        ConfigError: what was asked for is impossible on this cluster.
        GateError: the version never served production and `unjudged` is off.
        ExternalError: the new replicas did not become ready; the old ones serve again.
        SafetyError: a rollout is running.
    """
    connected = systems()
    wanted = Asked(version, image, surge, unavailable, deadline_s)
    update, before = plan_update(connected, wanted, unjudged=unjudged)
    asked = dataclasses.asdict(wanted)
    diff = procedures(connected.cluster).update(update, dry_run=True)
    sentences = describe(update, before)
    if dry_run or not diff:
        record = new_record(connected, run_tail(runtime.flow_run.get_id()), asked, "rolling_update")
        return show_dry_run(
            record.model_copy(update={"version": str(update.version)}), sentences, diff, dry_run=dry_run
        )
    with open_session(run_tail(runtime.flow_run.get_id()), asked, kind="rolling_update") as session:
        session.change(version=str(update.version), diff=diff)
        session.audit("rolling_update", str(update.version), "intended", plan={"steps": sentences, "diff": diff})
        if update.version != before.version:
            session.run("verify files", verify_files, update.version)
        session.intend(
            "update",
            str(update.version),
            str(before.version),
            replicas=before.replicas,
            image=update.image,
            previous_image=before.image,
        )
        replace_or_undo(session, update, before)
        session.run("verify serving", verify_serving, update.version)
        return finish(session, update, before)


def plan_update(connected: Systems, asked: Asked, *, unjudged: bool) -> tuple[Update, Update]:
    """The update that was asked for, and what serves now as one.

    Raises:
        ConfigError: neither a version nor an image was named.
        GateError: the version never served production.
    """
    if asked.version is None and asked.image is None:
        raise ConfigError("name a version, an image, or both: there is nothing to update to. Nothing was changed.")
    patience_s = connected.settings.cluster.ready_timeout_s
    serving, replicas = served_replicas(connected.cluster.status())
    before = Update(serving, replicas, patience_s, image=procedures(connected.cluster).image())
    target = Version.parse(asked.version) if asked.version else serving
    if target != serving and not unjudged:
        judged_before(connected, target)
    deadline_s = asked.deadline_s or patience_s
    return Update(target, replicas, deadline_s, asked.image, asked.surge, asked.unavailable), before


def judged_before(connected: Systems, target: Version) -> None:
    """A version that served production was judged on its traffic.

    Raises:
        GateError: it never did.
    """
    try:
        resolve_version(connected, str(target))
    except GateError as error:
        raise GateError(
            f"{error}\nA rolling update gives all users to it without a judge. Next: `khet release --version {target}` "
            "tries it on a share of the traffic; `--unjudged` updates all the same."
        ) from error


def describe(update: Update, before: Update) -> list[str]:
    """The update in sentences."""
    what = []
    if update.version != before.version:
        what += [f"verify every file of {update.version}", f"replace {before.version} by {update.version}"]
    if update.image is not None:
        what.append(f"replace image {before.image} by {update.image}")
    bounds = f"at most {update.surge} more than {update.replicas} replica(s), at most {update.unavailable} missing"
    last = [f"point production at {update.version}"] if update.version != before.version else []
    return [*what, f"{bounds}; undo it after {update.deadline_s:g} s without progress", *last]


def replace_or_undo(session: ReleaseSession, update: Update, before: Update) -> None:
    """Replace the replicas; where that does not end well, put the old ones back.

    Raises:
        ExternalError: it did not; what served before serves again.
    """
    try:
        session.run("replace replicas", replace_replicas, update)
    except ExternalError as error:
        session.say(f"undoing the update: {str(error).splitlines()[0]}", "error")
        session.run("undo update", replace_replicas.with_options(retries=4), before)
        session.change(intent=None)
        reason = f"the update to {update.version} was undone: {error}"
        session.close("rolled_back", (reason.splitlines()[0],))
        raise ExternalError(f"{reason}\n{before.version} serves all traffic, as before.", retryable=False) from error


@task(
    name="replace-replicas",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=3600,
)
def replace_replicas(update: Update) -> None:
    """Begin the update and wait until it is done."""
    report("replace replicas", "running", f"{update.replicas} replica(s) by {update.version}")
    change = procedures(systems().cluster)
    change.update(update)
    change.wait_updated(update)


def finish(session: ReleaseSession, update: Update, before: Update) -> ReleaseRecord:
    """Point production at what serves now, and end the record."""
    if update.version == before.version:
        record = session.close("done", (f"all replicas of {update.version} run {update.image}",))
    else:
        # The new version serves all traffic: from here on a crash is finished, not undone.
        session.intend("promote", str(update.version), str(before.version))
        session.systems.registry.move_alias(
            "production", update.version, by=session.record.requested_by, reason="rolling update"
        )
        session.remember_served(update.version, before.version, "rolling update")
        record = session.close("promoted", (f"{update.version} took over from {before.version}, replica by replica",))
    show_change(record)
    return record
