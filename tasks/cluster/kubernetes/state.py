"""The rollout's state as the cluster keeps it: annotations of the stable Deployment, and a Lease."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from ml.version import Version, is_version
from tasks.cluster import Track
from tasks.cluster.kubernetes.client import Object
from tasks.cluster.kubernetes.objects import MEMORY, MIRROR, TRACK, VERSION, WEIGHTS
from tasks.cluster.memory import Memory
from tasks.cluster.node.state import Desired, DesiredTrack

log = logging.getLogger(__name__)

_NOBODY: Final = "{}"  # weights of a service that nobody is to be sent to
_ROUNDING: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read: the desired state, and the objects that it came from."""

    desired: Desired
    deployments: Mapping[Track, Object] = field(default_factory=dict)
    lease: Object | None = None

    @property
    def holder(self) -> str | None:
        """Who holds the lease."""
        spec = (self.lease or {}).get("spec") or {}
        return spec.get("holderIdentity") or None


def read(deployments: list[Object], lease: Object | None) -> Seen:
    """The state that these objects tell. Weights that nobody can read, or of a track that somebody deleted, are
    stable's."""
    by_track = {Track(d["metadata"]["labels"][TRACK]): d for d in deployments if _is_ours(d)}
    tracks = {track: _track(found) for track, found in by_track.items()}
    expires, lost = _ends(lease)
    annotations = by_track[Track.stable]["metadata"].get("annotations") or {} if Track.stable in by_track else {}
    mirror = {track: share for track, share in _shares(annotations.get(MIRROR)).items() if track in tracks}
    desired = Desired.model_construct(
        tracks=tracks,
        weights=_weights(annotations.get(WEIGHTS), tracks) if Track.stable in tracks else {},
        mirror=mirror,
        lease_expires_at=expires,
        lease_lost_at=lost,
    )
    return Seen(desired, by_track, lease)


def _weights(text: str | None, tracks: Collection[Track]) -> dict[Track, float]:
    if text == _NOBODY:
        return {}
    weights = {track: share for track, share in _shares(text).items() if track in tracks}
    if (lost := 1.0 - sum(weights.values())) > _ROUNDING:
        weights[Track.stable] = weights.get(Track.stable, 0.0) + lost
    return weights


def _is_ours(deployment: Object) -> bool:
    labels = deployment["metadata"].get("labels") or {}
    return labels.get(TRACK) in Track.__members__ and is_version(labels.get(VERSION, ""))


def _track(deployment: Object) -> DesiredTrack:
    version = deployment["metadata"]["labels"][VERSION]
    return DesiredTrack.model_construct(version=version, replicas=deployment["spec"].get("replicas", 1))


def memory(stable: Object | None) -> Memory:
    """What the stable Deployment remembers; nothing where a person's edit made it unreadable."""
    text = ((stable or {}).get("metadata", {}).get("annotations") or {}).get(MEMORY)
    if not text:
        return Memory()
    try:
        return Memory.model_validate_json(text)
    except ValidationError as error:
        log.warning("the annotation %s cannot be read; it counts as empty: %s", MEMORY, error)
        return Memory()


def versions(desired: Desired) -> dict[Track, Version]:
    """The version of each track."""
    return {track: Version.parse(wanted.version) for track, wanted in desired.tracks.items()}


def _shares(text: str | None) -> dict[Track, float]:
    try:
        found = {Track(track): float(share) for track, share in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}
    return {track: share for track, share in found.items() if 0 < share <= 1}


def written(desired: Desired) -> dict[str, str | None]:
    """How weights and mirroring are written; None removes what is as if nothing had been written."""
    mirror = {str(track): share for track, share in desired.mirror.items()}
    weights = {str(track): share for track, share in desired.weights.items()}
    return {
        WEIGHTS: None if desired.weights == {Track.stable: 1.0} else json.dumps(weights, sort_keys=True),
        MIRROR: json.dumps(mirror, sort_keys=True) if mirror else None,
    }


# The Lease: held while its holderIdentity is set. A released one that was lost keeps its times, for the message.


def identity() -> str:
    """Who holds a lease: this process."""
    return f"{socket.gethostname()}_{os.getpid()}"


def lease_end(now: datetime, lease_s: float) -> datetime:
    """When a lease of so many seconds ends: leases are whole seconds, rounded up."""
    return now + timedelta(seconds=math.ceil(lease_s))


def held(until: datetime, now: datetime) -> dict[str, Any]:
    """The spec of a Lease of ours that ends at `until`."""
    seconds = max(1, math.ceil((until - now).total_seconds()))
    at = _micro(until - timedelta(seconds=seconds))
    return {"holderIdentity": identity(), "leaseDurationSeconds": seconds, "acquireTime": at, "renewTime": at}


def released(lease: Object, *, lost: bool) -> dict[str, Any]:
    """The spec of the Lease when nobody holds it any more."""
    spec = {name: value for name, value in lease["spec"].items() if name != "holderIdentity"}
    return spec if lost else {name: value for name, value in spec.items() if name != "renewTime"}


def _ends(lease: Object | None) -> tuple[datetime | None, datetime | None]:
    """When the lease ends, and when it was lost."""
    spec = (lease or {}).get("spec") or {}
    if not spec.get("renewTime") or not spec.get("leaseDurationSeconds"):
        return None, None
    end = datetime.fromisoformat(spec["renewTime"]) + timedelta(seconds=spec["leaseDurationSeconds"])
    return (end, None) if spec.get("holderIdentity") else (None, end)


def _micro(at: datetime) -> str:
    """A MicroTime: always six digits, the API server accepts no others."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def expired(seen: Seen, now: datetime) -> bool:
    """Whether the lease is over and traffic has still to be returned."""
    return seen.desired.lease_expires_at is not None and seen.desired.lease_expires_at <= now


__all__ = [
    "Seen", "expired", "held", "identity", "lease_end", "memory", "read", "released", "versions", "written",
]  # fmt: skip
