"""What the runbook's deployment procedures ask of a cluster beyond the Protocol, on every backend.

Each change returns what it changes as a unified diff of the cluster's desired state, as `kubectl diff` does; with
`dry_run` that is all that it does. Here they are built from the Protocol alone; a backend with more to offer (surge and
unavailable bounds, images, a diff of its own objects) brings its own.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import yaml

from configs.errors import ConfigError, ExternalError
from ml.version import Version
from tasks.cluster import Cluster, ClusterStatus, Track


@dataclass(frozen=True, slots=True)
class Update:
    """A rolling update of the stable track. `image` None: the one it has.

    `surge` more replicas than wanted may run, `unavailable` fewer may be ready. A replica that makes no progress for
    `deadline_s` seconds ends the update.

    Raises:
        ConfigError: both bounds are 0, so that no replica could ever be replaced, or a number is negative.
    """

    version: Version
    replicas: int
    deadline_s: float
    image: str | None = None
    surge: int = 1
    unavailable: int = 0

    def __post_init__(self) -> None:
        if min(self.surge, self.unavailable) < 0 or self.surge + self.unavailable == 0:
            raise ConfigError(
                f"surge {self.surge} and unavailable {self.unavailable}: neither may be negative, and one of them has "
                "to be 1 or more, else no replica could be replaced. Nothing was changed."
            )


class Procedures(Protocol):
    """The changes that the procedures make. Idempotent, and errors as in `tasks.cluster.Cluster`."""

    def image(self) -> str | None:
        """The image that stable runs; None where replicas come from no image, or none run."""

    def update(self, update: Update, *, dry_run: bool = False) -> str:
        """Begin to replace the stable replicas; returns at once.

        Raises:
            ConfigError: the backend cannot do what was asked. Nothing was changed.
        """

    def wait_updated(self, update: Update) -> None:
        """Return when every stable replica is of the update.

        Raises:
            ExternalError: the progress deadline passed, or the update can never succeed; the message says why.
        """

    def deploy(self, track: Track, version: Version, replicas: int, *, dry_run: bool = False) -> str:
        """As `Cluster.deploy`."""

    def scale(self, track: Track, replicas: int, *, dry_run: bool = False) -> str:
        """As `Cluster.scale`."""

    def restart(self, track: Track, *, dry_run: bool = False) -> str:
        """As `Cluster.restart`."""

    def switch(self, track: Track, lease_s: float | None, *, dry_run: bool = False) -> str:
        """All traffic to one track at once; with a lease it returns to stable unless that is renewed."""

    def guard(self, *, dry_run: bool = False) -> str:
        """Return all traffic to stable where a rollout's lease was lost; a sentence about it, empty where none was."""

    def stick(self, *, on: bool, dry_run: bool = False) -> str:
        """Keep every user on the version they met first while traffic is split, or no longer. Returns how, in words;
        empty where nothing has to be done."""


def procedures(cluster: Cluster) -> Procedures:
    """The procedures of this cluster's backend."""
    if type(cluster).__module__.startswith("tasks.cluster.kubernetes"):  # the client is imported where it is used
        from tasks.cluster.kubernetes.adapter import KubernetesCluster
        from tasks.cluster.kubernetes.procedures import KubernetesProcedures

        if isinstance(cluster, KubernetesCluster):
            return KubernetesProcedures(cluster)
    return ProtocolProcedures(cluster)


