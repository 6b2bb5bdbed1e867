"""What each control call makes of the desired state. Pure: state in, state out, or a `KhetError` and no change."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from configs.errors import ConfigError, SafetyError
from tasks.cluster import Track
from tasks.cluster.memory import Memory
from tasks.cluster.node.state import Desired, DesiredTrack

_SUM_TOLERANCE = 1e-6
_REPLICA_BYTES = 500_000_000  # the least a replica is taken to need: interpreter, runtime and a model of some 20 MB


def deploy(old: Desired, track: Track, version: str, replicas: int) -> Desired:
    """`track` shall run `version`. Another version on a track other than stable first loses the traffic and the copies
    the earlier one had: whoever granted those had judged the earlier one."""
    before = old.tracks.get(track)
    generation = before.generation if before else 0
    wanted = DesiredTrack(version=version, replicas=replicas, generation=generation)
    if before is not None and before.version == version:
        wanted = before.model_copy(update={"replicas": replicas, "fast": False})
    elif track is not Track.stable:
        old = give_back(old, track)
    new = _with(old, tracks={**old.tracks, track: wanted})
    if track is Track.stable and not new.weights:
        new = _with(new, weights={Track.stable: 1.0})
    return new


def set_weights(
    old: Desired, weights: Mapping[Track, float], mirror: Mapping[Track, float], lease_until: datetime | None
) -> Desired:
    """Replace weights, mirroring and lease as one. No weights: nobody is served; with guests
    beside stable that is an error.

    Raises:
        ConfigError: the weights do not sum to 1, or name a track that is not deployed.
    """
    shares = {track: share for track, share in weights.items() if share > 0}
    copies = {track: share for track, share in mirror.items() if share > 0}
    nobody = not shares and set(old.tracks) <= {Track.stable}
    if not nobody and abs(sum(shares.values()) - 1.0) > _SUM_TOLERANCE:
        raise ConfigError(f"weights sum to {sum(shares.values()):g}, not to 1. The traffic is as it was.")
    for track in (*shares, *copies):
        _deployed(old, track)
    return _with(old, weights=shares, mirror=copies, lease_expires_at=lease_until, lease_lost_at=None)


def renew(old: Desired, until: datetime, now: datetime) -> Desired:
    """Extend the lease; never shortens it.

    Raises:
        SafetyError: no lease is held, or it has expired.
    """
    if old.lease_expires_at is None or old.lease_expires_at <= now:
        lost = old.lease_expires_at or old.lease_lost_at
        what = f"The lease expired at {lost:%H:%M:%S} UTC" if lost else "No lease is held"
        raise SafetyError(
            f"{what}: all traffic is on stable and mirroring has stopped. "
            "Next: judge the canary anew from its first step, or remove it."
        )
    return _with(old, lease_expires_at=max(until, old.lease_expires_at))


def expire(old: Desired) -> Desired:
    """The state after the lease was lost: all traffic on stable, no copies."""
    return _with(to_stable(old), lease_lost_at=old.lease_expires_at)


def to_stable(old: Desired) -> Desired:
    """All traffic on stable (none at all where stable is not deployed), no copies, no lease."""
    weights = {Track.stable: 1.0} if Track.stable in old.tracks else {}
    return _with(old, weights=weights, mirror={}, lease_expires_at=None)


def retreat(old: Desired) -> Desired:
    """All traffic where no unjudged version answers: on stable, or where it is if `previous` answers everybody."""
    if old.weights.get(Track.previous) == 1.0:
        return _with(old, mirror={}, lease_expires_at=None)
    return to_stable(old)


def give_back(old: Desired, track: Track) -> Desired:
    """Hand the share of `track` to stable and stop copies to it."""
    if not old.weights.get(track) and not old.mirror.get(track):
        return old
    weights = {t: w for t, w in old.weights.items() if t is not track}
    mirror = {t: w for t, w in old.mirror.items() if t is not track}
    if Track.stable not in old.tracks:
        return to_stable(old)
    weights[Track.stable] = weights.get(Track.stable, 0.0) + old.weights.get(track, 0.0)
    alone = set(weights) == {Track.stable} and not mirror
    return _with(old, weights=weights, mirror=mirror, lease_expires_at=None if alone else old.lease_expires_at)


def scale(old: Desired, track: Track, replicas: int) -> Desired:
    """Change a track's number of replicas.

    Raises:
        ConfigError: the track is not deployed.
    """
    wanted = _deployed(old, track).model_copy(update={"replicas": replicas})
    return _with(old, tracks={**old.tracks, track: wanted})


def restart(old: Desired, track: Track, key: str) -> Desired:
    """Ask for new replicas of the same version, once per `key`.

    Raises:
        ConfigError: the track is not deployed.
    """
    wanted = _deployed(old, track)
    if wanted.restart_key == key:
        return old
    renewed = wanted.model_copy(update={"generation": wanted.generation + 1, "restart_key": key, "fast": False})
    return _with(old, tracks={**old.tracks, track: renewed})


def remove(old: Desired, track: Track) -> Desired:
    """Take a track away; one that is not deployed stays so.

    Raises:
        SafetyError: it has traffic.
    """
    if share := old.weights.get(track, 0.0):
        raise SafetyError(
            f"{track} answers {share:.0%} of the traffic; it was not removed. "
            "Next: move its weight to another track, then remove it."
        )
    tracks = {t: wanted for t, wanted in old.tracks.items() if t is not track}
    return _with(give_back(old, track), tracks=tracks)


def rollback(old: Desired, version: str, replicas: int) -> Desired:
    """Stable with `version`, replicas started side by side; every other track is removed, less one that answers
    everybody meanwhile."""
    new = retreat(deploy(old, Track.stable, version, replicas))
    tracks = {track: wanted for track, wanted in new.tracks.items() if new.weights.get(track)}
    stable = new.tracks[Track.stable].model_copy(update={"fast": True})
    return _with(new, tracks={**tracks, Track.stable: stable})


def remember(old: Desired, memory: Memory) -> Desired:
    """Replace the memory by its next revision; another one was made from an older state and changes nothing."""
    return _with(old, memory=memory) if memory.revision == old.memory.revision + 1 else old


def room(desired: Desired, running: int, cores: int, free_bytes: int, largest_bytes: int) -> int:
    """How many more replicas the machine has room for: one a core, for replicas that share a core also share their
    latency, and as many as the free memory holds of the largest one. Retiring replicas and those still to be started
    count as running."""
    occupied = max(running, sum(wanted.replicas for wanted in desired.tracks.values()))
    return max(0, min(cores - occupied, free_bytes // max(largest_bytes, _REPLICA_BYTES)))


def _deployed(desired: Desired, track: Track) -> DesiredTrack:
    if track not in desired.tracks:
        known = ", ".join(desired.tracks) or "none"
        raise ConfigError(f"track {track} is not deployed (deployed: {known}). Nothing was changed. Next: deploy it.")
    return desired.tracks[track]


def _with(old: Desired, **changes: Any) -> Desired:
    return old.model_copy(update=changes)
