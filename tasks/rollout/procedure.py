"""The rollout itself: how a judged version comes to serve all traffic, and how it is taken back.

Plain Python over the Cluster Protocol, so that every backend and a test with its own clock run the same steps. Each
change is preceded by its intent in the journal; each step may be repeated after a crash.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from configs.areas import CanarySettings, JudgeSettings
from configs.errors import ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import Cluster, Track, TrackCounters
from tasks.rollout.evidence import Probes, evidence
from tasks.rollout.journal import Journal, utc_now
from tasks.rollout.policy import Decision, Evidence, Stage, Verdict, judge

Tallies = Callable[[], Mapping[str, Probes]]
Guard = Callable[[], None]


class Aliases(Protocol):
    """Who points where. The registry implements it."""

    def move_alias(self, name: Literal["production"], version: Version, *, by: str, reason: str) -> object:
        """Point `name` at `version` and keep the history."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Time as the procedure needs it; tests bring their own."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], datetime] = utc_now


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rollout will do. `steps` are shares of traffic, 0 for the shadow stage; empty on a first release."""

    version: Version
    champion: Version | None
    steps: tuple[float, ...]
    replicas: int
    canary_replicas: int
    comparable: bool

    def describe(self) -> list[str]:
        """The plan in sentences, as `--dry-run` shows it."""
        if self.champion is None:
            return [f"deploy {self.version} on {self.replicas} replica(s), smoke-test it, point production at it"]
        stages = [
            "mirror requests and compare answers" if s == 0 else f"send {s:.0%} of the traffic" for s in self.steps
        ]
        return [
            f"deploy {self.version} on {self.canary_replicas} canary replica(s) beside {self.champion}",
            *[f"{stage}, then judge" for stage in stages],
            f"replace {self.champion} by {self.version} on {self.replicas} replica(s), one at a time",
            f"point production at {self.version}, previous at {self.champion}; remove the canary",
        ]


def plan_rollout(
    version: Version,
    champion: Version | None,
    settings: CanarySettings,
    *,
    replicas: int,
    canary: int,
    comparable: bool,
) -> Plan:
    """Lay out the steps for this pair of versions."""
    shadow = (0.0,) if settings.shadow_requests else ()
    steps = () if champion is None else (*shadow, *settings.steps)
    return Plan(version, champion, steps, replicas, canary, comparable)


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the evidence, and what was made of it."""

    at: datetime
    step: str
    weight: float
    canary: Evidence
    champion: Evidence
    verdict: Verdict


def step_label(weight: float) -> str:
    """What people call the step."""
    return "shadow" if weight == 0 else f"{weight:.0%}"


