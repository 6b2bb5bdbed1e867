"""Shadow by replay, where nothing between users and replicas mirrors requests: a replayed photo that a user's path
answered is sent to the canary too, and the two answers are compared, as a mirroring gateway would."""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

from tasks.cluster import Track, TrackCounters

# Upper bounds in ms; a replica's own are the same (0.0025 s is 2.5 ms), so that both histograms compare.
_BOUNDS_MS: Final = (
    1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0, float("inf"),
)  # fmt: skip
# A node learns of a Service's new pod some time after the pod is ready; seconds, and tens of them where it is busy.
_WAY_OPENS_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a version said to a photo."""

    named: str
    is_leaf: bool

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Answer:
        """From the JSON of an answer."""
        return cls(str(body["class"]), bool(body.get("is_leaf", True)))


class Shadow:
    """Counts pairs of answers; safe to use from the rollout's thread and the replayer's. Counts only grow."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._address: str | None = None
        self._way_opens_by: float | None = None
        self._buckets: Counter[int] = Counter()
        self._errors = 0
        self._ood = 0
        self._classes: Counter[str] = Counter()
        self._pairs: Counter[str] = Counter()
        self._differ: Counter[str] = Counter()

    @property
    def address(self) -> str | None:
        """Where copies go; None: there are none."""
        return self._address

    def aim(self, address: str | None) -> None:
        """Send copies there from now on, or (None) no more."""
        with self._lock:
            self._way_opens_by = self._monotonic() + _WAY_OPENS_S
            self._address = address

    def compared(self, told: Answer, said: Answer, seconds: float) -> None:
        """A user was told one thing and the canary said another, or the same."""
        with self._lock:
            self._way_opens_by = None
            self._note_latency(seconds)
            self._pairs[told.named] += 1
            self._differ[told.named] += told.named != said.named
            self._classes[said.named] += 1
            self._ood += not said.is_leaf

    def failed(self, seconds: float) -> None:
        """The canary did not answer a copy, or with an error."""
        with self._lock:
            self._way_opens_by = None
            self._note_latency(seconds)
            self._errors += 1

    def unreached(self, seconds: float) -> None:
        """There was no connection. Before the first one, and not for long, that is the network's doing, and tells
        nothing of the canary; else the canary did not answer."""
        with self._lock:
            waiting = self._way_opens_by is not None and self._monotonic() < self._way_opens_by
        if not waiting:
            self.failed(seconds)

    def added_to(self, counters: Mapping[Track, TrackCounters]) -> dict[Track, TrackCounters]:
        """The counters, with the pairs on the canary's."""
        counted = dict(counters)
        if Track.canary in counted and self._buckets:
            counted[Track.canary] = self._add(counted[Track.canary])
        return counted

    def _note_latency(self, seconds: float) -> None:
        self._buckets[bisect.bisect_left(_BOUNDS_MS, seconds * 1e3)] += 1

    def _add(self, canary: TrackCounters) -> TrackCounters:
        with self._lock:
            cumulative = accumulate(self._buckets[number] for number in range(len(_BOUNDS_MS)))
            return replace(
                canary,
                shadow_pairs=self._pairs.total(),
                shadow_differ=self._differ.total(),
                shadow_errors=self._errors,
                shadow_latency_ms=dict(zip(_BOUNDS_MS, cumulative, strict=True)),
                shadow_ood=self._ood,
                shadow_classes=dict(self._classes),
                shadow_by_class={told: (pairs, self._differ[told]) for told, pairs in self._pairs.items()},
            )