class ProtocolProcedures:
    """Procedures over the Protocol alone. Replicas are replaced one at a time, the new one ready before the old one
    goes: surge 1, unavailable 0."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def image(self) -> str | None:
        """See `Procedures.image`."""
        return None

    def update(self, update: Update, *, dry_run: bool = False) -> str:
        """See `Procedures.update`."""
        if update.image is not None:
            raise ConfigError(
                f"this cluster starts its replicas from no image, so {update.image} cannot be rolled out. Nothing was "
                "changed.\nNext: set cluster.backend to kubernetes, or name a model version instead."
            )
        if (update.surge, update.unavailable) != (1, 0):
            raise ConfigError(
                "this cluster replaces one replica at a time and keeps all of them ready (surge 1, unavailable 0); "
                f"surge {update.surge} and unavailable {update.unavailable} need Kubernetes. Nothing was changed."
            )
        return self.deploy(Track.stable, update.version, update.replicas, dry_run=dry_run)

    def wait_updated(self, update: Update) -> None:
        """See `Procedures.wait_updated`."""
        self._cluster.wait_ready(Track.stable, update.deadline_s)

    def deploy(self, track: Track, version: Version, replicas: int, *, dry_run: bool = False) -> str:
        """See `Procedures.deploy`."""
        before = desired(self._cluster.status())
        tracks = {**before["tracks"], track.value: {"version": str(version), "replicas": replicas}}
        if not dry_run:
            self._cluster.deploy(track, version, replicas)
        return diff(before, {**before, "tracks": tracks})

    def scale(self, track: Track, replicas: int, *, dry_run: bool = False) -> str:
        """See `Procedures.scale`."""
        before = desired(self._cluster.status())
        wanted = {**_deployed(before, track), "replicas": replicas}
        if not dry_run:
            self._cluster.scale(track, replicas)
        return diff(before, {**before, "tracks": {**before["tracks"], track.value: wanted}})

    def restart(self, track: Track, *, dry_run: bool = False) -> str:
        """See `Procedures.restart`."""
        status = self._cluster.status()
        before = {track.value: {"replicas": [r.name for r in status.replicas if r.track is track]}}
        after = {track.value: {"replicas": [f"new, instead of {name}" for name in before[track.value]["replicas"]]}}
        _deployed(desired(status), track)
        if not dry_run:
            self._cluster.restart(track)
        return diff(before, after)

    def switch(self, track: Track, lease_s: float | None, *, dry_run: bool = False) -> str:
        """See `Procedures.switch`."""
        before = desired(self._cluster.status())
        if not dry_run:
            self._cluster.set_weights({track: 1.0}, lease_s=lease_s)
        return diff(before, {**before, "traffic": {track.value: 1.0}, "mirror": {}})

    def guard(self, *, dry_run: bool = False) -> str:
        """See `Procedures.guard`. A cluster that returns the traffic by itself never has anything left to do here."""
        status = self._cluster.status()
        until = status.lease_expires_at
        if until is None or until > datetime.now(UTC) or Track.stable not in status.versions:
            return ""
        if not dry_run:
            self._cluster.set_weights({Track.stable: 1.0})
        return f"nobody renewed the rollout's lease by {until:%H:%M:%S} UTC: all traffic to stable"

    def stick(self, *, on: bool, dry_run: bool = False) -> str:  # noqa: ARG002 (nothing to switch)
        """See `Procedures.stick`: the gateway always keeps a user who is named."""
        return "the gateway keeps each user of the header X-Khet-User on one version" if on else ""


def desired(status: ClusterStatus) -> dict[str, Any]:
    """What the cluster was asked for, as plain values."""
    counts = Counter(replica.track for replica in status.replicas)
    return {
        "tracks": {t.value: {"version": str(v), "replicas": counts[t]} for t, v in sorted(status.versions.items())},
        "traffic": {t.value: w for t, w in sorted(status.weights.items())},
        "mirror": {t.value: w for t, w in sorted(status.mirror.items())},
    }


def diff(before: Mapping[str, Any], after: Mapping[str, Any], name: str = "cluster") -> str:
    """A unified diff of two objects as YAML; empty when they are equal."""
    live, planned = (yaml.safe_dump(dict(value), sort_keys=True).splitlines() for value in (before, after))
    lines = difflib.unified_diff(live, planned, fromfile=f"live/{name}", tofile=f"planned/{name}", lineterm="")
    return "\n".join(lines)


def served_replicas(status: ClusterStatus, track: Track = Track.stable) -> tuple[Version, int]:
    """The version that a track should serve, and how many replicas it has.

    Raises:
        ExternalError: the track is not deployed.
    """
    if track not in status.versions:
        raise ExternalError(
            f"{track} is not deployed: there is nothing to change. Next: `khet release`.", retryable=False
        )
    return status.versions[track], sum(replica.track is track for replica in status.replicas)


def _deployed(state: Mapping[str, Any], track: Track) -> dict[str, Any]:
    if track.value not in state["tracks"]:
        raise ConfigError(f"track {track} is not deployed. Nothing was changed.")
    return dict(state["tracks"][track.value])
