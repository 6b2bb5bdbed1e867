"""A cluster in memory with virtual time, for the rollout procedure's own logic. Real backends: tests/contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from configs.errors import ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import ClusterStatus, ReplicaStatus, Track, TrackCounters
from tasks.cluster.memory import Memory
from tasks.rollout.verdict import Paired

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Behaviour:
    """How a version answers. Shares of its requests; `classes`: of those it answers well."""

    errors: float = 0.0
    slow: float = 0.0
    accuracy: float = 0.95
    differs: float = 0.05
    becomes_ready: bool = True
    ood: float = 0.0
    classes: Mapping[str, float] = field(default_factory=lambda: {"healthy": 0.5, "rust": 0.5})


@dataclass
class Served:
    """What one track was asked since `since`."""

    since: datetime
    answered: float = 0.0
    mirrored: float = 0.0
    broken: float = 0.0


@dataclass
class MemoryCluster:
    """Serves `rate_per_s` requests of virtual time; `calls` is what was asked of it."""

    behaviours: dict[Version, Behaviour] = field(default_factory=dict)
    rate_per_s: float = 100.0
    time_s: float = 0.0
    versions: dict[Track, Version] = field(default_factory=dict)
    weights: dict[Track, float] = field(default_factory=dict)
    mirror: dict[Track, float] = field(default_factory=dict)
    lease_until: float | None = None
    calls: list[str] = field(default_factory=list)
    answered: dict[Version, float] = field(default_factory=dict)
    tracks: dict[Track, Served] = field(default_factory=dict)
    replicas: dict[Track, int] = field(default_factory=dict)
    most_replicas: int = 8
    blind: bool = False
    canary_breaks_at: float = math.inf
    remembered: Memory = field(default_factory=Memory)

    # Time -------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return START + timedelta(seconds=self.time_s)

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        if self.lease_until is not None and self.time_s > self.lease_until:
            self.weights, self.mirror, self.lease_until = {Track.stable: 1.0}, {}, None
        for track, version in self.versions.items():
            answered = self.weights.get(track, 0.0) * self.rate_per_s * seconds
            self.answered[version] = self.answered.get(version, 0.0) + answered
            self._served(track).answered += answered
            if track is Track.canary and self.time_s > self.canary_breaks_at:
                self._served(track).broken += answered
            self._served(track).mirrored += self.mirror.get(track, 0.0) * self.rate_per_s * seconds

    # The Protocol -----------------------------------------------------------------------------------------------

    def deploy(self, track: Track, version: Version, replicas: int) -> None:
        self.calls.append(f"deploy {track} {version} x{replicas}")
        if self.versions.get(track) != version:
            self.tracks[track] = Served(self.now())
        self.versions[track] = version
        self.replicas[track] = replicas

    def wait_ready(self, track: Track, timeout_s: float) -> None:
        if not self._of(self.versions[track]).becomes_ready:
            raise ExternalError(f"{self.versions[track]} is not ready after {timeout_s} s")

    def set_weights(
        self,
        weights: Mapping[Track, float],
        *,
        mirror: Mapping[Track, float] | None = None,
        lease_s: float | None = None,
    ) -> None:
        self.weights = {track: share for track, share in weights.items() if share}
        self.mirror = dict(mirror or {})
        self.lease_until = None if lease_s is None else self.time_s + lease_s
        self.calls.append("weights " + " ".join(f"{t}={s:g}" for t, s in self.weights.items()))

    def renew_lease(self, lease_s: float) -> None:
        if self.lease_until is None:
            raise SafetyError("the lease has expired")
        self.lease_until = self.time_s + lease_s

    def scale(self, track: Track, replicas: int) -> None:
        self.calls.append(f"scale {track} {replicas}")
        self.replicas[track] = replicas

    def restart(self, track: Track) -> None:
        self.calls.append(f"restart {track}")

    def remove(self, track: Track) -> None:
        if self.weights.get(track):
            raise SafetyError(f"{track} has traffic")
        self.calls.append(f"remove {track}")
        self.versions.pop(track, None)
        self.replicas.pop(track, None)

    def rollback(self, version: Version, replicas: int) -> None:
        self.deploy(Track.stable, version, replicas)
        self.set_weights({Track.stable: 1.0})
        self.remove(Track.canary)
        self.remove(Track.baseline)
        self.remove(Track.previous)

    def room(self) -> int:
        return max(0, self.most_replicas - sum(self.replicas.values()))

    def status(self) -> ClusterStatus:
        replicas = tuple(
            ReplicaStatus(str(track), track, version, self._of(version).becomes_ready, "1", "-", START, 0)
            for track, version in self.versions.items()
        )
        return ClusterStatus(dict(self.versions), replicas, dict(self.weights), dict(self.mirror), None)

    def counters(self) -> Mapping[Track, TrackCounters]:
        if self.blind:
            raise ExternalError("the counters cannot be read")
        return {track: self._counters(track, version) for track, version in self.versions.items()}

    def reachable(self, weights: Mapping[Track, float], replicas: Mapping[Track, int]) -> Mapping[Track, float]:
        return weights

    def address(self, track: Track) -> None:
        return None

    def logs(self, track: Track, lines: int = 100) -> str:
        return f"{lines} lines of {track}"

    def memory(self) -> Memory:
        return self.remembered

    def remember(self, change: Callable[[Memory], Memory]) -> Memory:
        self.remembered = change(self.remembered)
        return self.remembered

    # Inside -----------------------------------------------------------------------------------------------------

    def paired(self, champion: Version | None, challenger: Version) -> Paired:
        """Labelled images that both answered; where only one is right it is the one that is right more often."""
        pairs = int(min(self.answered.get(v, 0) for v in (champion, challenger) if v is not None))
        theirs = self._of(champion).accuracy if champion else self._of(challenger).accuracy
        right, before = int(pairs * self._of(challenger).accuracy), int(pairs * theirs)
        return Paired(pairs, max(0, before - right), max(0, right - before), min(right, before))

    def _of(self, version: Version) -> Behaviour:
        return self.behaviours.setdefault(version, Behaviour())

    def _served(self, track: Track) -> Served:
        return self.tracks.setdefault(track, Served(START))

    def _counters(self, track: Track, version: Version) -> TrackCounters:
        how, served = self._of(version), self._served(track)
        n, shadow = int(served.answered), int(served.mirrored)
        failed, errors = int(shadow * how.errors), int(n * how.errors) + int(served.broken)
        told = _mix(shadow - failed, self._of(self.versions.get(Track.stable, version)).classes)
        classes = _mix(n - errors, how.classes)
        return TrackCounters(
            version=version,
            since=served.since,
            requests=n,
            errors=errors,
            latency_ms=_histogram(n, how.slow),
            shadow_pairs=shadow - failed,
            shadow_differ=int((shadow - failed) * how.differs),
            shadow_errors=failed,
            shadow_latency_ms=_histogram(shadow, how.slow),
            predictions=sum(classes.values()),
            ood=int(sum(classes.values()) * how.ood),
            classes=classes,
            shadow_ood=int((shadow - failed) * how.ood),
            shadow_classes=_mix(shadow - failed, how.classes),
            shadow_by_class={named: (pairs, int(pairs * how.differs)) for named, pairs in told.items()},
        )


def _mix(n: int, classes: Mapping[str, float]) -> dict[str, int]:
    """Rounded down one by one, so that no count ever shrinks as `n` grows."""
    return {named: int(n * share) for named, share in classes.items()}


def _histogram(n: int, slow: float) -> dict[float, int]:
    return {10.0: int(n * (1 - slow)), 250.0: int(n * (1 - slow)), math.inf: n}
