"""What the gateway saw of each version on each track: counts and histograms, kept in memory."""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate

from tasks.cluster import Track
from tasks.cluster.node.answers import Prediction

# Upper bounds in ms. Fine enough to place a quantile within 20-30 %; 250, 500, 1000 and 2000 are usual objectives.
BOUNDS_MS = (
    1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250, 300, 400, 500, 600, 800,
    1000, 1200, 1500, 2000, 2500, 3000, 4000, 5000, 6000, 8000, 10_000, float("inf"),
)  # fmt: skip
_KEPT_EXAMPLES = 50
# A broken replica that invents classes must not fill the memory: what is beyond is counted under one name.
_MAX_CLASSES = 1_000
_MAX_NAME = 200
OTHER_CLASSES = "__other__"


class Histogram:
    """Counts of durations in the buckets of `BOUNDS_MS`."""

    __slots__ = ("_counts", "sum_ms")

    def __init__(self) -> None:
        self._counts = [0] * len(BOUNDS_MS)
        self.sum_ms = 0.0

    def add(self, duration_ms: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS_MS, duration_ms)] += 1
        self.sum_ms += duration_ms

    def cumulative(self) -> dict[float, int]:
        """Upper bound in ms to the count of durations up to it, as in Prometheus."""
        return dict(zip(BOUNDS_MS, accumulate(self._counts), strict=True))


@dataclass(frozen=True, slots=True)
class Difference:
    """A mirrored request that two versions answered with different classes."""

    at: datetime
    request_id: str
    served_by: str
    served_class: str
    mirrored_to: str
    mirrored_class: str


@dataclass(slots=True)
class Counters:
    """One version on one track since `since`. `statuses`: an HTTP status, or why there was none, to its count;
    `pairs_by_class` and `differ_by_class`: mirrored requests by the class that the user was told.

    An attempt is what is counted: a request that a broken canary could not answer and stable then did is one (failed)
    request of canary and one of stable.
    """

    track: Track
    version: str
    since: datetime
    errors: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)
    classes: Counter[str] = field(default_factory=Counter)
    ood: int = 0
    shadow_pairs: int = 0
    shadow_differ: int = 0
    shadow_errors: int = 0
    shadow_dropped: int = 0
    shadow_latency: Histogram = field(default_factory=Histogram)
    shadow_classes: Counter[str] = field(default_factory=Counter)
    shadow_ood: int = 0
    pairs_by_class: Counter[str] = field(default_factory=Counter)
    differ_by_class: Counter[str] = field(default_factory=Counter)
    examples: deque[Difference] = field(default_factory=lambda: deque(maxlen=_KEPT_EXAMPLES))

    @property
    def requests(self) -> int:
        return self.statuses.total()

    @property
    def predictions(self) -> int:
        return self.classes.total()

    def answered(self, status: int, duration_ms: float) -> None:
        """Count an answer; 5xx are errors."""
        self.statuses[str(status)] += 1
        self.latency.add(duration_ms)
        self.errors += status >= 500

    def failed(self, reason: str, duration_ms: float | None = None) -> None:
        """Count a request that got no answer; `duration_ms` where waiting for it took time (a timeout)."""
        self.statuses[reason] += 1
        self.errors += 1
        if duration_ms is not None:
            self.latency.add(duration_ms)

    def predicted(self, prediction: Prediction) -> None:
        """Count what a user was told."""
        self.classes[_bounded(prediction.named, self.classes)] += 1
        self.ood += not prediction.is_leaf

    def compared(self, served: Prediction, mirrored: Prediction) -> bool:
        """Count a pair of answers to one mirrored request; returns whether they name different classes."""
        differ = served.named != mirrored.named
        told = _bounded(served.named, self.pairs_by_class)
        self.shadow_pairs += 1
        self.pairs_by_class[told] += 1
        if differ:
            self.shadow_differ += 1
            self.differ_by_class[told] += 1
        self.shadow_classes[_bounded(mirrored.named, self.shadow_classes)] += 1
        self.shadow_ood += not mirrored.is_leaf
        return differ


class Ledger:
    """The counters of every version that a track serves or served a moment ago."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[Track, str], Counters] = {}

    def of(self, track: Track, version: str, now: datetime) -> Counters:
        """The counters of this pair, begun `now` when there are none."""
        found = self._by_key.get((track, version))
        if found is None:
            found = self._by_key[track, version] = Counters(track, version, now)
        return found

    def begin(self, track: Track, version: str, now: datetime) -> None:
        """Count from zero: the version was put on the track now."""
        self._by_key[track, version] = Counters(track, version, now)

    def keep_only(self, served: set[tuple[Track, str]]) -> None:
        """Drop what no replica serves and nobody wants."""
        self._by_key = {key: kept for key, kept in self._by_key.items() if key in served}

    def __iter__(self) -> Iterator[Counters]:
        return iter(tuple(self._by_key.values()))


def _bounded(named: str, known: Collection[str]) -> str:
    if named in known or (len(known) < _MAX_CLASSES and len(named) <= _MAX_NAME):
        return named
    return OTHER_CLASSES
