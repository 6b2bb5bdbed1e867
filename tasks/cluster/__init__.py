"""What the flows can ask of a cluster. One Protocol, one adapter a backend: `local_node` and `kubernetes`.

A *track* is a group of replicas that serve one version: `stable` (production), `canary` (the challenger), `baseline`
(the champion once more, on as many replicas as the canary has and started as lately, to compare it with), and
`previous` (the version before, kept warm without traffic so that a rollback to it is a matter of seconds). Traffic
weights say which share of the gateway's requests each track answers.

What a cluster remembers (`memory`) is what a rollback needs when the registry does not answer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from configs.settings import Settings
from ml.version import Version
from tasks.cluster.memory import Kept, Memory, Pending, Served, Turn

__all__ = [
    "Cluster", "ClusterStatus", "Kept", "Memory", "Pending", "ReplicaStatus", "Served", "Track", "TrackCounters",
    "Turn", "cluster",
]  # fmt: skip


class Track(enum.StrEnum):
    """Names of the tracks."""

    stable = "stable"
    canary = "canary"
    baseline = "baseline"
    previous = "previous"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as the cluster sees it."""

    name: str
    track: Track
    version: Version
    ready: bool
    pid_or_pod: str
    address: str
    started_at: datetime
    restarts: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Desired and actual state. `weights` sums to 1 when any track is served; `lease_expires_at`: see `set_weights`.

    `shares` is what the weights amount to, where a backend splits traffic by whole replicas; else the weights.
    """

    versions: Mapping[Track, Version]
    replicas: tuple[ReplicaStatus, ...]
    weights: Mapping[Track, float]
    mirror: Mapping[Track, float]
    lease_expires_at: datetime | None
    shares: Mapping[Track, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrackCounters:
    """What the gateway saw of one track's desired version since `since` (monotone while `since` stays the same; it
    moves when the track gets another version, or the gateway was started anew).

    `requests` are attempts, `errors` those of them that ended in a 5xx answer, a broken connection or silence, whether
    or not another replica then answered the user; `latency_ms` maps a histogram bucket's upper bound to its
    cumulative count, as in Prometheus.

    `classes` maps a class to the answers that named it, `predictions` is their sum and `ood` how many of them took the
    photo for no leaf; none of these three counts requests that were pinned to the track, whose photos are not a share
    of the users'.

    `shadow_pairs` are mirrored requests whose two answers were compared, `shadow_differ` those whose class differed;
    `shadow_by_class` maps the class that the user was told (the champion's) to its pairs and how many of them differ.
    `shadow_classes` and `shadow_ood`: what this track said to those pairs, as `classes` and `ood`.
    """

    version: Version
    since: datetime
    requests: int
    errors: int
    latency_ms: Mapping[float, int]
    shadow_pairs: int = 0
    shadow_differ: int = 0
    shadow_errors: int = 0
    shadow_latency_ms: Mapping[float, int] = field(default_factory=dict)
    predictions: int = 0
    ood: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    shadow_ood: int = 0
    shadow_classes: Mapping[str, int] = field(default_factory=dict)
    shadow_by_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Cluster(Protocol):
    """The operations a rollout needs. Every call is idempotent, has a timeout, and raises only `KhetError`s:
    `ExternalError` (no answer in time, retryable), `ConfigError` (asked for something impossible), `SafetyError`."""

    def deploy(self, track: Track, version: Version, replicas: int) -> None:
        """Make `track` serve `version` with `replicas`, one replica at a time, without a gap.

        Another version on a track other than stable does not inherit the track's traffic: it returns to stable first.
        """

    def wait_ready(self, track: Track, timeout_s: float) -> None:
        """Return when every replica of the desired version is ready and no other is left.

        Raises:
            ExternalError: not ready in time, or (not retryable) never going to be; the message ends with the last log
                lines of the replica that failed. Replicas that served before go on serving.
        """

    def set_weights(
        self,
        weights: Mapping[Track, float],
        *,
        mirror: Mapping[Track, float] | None = None,
        lease_s: float | None = None,
    ) -> None:
        """Send these shares of traffic; `mirror` copies a share of requests to a track and compares the answers. No
        weights, where only stable is deployed: nobody is served, and stable can be removed.

        With `lease_s`, all traffic returns to `stable` and mirroring stops unless `renew_lease` is called in time: the
        cluster itself guards users from an unjudged canary when the flow dies.

        A backend that splits traffic by whole replicas comes as near as it can (`ClusterStatus.shares`), and a track
        with a weight gets some. One whose `address` is not None only remembers `mirror`: the caller sends the copies.

        Raises:
            ConfigError: the weights do not sum to 1, or name a track that is not deployed.
            ExternalError: a track other than stable would get traffic and has no ready replica.
        """

    def renew_lease(self, lease_s: float) -> None:
        """Extend the lease of the current weights. Raises SafetyError when it has already expired."""

    def scale(self, track: Track, replicas: int) -> None:
        """Change the number of replicas."""

    def restart(self, track: Track) -> None:
        """Replace every replica by a new one of the same version, one at a time."""

    def remove(self, track: Track) -> None:
        """Drain and stop a track that has no weight. Raises SafetyError while it has traffic."""

    def rollback(self, version: Version, replicas: int) -> None:
        """All traffic to `version` as fast as capacity allows: deploy on stable, wait, weight 1, remove every other
        track. Where `previous` answers everybody, it does until stable can."""

    def room(self) -> int:
        """How many more replicas could run now beside those that do, or are about to; never negative. An estimate to
        plan by: `deploy` does not ask it."""

    def status(self) -> ClusterStatus:
        """Desired and actual state, now."""

    def counters(self) -> Mapping[Track, TrackCounters]:
        """Per-track counters of the gateway; where there is none that counts, of the replicas since the first call."""

    def reachable(self, weights: Mapping[Track, float], replicas: Mapping[Track, int]) -> Mapping[Track, float]:
        """The shares that these weights would amount to with so many replicas of each track; see `set_weights`."""

    def address(self, track: Track) -> str | None:
        """Base URL that reaches just this track's replicas, for whoever compares tracks by sending each the same
        request. None: the gateway mirrors requests itself."""

    def logs(self, track: Track, lines: int = 100) -> str:
        """The last log lines of the track's replicas."""

    def memory(self) -> Memory:
        """What the cluster remembers; nothing where stable is not deployed."""

    def remember(self, change: Callable[[Memory], Memory]) -> Memory:
        """Change what it remembers, and return it as it then is. `change` is pure: it is asked again where somebody
        else changed the memory in between. What is unchanged is not written."""


def cluster(settings: Settings) -> Cluster:
    """The configured adapter.

    Raises:
        ConfigError: no cluster is configured.
    """
    if settings.cluster.backend == "kubernetes":
        from tasks.cluster.kubernetes import KubernetesCluster

        return KubernetesCluster.from_settings(settings.cluster)
    from tasks.cluster.local_node import LocalNode

    return LocalNode.from_settings(settings.cluster)
