"""The rollout itself: how a judged version comes to serve all traffic, and how it is taken back.

Plain Python over the Cluster Protocol, so that every backend and a test with its own clock run the same steps. Each
change is preceded by its intent in the journal; each step may be repeated after a crash.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, Protocol

from configs.areas import CanarySettings, JudgeSettings
from configs.errors import ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import Cluster, Served, Track, TrackCounters
from tasks.rollout.anytime import Rate
from tasks.rollout.evidence import Meter, evidence
from tasks.rollout.journal import Journal, utc_now
from tasks.rollout.keeping import keep_previous
from tasks.rollout.policy import judge
from tasks.rollout.shadow import Shadow
from tasks.rollout.verdict import Decision, Evidence, Paired, Stage, Verdict

# Champion (None: there is none) and challenger to the labelled images both answered so far.
Labels = Callable[[Version | None, Version], Paired]
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
    """What a rollout will do.

    `steps` are shares of traffic, 0 for the shadow stage; empty on a first release. `classes`: how many both versions
    know, 0 where their answers cannot be compared. `baseline`: the champion runs once more, as large as the canary.
    """

    version: Version
    champion: Version | None
    steps: tuple[float, ...]
    replicas: int
    canary_replicas: int
    classes: int = 0
    baseline: bool = False

    def weights(self, share: float) -> dict[Track, float]:
        """The traffic of each track while the canary gets `share` of it."""
        if not self.baseline:
            return {Track.stable: 1.0 - share, Track.canary: share}
        beside = min(share, 1.0 - share)
        return {Track.stable: 1.0 - share - beside, Track.baseline: beside, Track.canary: share}

    def describe(self) -> list[str]:
        """The plan in sentences, as `--dry-run` shows it."""
        if self.champion is None:
            return [f"deploy {self.version} on {self.replicas} replica(s), smoke-test it, point production at it"]
        stages = [
            "mirror requests and compare answers" if s == 0 else f"send {s:.0%} of the traffic" for s in self.steps
        ]
        beside = f", {self.champion} on as many more to compare it with" if self.baseline else ""
        return [
            f"deploy {self.version} on {self.canary_replicas} canary replica(s) beside {self.champion}{beside}",
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
    classes: int = 0,
    baseline: bool = False,
) -> Plan:
    """Lay out the steps for this pair of versions."""
    shadow = (0.0,) if settings.shadow_requests else ()
    steps = () if champion is None else (*shadow, *settings.steps)
    return Plan(version, champion, steps, replicas, canary, classes, baseline and champion is not None)


def wants_baseline(cluster: Cluster, settings: CanarySettings, *, replicas: int, canary: int) -> bool:
    """Whether the champion should run once more beside the canary; asks the cluster for room only where it matters.

    Raises:
        ExternalError: the cluster does not answer.
    """
    if settings.baseline != "auto":
        return settings.baseline == "on"
    return replicas > canary and cluster.room() >= 2 * canary


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
    """One rollout on one cluster. `guard` raises when this process may no longer change anything (lease lost).

    `keep_previous_s`: for how long the champion stays on replicas of its own after a promotion.
    """

    cluster: Cluster
    journal: Journal
    plan: Plan
    canary: CanarySettings
    limits: JudgeSettings
    ready_timeout_s: float
    guard: Guard
    on_look: Callable[[Look], None]
    clock: Clock = field(default_factory=Clock)
    shadow: Shadow = field(default_factory=Shadow)
    keep_previous_s: int = 0
    _meter: Meter = field(default_factory=Meter)
    _last: Rate = field(default_factory=lambda: Rate(0, 0))
    _unready_since: float | None = None

    def deploy_canary(self) -> None:
        """Start the canary's replicas; no traffic yet."""
        self.guard()
        champion = str(self.plan.champion) if self.plan.champion else None
        self.journal.intend("canary", str(self.plan.version), champion)
        self.cluster.set_weights({Track.stable: 1.0})
        if self.plan.baseline and self.plan.champion:
            self.cluster.deploy(Track.baseline, self.plan.champion, self.plan.canary_replicas)
            self.cluster.wait_ready(Track.baseline, self.ready_timeout_s)
        self.cluster.deploy(Track.canary, self.plan.version, self.plan.canary_replicas)
        self.cluster.wait_ready(Track.canary, self.ready_timeout_s)

    def run_step(self, weight: float, labels: Labels) -> Verdict:
        """Send `weight` of the traffic (0: mirror it) and look until the judge decides, or until time is over."""
        verdict = self._run_step(weight, labels)
        for _ in range(self.canary.max_extensions if self.canary.undecided == "extend" else 0):
            if verdict.decision is not Decision.inconclusive:
                break
            self.journal.say(f"{verdict.sentence}; waiting for another {self.canary.deadline_s} s", "warning")
            verdict = self._run_step(weight, labels)
        return verdict

    def _run_step(self, weight: float, labels: Labels) -> Verdict:
        looks = (look.verdict for _, look in self._looks(weight, labels))
        return next(verdict for verdict in looks if verdict.decision is not Decision.wait)

    def watch(self, weight: float, labels: Labels, seconds: float, floor: float | None = None) -> Look:
        """Send `weight` of the traffic for all of `seconds`, or until harm is shown; the last look.

        With `floor` the canary is held against fixed limits and that accuracy: at a weight of 1 nobody else is asked.
        """
        looks = self._looks(weight, labels, floor=floor, last=True, deadline_s=seconds)
        return next(look for at, look in looks if look.verdict.decision is Decision.rollback or at >= seconds)

    def _looks(
        self, weight: float, labels: Labels, floor: float | None = None, **stage: Any
    ) -> Iterator[tuple[float, Look]]:
        """Send `weight` of the traffic, and look at it again and again: seconds since the first look, and the look.

        `stage`: what is different of this step's Stage.
        """
        self.guard()
        self._route(weight)
        self._meter.feed(self._counters())
        began = self.clock.monotonic()
        before = _samples(self._evidence(Track.canary), weight)
        while True:
            elapsed = self.clock.monotonic() - began
            yield elapsed, self._look(weight, labels, replace(self._stage(weight, before, elapsed, floor), **stage))
            self.clock.sleep(self.canary.poll_s)
            self.guard()
            self._keep_traffic()

    def withdraw(self) -> None:
        """All traffic back to stable; the canary stays warm but unused."""
        self.cluster.set_weights({Track.stable: 1.0})

    def undo(self) -> None:
        """Take the canary away. Repeatable; right after a crash too."""
        self.cluster.set_weights({Track.stable: 1.0})
        self._remove_guests()

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
            self.guard()
            self._put_champion_back()
            self.journal.change(intent=None)
            raise
        # Waiting takes long enough for a rollback: it must not be overtaken by what it was to end.
        self.guard()
        self.cluster.set_weights({Track.stable: 1.0})
        aliases.move_alias("production", self.plan.version, by=by, reason=reason)
        served = Served(version=str(self.plan.version), at=self.clock.now(), by=by, reason=reason)
        self.cluster.remember(lambda memory: memory.with_served(served))
        self._remove_guests()
        if self.plan.champion and (kept := self._keep_champion(self.plan.champion)):
            self.journal.say(kept)

    def first_deploy(self) -> None:
        """Serve the first version there is; nobody was served before."""
        self.guard()
        self.journal.intend("canary", str(self.plan.version), None)
        self.cluster.deploy(Track.stable, self.plan.version, self.plan.replicas)
        self.cluster.wait_ready(Track.stable, self.ready_timeout_s)
        self.cluster.set_weights({Track.stable: 1.0})

    def judge_first(self, labels: Labels, floor: float) -> Verdict:
        """Judge the first version on labelled probes: there is no champion to compare it with."""
        began = self.clock.monotonic()
        while True:
            stage = self._stage(1.0, 0, self.clock.monotonic() - began, floor=floor)
            verdict = self._look(1.0, labels, stage, track=Track.stable).verdict
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
        shares = self.plan.weights(weight) if weight else {Track.stable: 1.0}
        self.cluster.set_weights(shares, mirror=mirror, lease_s=self.canary.lease_s)
        self.shadow.aim(self.cluster.address(Track.canary) if mirror else None)

    def _counters(self) -> Mapping[Track, TrackCounters]:
        """The cluster's, and the pairs of answers where it is the replayer that sends copies."""
        return self.shadow.added_to(self.cluster.counters())

    def _keep_traffic(self) -> None:
        """Tell the cluster that somebody is still watching. A cluster that does not answer is asked again next time."""
        try:
            self.cluster.renew_lease(self.canary.lease_s)
        except ExternalError as error:
            if not error.retryable:
                raise

    def _remove_guests(self) -> None:
        """Canary and baseline go; a baseline that another rollout left behind does too."""
        self.cluster.remove(Track.canary)
        self.cluster.remove(Track.baseline)

    def _stage(self, weight: float, before: int, elapsed_s: float, floor: float | None = None) -> Stage:
        needed = self.canary.shadow_requests if weight == 0 else self.canary.min_samples
        last = not self.plan.steps or weight == self.plan.steps[-1]
        return Stage(weight, needed, last, elapsed_s, self.canary.deadline_s, before, floor, self.plan.classes)

    def _evidence(self, track: Track) -> Evidence:
        return evidence(self._meter.totals.get(track), self.limits.latency_objective_ms)

    def _look(self, weight: float, labels: Labels, stage: Stage, track: Track = Track.canary) -> Look:
        try:
            self._meter.feed(self._counters())
            ready = self._ready(track)
        except ExternalError as error:
            seen = self._evidence(track), self._evidence(Track.stable)
            return Look(self.clock.now(), step_label(weight), weight, *seen, self._no_evidence(error, stage))
        canary, stable = self._evidence(track), self._evidence(Track.stable)
        champion = stable if self.plan.champion else Evidence()
        baseline = self._evidence(Track.baseline) if self.plan.baseline else None
        paired = labels(self.plan.champion, self.plan.version)
        now = replace(stage, ready=ready, recent=self._recent(canary))
        verdict = judge(canary, champion, paired, now, self.limits, baseline=baseline)
        beside = champion if baseline is None or weight == 0 else baseline
        look = Look(self.clock.now(), step_label(weight), weight, canary, beside, verdict)
        self.on_look(look)
        return look

    def _ready(self, track: Track) -> bool:
        """Whether a replica takes requests, or did a moment ago."""
        replicas = self.cluster.status().replicas
        if any(replica.ready for replica in replicas if replica.track is track):
            self._unready_since = None
            return True
        now = self.clock.monotonic()
        self._unready_since = now if self._unready_since is None else self._unready_since
        return now - self._unready_since < self.limits.unready_s

    def _recent(self, canary: Evidence) -> Rate:
        """Errors since the last time that enough requests had come for the hard guard."""
        bad, total = canary.errors + canary.shadow_errors, canary.requests + canary.shadow_requests
        since = Rate(bad - self._last.bad, total - self._last.total)
        if since.total >= self.limits.hard_error_requests:
            self._last = Rate(bad, total)
        return since

    def _no_evidence(self, error: ExternalError, stage: Stage) -> Verdict:
        """A provider that does not answer is no failure of the canary: wait, until the deadline."""
        if not error.retryable:
            raise error
        late = stage.elapsed_s >= stage.deadline_s
        return Verdict(Decision.inconclusive if late else Decision.wait, (f"no evidence: {error}",), (), {})

    def _keep_champion(self, champion: Version) -> str:
        return keep_previous(self.cluster, champion, self.keep_previous_s, self.clock.now())

    def _put_champion_back(self) -> None:
        if self.plan.champion is None:
            self.remove_first()
            return
        self.cluster.deploy(Track.stable, self.plan.champion, self.plan.replicas)
        self.undo()


def _samples(canary: Evidence, weight: float) -> int:
    return canary.shadow_requests if weight == 0 else canary.requests


def served_version(cluster: Cluster) -> Version | None:
    """The version that production serves with a ready replica, None when nobody is served.

    That is what stable has, or `previous` after a rollback to it that could not replace stable yet.

    Raises:
        SafetyError: stable is between two versions.
    """
    status = cluster.status()
    track = Track.previous if status.weights.get(Track.previous) else Track.stable
    ready = {replica.version for replica in status.replicas if replica.track is track and replica.ready}
    if len(ready) > 1:
        names = ", ".join(str(version) for version in sorted(ready))
        raise SafetyError(f"{track} serves {names} at once. Wait for the update to end, or run `khet doctor --fix`.")
    return next(iter(ready), None)
