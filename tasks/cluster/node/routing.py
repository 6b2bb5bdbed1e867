"""Which track answers a request. Pure but for its two counters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tasks.cluster import Track
from tasks.cluster.sticky import track_of

# Fractional parts of n x an irrational number fill [0, 1) more evenly than chance does (Weyl; the golden ratio is the
# most even of all, Knuth, TAOCP 3, section 6.4): of any 1,000 requests a weight of 5 % gets 50, give or take 2. Unlike
# "every 20th request" the sequence has no period that could lock in with that of the traffic, a replayer's say.
_GOLDEN = (math.sqrt(5) - 1) / 2
_SILVER = math.sqrt(2) - 1


class Router:
    """Shares requests among tracks. Past the lease everything goes to stable, whoever is late to notice."""

    def __init__(self) -> None:
        self.weights: Mapping[Track, float] = {}
        self.mirror: Mapping[Track, float] = {}
        self._deadline = math.inf
        self._point = 0.0
        self._mirror_point = 0.0
        self._bounds: tuple[tuple[float, Track], ...] = ()
        self._salt = ""

    def set(
        self, weights: Mapping[Track, float], mirror: Mapping[Track, float], deadline: float | None, salt: str = ""
    ) -> None:
        """Use these from now on; `deadline` is the lease's end on the monotonic clock, `salt` deals users to tracks."""
        self.weights, self.mirror, self._salt = weights, mirror, salt
        self._deadline = math.inf if deadline is None else deadline
        total, bounds = 0.0, []
        for track, weight in weights.items():
            total += weight
            bounds.append((total, track))
        self._bounds = tuple(bounds)

    @property
    def main(self) -> Track:
        """The track that answers everybody, or stable where several share."""
        return next(iter(self.weights)) if len(self.weights) == 1 else Track.stable

    def choose(self, now: float, user: str | None = None) -> Track:
        """The track for the next request; `now` on the monotonic clock. A user who is named stays on one track."""
        if not self._bounds or now >= self._deadline:
            return Track.stable
        if user:
            return track_of(user, self._salt, self.weights)
        self._point = (self._point + _GOLDEN) % 1.0
        for bound, track in self._bounds:
            if self._point < bound:
                return track
        return self._bounds[-1][1]

    def copies(self, served_by: Track, now: float) -> list[Track]:
        """The tracks that get a copy of a request that `served_by` answered."""
        if not self.mirror or now >= self._deadline:
            return []
        self._mirror_point = (self._mirror_point + _SILVER) % 1.0
        return [t for t, share in self.mirror.items() if t is not served_by and self._mirror_point < share]
