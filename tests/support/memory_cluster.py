"""A cluster in memory with virtual time, for the rollout procedure's own logic. Real backends: tests/contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from configs.errors import ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import ClusterStatus, ReplicaStatus, Track, TrackCounters
from tasks.rollout.evidence import Probes

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Behaviour:
    """How a version answers. Shares of its requests."""

    errors: float = 0.0
    slow: float = 0.0
    accuracy: float = 0.95
    differs: float = 0.05
    becomes_ready: bool = True


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
    mirrored: dict[Version, float] = field(default_factory=dict)
    blind: bool = False

    # Time -------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.time_s

    def now(self) -> datetime:
        return START + timedelta(seconds=self.time_s)

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        if self.lease_until is not None and self.time_s > self.lease_until:
            self.weights, self.mirror, self.lease_until = {Track.stable: 1.0}, {}, None
        for shares, tally in ((self.weights, self.answered), (self.mirror, self.mirrored)):
            for track, share in shares.items():
                if track in self.versions:
                    version = self.versions[track]
                    tally[version] = tally.get(version, 0.0) + share * self.rate_per_s * seconds

    # The Protocol -----------------------------------------------------------------------------------------------

    def deploy(self, track: Track, version: Version, replicas: int) -> None:
        self.calls.append(f"deploy {track} {version} x{replicas}")
        self.versions[track] = version

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

    def restart(self, track: Track) -> None:
        self.calls.append(f"restart {track}")

    def remove(self, track: Track) -> None:
        if self.weights.get(track):
            raise SafetyError(f"{track} has traffic")
        self.calls.append(f"remove {track}")
        self.versions.pop(track, None)

    def rollback(self, version: Version, replicas: int) -> None:
        self.deploy(Track.stable, version, replicas)
        self.set_weights({Track.stable: 1.0})
        self.remove(Track.canary)

    def status(self) -> ClusterStatus:
        replicas = tuple(
            ReplicaStatus(str(track), track, version, self._of(version).becomes_ready, "1", "-", START, 0)
            for track, version in self.versions.items()
        )
        return ClusterStatus(dict(self.versions), replicas, dict(self.weights), dict(self.mirror), None)

    def counters(self) -> Mapping[Track, TrackCounters]:
        if self.blind:
            raise ExternalError("the counters cannot be read")
        return {track: self._counters(version) for track, version in self.versions.items()}

    def logs(self, track: Track, lines: int = 100) -> str:
        return f"{lines} lines of {track}"

    # Inside -----------------------------------------------------------------------------------------------------

    def tallies(self) -> dict[str, Probes]:
        return {
            str(version): Probes(int(n), int(n * self._of(version).accuracy)) for version, n in self.answered.items()
        }

    def _of(self, version: Version) -> Behaviour:
        return self.behaviours.setdefault(version, Behaviour())

    def _counters(self, version: Version) -> TrackCounters:
        how = self._of(version)
        n, shadow = int(self.answered.get(version, 0)), int(self.mirrored.get(version, 0))
        failed = int(shadow * how.errors)
        return TrackCounters(
            version=version,
            since=START,
            requests=n,
            errors=int(n * how.errors),
            latency_ms=_histogram(n, how.slow),
            shadow_pairs=shadow - failed,
            shadow_differ=int((shadow - failed) * how.differs),
            shadow_errors=failed,
            shadow_latency_ms=_histogram(shadow, how.slow),
        )


def _histogram(n: int, slow: float) -> dict[float, int]:
    return {10.0: int(n * (1 - slow)), 250.0: int(n * (1 - slow)), math.inf: n}
