"""Two versions side by side, each user on one of them, and what differs between them (runbook: Deploy New Model)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from configs.errors import ExternalError
from flows import hooks
from flows.blue_green import green_and_blue
from flows.candidate import Candidate, build_candidate
from flows.change import show_change, show_dry_run
from flows.release import DEFAULT_CONFIG, load_config, stop
from flows.session import ReleaseSession, new_record, open_session, run_tail
from flows.systems import systems
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.procedures import procedures
from tasks.feedback.store import FeedbackStore
from tasks.prefect_support import RETRY_DELAYS, retry_external, show_table
from tasks.progress import report
from tasks.rollout.abtest import Effect, conclusion, effects, mismatch
from tasks.rollout.anytime import Rate
from tasks.rollout.journal import ReleaseRecord, utc_now
from tasks.rollout.procedure import Labels, Look, Plan, Rollout
from tasks.rollout.steps import deploy_canary, undo_canary
from tasks.rollout.verdict import Decision


@flow(
    name="ab-test",
    flow_run_name=lambda: f"ab-test-{run_tail(runtime.flow_run.get_id())}",
    on_crashed=[hooks.undo_release],
    on_cancellation=[hooks.undo_release],
    validate_parameters=True,
)
def ab_test(
    version: str | None = None,
    share: Annotated[float, Field(gt=0, le=0.5)] = 0.5,
    duration_s: Annotated[float, Field(gt=0, le=30 * 86_400)] = 3600.0,
    dry_run: bool = False,
) -> ReleaseRecord:
    """Serve the version in production (A) and another one (B) to different users, and say what differs.

    Every user stays on one version: on the local node and behind a gateway by the header X-Khet-User, else by address.
    Nothing is promoted: afterwards A serves everybody again. Harm by B ends the test early.

    Args:
        version: Published version that becomes B, such as v1.3.0.
        share: Share of the users that meet B.
        duration_s: Seconds that the test runs.
        dry_run: Show the difference, change nothing.

    Raises:
        ConfigError: no version was named, or it serves already.
        GateError: B did harm; A serves everybody.
        SafetyError: a rollout is running.
        KhetError: something failed; A serves everybody.
    """
    connected = systems()
    target, serving, replicas = green_and_blue(connected, version)
    guests = b_replicas(replicas, share)
    change = procedures(connected.cluster)
    diff = change.deploy(Track.canary, target, guests, dry_run=True)
    if dry_run:
        record = new_record(connected, run_tail(runtime.flow_run.get_id()), {"version": version}, "ab_test")
        sentences = describe(target, serving, guests, share, duration_s, change.stick(on=True, dry_run=True))
        return show_dry_run(record.model_copy(update={"version": version}), sentences, diff)
    asked = {"version": version, "share": share, "duration_s": duration_s, "config": DEFAULT_CONFIG, "data": None}
    with open_session(run_tail(runtime.flow_run.get_id()), asked, kind="ab_test") as session:
        session.change(diff=diff)
        candidate = build_candidate(session, load_config(DEFAULT_CONFIG, None), version)
        if candidate.gate.decision is Decision.rollback:
            return stop(session, candidate, "gated", candidate.gate)
        plan = Plan(target, serving, (share,), replicas, guests, classes_of(candidate))
        session.ensure_champion_serves(plan)
        session.audit("ab_test", str(target), "intended", plan={"a": str(serving), "share": share, "diff": diff})
        rollout, began = session.rollout(plan), utc_now()
        look = split_users(session, rollout, candidate, share, duration_s)
        found = found_effects(session, look, began, target, serving, share)
        session.run("end of the test", undo_canary, rollout)
        if look.verdict.decision is Decision.rollback:
            return stop(session, candidate, "rolled_back", session.note(look.verdict))
        record = session.close("done", found)
        show_change(record)
        return record


def b_replicas(replicas: int, share: float) -> int:
    """As many replicas for B as give it its share where traffic is split by replicas."""
    return max(1, math.ceil(replicas * share / (1.0 - share)))


def classes_of(candidate: Candidate) -> int:
    """How many classes both versions know; 0 where their answers cannot be compared."""
    return len(candidate.evaluation.classes) if candidate.comparable else 0


def describe(
    target: Version, serving: Version, replicas: int, share: float, duration_s: float, sticky: str
) -> list[str]:
    """The test in sentences."""
    return [
        f"fetch and verify {target}, score it, hold it against {serving} on the same holdout",
        f"deploy {target} as B on {replicas} replica(s) beside {serving}, which is A",
        f"send {share:.0%} of the users to B for {duration_s:g} s: {sticky}; harm ends the test",
        "report what differs, with intervals; return all users to A and take B away",
    ]


def split_users(
    session: ReleaseSession, rollout: Rollout, candidate: Candidate, share: float, duration_s: float
) -> Look:
    """Run the test; the last look at it."""
    session.run("deploy B", deploy_canary, rollout)
    change = procedures(session.systems.cluster)
    session.say(change.stick(on=True))
    try:
        with session.replay(candidate) as labels:
            return session.run("split users", watch_both, rollout, share, labels, duration_s)
    finally:
        change.stick(on=False)


@task(name="watch-both", cache_policy=NO_CACHE, timeout_seconds=31 * 86_400)
def watch_both(rollout: Rollout, share: float, labels: Labels, duration_s: float) -> Look:
    """Both versions serve; B is judged all the time."""
    report("ab test", "running", f"{share:.0%} of the users meet {rollout.plan.version}")
    return rollout.watch(share, labels, duration_s)


def found_effects(
    session: ReleaseSession, look: Look, began: datetime, target: Version, serving: Version, share: float
) -> tuple[str, ...]:
    """Work out what differs and leave it as a table and in the audit log; returns it in sentences."""
    try:
        labels = session.run("count labels", label_rates, began, target, serving)
    except ExternalError as error:  # what was measured on traffic is not thrown away for it
        session.say(f"the test ends without people's labels: {error}", "warning")
        labels = {}
    found = effects(look.champion, look.canary, labels, session.systems.settings.judge.alpha)
    sentences = conclusion(found, mismatch(look.champion, look.canary, share))
    for sentence in sentences:
        session.say(sentence)
    show_table(f"effects-{session.id}", table(found), f"A: {serving}, B: {target}. {'; '.join(sentences)}")
    session.audit("ab_test", str(target), "done", detail="; ".join(sentences), plan={"effects": table(found)})
    return sentences


@task(
    name="count-labels",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=300,
)
def label_rates(began: datetime, target: Version, serving: Version) -> Mapping[str, tuple[Rate, Rate]]:
    """Wrong answers of A and B by the labels that people gave to predictions of this test; none without a database."""
    database = systems().settings.database
    if database.dsn is None:
        return {}
    store, now = FeedbackStore(database), utc_now()
    rates = [_rate(store.tally(str(version), began, now).by_class) for version in (serving, target)]
    return {"feedback": (rates[0], rates[1])} if any(rate.total for rate in rates) else {}


def _rate(by_class: Mapping[str, tuple[int, int]]) -> Rate:
    return Rate(sum(wrong for wrong, _ in by_class.values()), sum(total for _, total in by_class.values()))


def table(found: Sequence[Effect]) -> list[dict[str, Any]]:
    """The effects as rows."""
    return [
        {
            "measure": effect.name,
            "A": f"{effect.a.share:.2%} of {effect.a.total:,}",
            "B": f"{effect.b.share:.2%} of {effect.b.total:,}",
            "B - A": f"{effect.difference:+.2%}",
            "true difference between": f"{effect.low:+.2%} and {effect.high:+.2%}",
            "": "differs" if effect.shown else "no difference shown",
        }
        for effect in found
    ]
