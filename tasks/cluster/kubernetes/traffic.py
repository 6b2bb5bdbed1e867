"""Which pods get users' traffic. Pure.

Without a gateway the Service sends every connection to any of the pods it selects, so a track's share is its part of
these pods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tasks.cluster import Track


@dataclass(frozen=True, slots=True)
class PodTraffic:
    """One pod of the service. `age` orders pods of a track: the oldest come first."""

    name: str
    track: Track
    ready: bool
    on: bool
    age: str = ""


def allocate(pods: Mapping[Track, int], weights: Mapping[Track, float]) -> dict[Track, int]:
    """How many ready pods of each track should get traffic so that the shares are as near to `weights` as they can.

    A track with a weight gets at least one pod, one without gets none. There are never fewer pods than stable has, as
    far as the tracks with a weight have them: what one canary pod of 30 cannot take is not pressed on it. Of equally
    near choices the one with less traffic on guests is taken, then the one with more pods.
    """
    tracks = [track for track in Track if weights.get(track, 0.0) > 0 and pods.get(track, 0) > 0]
    if not tracks:
        return {}
    available = [pods[track] for track in tracks]
    grid = np.meshgrid(*(np.arange(1, count + 1) for count in available), indexing="ij")
    counts = np.stack([axis.ravel() for axis in grid])
    counts = counts[:, counts.sum(axis=0) >= min(pods.get(Track.stable, 0), sum(available))]
    total = counts.sum(axis=0)
    wanted = np.array([weights[track] for track in tracks])
    shares = counts / total
    far = np.abs(shares - (wanted / wanted.sum())[:, None]).max(axis=0).round(9)
    guests = 1.0 - shares[tracks.index(Track.stable)] if Track.stable in tracks else np.ones_like(total, dtype=float)
    best = np.lexsort((-total, guests.round(9), far))[0]
    return {track: int(count) for track, count in zip(tracks, counts[:, best], strict=True)}


def shares(counts: Mapping[Track, int]) -> dict[Track, float]:
    """The share of traffic that so many pods of each track get."""
    total = sum(counts.values())
    return {track: count / total for track, count in counts.items() if count}


def reachable(stable: int, canary: int, weight: float) -> float:
    """The share that `canary` pods beside `stable` ones get when they are asked to take `weight`."""
    found = allocate({Track.stable: stable, Track.canary: canary}, {Track.stable: 1.0 - weight, Track.canary: weight})
    return shares(found).get(Track.canary, 0.0)


def switches(pods: Iterable[PodTraffic], weights: Mapping[Track, float]) -> list[tuple[str, bool]]:
    """Pods whose traffic has to be turned on (True) or off, on before off: there is always somebody to answer.

    A pod of a guest that is not ready has none, or it would get some as soon as it is; one of stable keeps it.
    """
    ordered = sorted(pods, key=lambda pod: (not pod.on, pod.age, pod.name))
    ready = {track: sum(pod.ready for pod in ordered if pod.track is track) for track in Track}
    wanted = allocate(ready, weights)
    left, changes = dict(wanted), []
    for pod in ordered:
        on = _wanted(pod, left, weights)
        if on is not pod.on:
            changes.append((pod.name, on))
    return sorted(changes, key=lambda change: not change[1])


def _wanted(pod: PodTraffic, left: dict[Track, int], weights: Mapping[Track, float]) -> bool:
    if pod.track is Track.stable and (not pod.ready or weights.get(Track.stable) == 1.0):
        return weights.get(Track.stable, 0.0) > 0
    if not pod.ready or not left.get(pod.track):
        return False
    left[pod.track] -= 1
    return True
