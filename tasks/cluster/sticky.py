"""Keep a user on the version they met first. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from tasks.cluster import Track

USER_HEADER = "X-Khet-User"
_SPAN = 1 << 64


def position(user: str, salt: str) -> float:
    """Where a user lies in [0, 1): evenly over users, and always the same for one `salt`. Another salt deals anew, so
    that the same people are not the first to meet every new version."""
    digest = hashlib.sha256(f"{salt}\0{user}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / _SPAN


def track_of(user: str, salt: str, weights: Mapping[Track, float]) -> Track:
    """The track of a user. Who is on the canary stays there while its share grows: stable has the end of the scale."""
    point, end = position(user, salt), 0.0
    for track in (Track.canary, Track.baseline):
        end += weights.get(track, 0.0)
        if point < end:
            return track
    return Track.stable