@dataclass(slots=True)
class Rollout:
    """One rollout on one cluster. `guard` raises when this process may no longer change anything (lease lost)."""

    cluster: Cluster
    journal: Journal
    plan: Plan
    canary: CanarySettings
    limits: JudgeSettings
    ready_timeout_s: float
    guard: Guard
    on_look: Callable[[Look], None]
    clock: Clock = field(default_factory=Clock)
    _start: Mapping[Track, TrackCounters] = field(default_factory=dict)

    def deploy_canary(self) -> None:
        """Start the canary's replicas; no traffic yet."""
        self.guard()
        champion = str(self.plan.champion) if self.plan.champion else None
        self.journal.intend("canary", str(self.plan.version), champion)
        self.cluster.set_weights({Track.stable: 1.0})
        self.cluster.deploy(Track.canary, self.plan.version, self.plan.canary_replicas)
        self.cluster.wait_ready(Track.canary, self.ready_timeout_s)

    def run_step(self, weight: float, tallies: Tallies) -> Verdict:
        """Send `weight` of the traffic (0: mirror it) and look until the judge decides."""
        self.guard()
        self._route(weight)
        self._remember_start()
        began = self.clock.monotonic()
        before = self._seen(weight, tallies)
        while True:
            verdict = self._look(weight, tallies, self._stage(weight, before, self.clock.monotonic() - began))
            if verdict.decision is not Decision.wait:
                return verdict
            self.clock.sleep(self.canary.poll_s)
            self.guard()
            self._keep_traffic()

    def withdraw(self) -> None:
        """All traffic back to stable; the canary stays warm but unused."""
        self.cluster.set_weights({Track.stable: 1.0})

    def undo(self) -> None:
        """Take the canary away. Repeatable; right after a crash too."""
        self.cluster.set_weights({Track.stable: 1.0})
        self.cluster.remove(Track.canary)

    def promote(self, aliases: Aliases, *, by: str, reason: str) -> None:
        """Make the version production: serve it everywhere, then point the alias, then remove the canary.

        Raises:
            ExternalError: it did not become ready everywhere; the champion was put back.
        """
        self.guard()
        champion = str(self.plan.champion) if self.plan.champion else None
        self.journal.intend("promote", str(self.plan.version), champion)
        try:
            self.cluster.deploy(Track.stable, self.plan.version, self.plan.replicas)
            self.cluster.wait_ready(Track.stable, self.ready_timeout_s)
        except ExternalError:
            self._put_champion_back()
            self.journal.change(intent=None)
            raise
        self.cluster.set_weights({Track.stable: 1.0})
        aliases.move_alias("production", self.plan.version, by=by, reason=reason)
        self.cluster.remove(Track.canary)

    def first_deploy(self) -> None:
        """Serve the first version there is; nobody was served before."""
        self.guard()
        self.journal.intend("canary", str(self.plan.version), None)
        self.cluster.deploy(Track.stable, self.plan.version, self.plan.replicas)
        self.cluster.wait_ready(Track.stable, self.ready_timeout_s)
        self.cluster.set_weights({Track.stable: 1.0})

    def judge_first(self, tallies: Tallies, floor: float) -> Verdict:
        """Judge the first version on labelled probes: there is no champion to compare it with."""
        began = self.clock.monotonic()
        while True:
            stage = self._stage(1.0, 0, self.clock.monotonic() - began, floor=floor)
            verdict = self._look(1.0, tallies, stage, track=Track.stable)
            if verdict.decision is not Decision.wait:
                return verdict
            self.clock.sleep(self.canary.poll_s)
            self.guard()

    def remove_first(self) -> None:
        """Take a first version away again: nobody is served, as before."""
        self.cluster.set_weights({})
        self.cluster.remove(Track.stable)

    def _route(self, weight: float) -> None:
        mirror = {Track.canary: 1.0} if weight == 0 else {}
        shares = {Track.stable: 1.0 - weight, Track.canary: weight} if weight else {Track.stable: 1.0}
        self.cluster.set_weights(shares, mirror=mirror, lease_s=self.canary.lease_s)

    def _keep_traffic(self) -> None:
        """Tell the cluster that somebody is still watching. A cluster that does not answer is asked again next time."""
        try:
            self.cluster.renew_lease(self.canary.lease_s)
        except ExternalError as error:
            if not error.retryable:
                raise

    def _remember_start(self) -> None:
        if not self._start:
            self._start = self.cluster.counters()

    def _seen(self, weight: float, tallies: Tallies) -> int:
        canary, _ = self._evidence(tallies, Track.canary)
        return canary.shadow_requests if weight == 0 else canary.requests

    def _stage(self, weight: float, before: int, elapsed_s: float, floor: float | None = None) -> Stage:
        needed = self.canary.shadow_requests if weight == 0 else self.canary.min_samples
        last = not self.plan.steps or weight == self.plan.steps[-1]
        return Stage(weight, needed, last, elapsed_s, self.canary.deadline_s, before, floor)

    def _evidence(self, tallies: Tallies, track: Track) -> tuple[Evidence, Evidence]:
        counters, probes = self.cluster.counters(), tallies()
        objective = self.limits.latency_objective_ms

        def of(which: Track, version: Version | None) -> Evidence:
            tally = probes.get(str(version), Probes())
            return evidence(counters.get(which), self._start.get(which), tally, objective_ms=objective)

        champion = of(Track.stable, self.plan.champion) if self.plan.champion else Evidence()
        return of(track, self.plan.version), champion

    def _look(self, weight: float, tallies: Tallies, stage: Stage, track: Track = Track.canary) -> Verdict:
        try:
            canary, champion = self._evidence(tallies, track)
        except ExternalError as error:
            return self._no_evidence(error, stage)
        verdict = judge(canary, champion, stage, self.limits, comparable=self.plan.comparable)
        self.on_look(Look(self.clock.now(), step_label(weight), weight, canary, champion, verdict))
        return verdict

    def _no_evidence(self, error: ExternalError, stage: Stage) -> Verdict:
        """A provider that does not answer is no failure of the canary: wait, until the deadline."""
        if not error.retryable:
            raise error
        late = stage.elapsed_s >= stage.deadline_s
        return Verdict(Decision.inconclusive if late else Decision.wait, (f"no evidence: {error}",), (), {})

    def _put_champion_back(self) -> None:
        if self.plan.champion is None:
            self.remove_first()
            return
        self.cluster.deploy(Track.stable, self.plan.champion, self.plan.replicas)
        self.undo()


def served_version(cluster: Cluster) -> Version | None:
    """The version that stable serves with a ready replica, None when nobody is served.

    Raises:
        SafetyError: stable is between two versions.
    """
    status = cluster.status()
    ready = {replica.version for replica in status.replicas if replica.track is Track.stable and replica.ready}
    if len(ready) > 1:
        names = ", ".join(str(version) for version in sorted(ready))
        raise SafetyError(f"stable serves {names} at once. Wait for the update to end, or run `khet doctor --fix`.")
    return next(iter(ready), None)
