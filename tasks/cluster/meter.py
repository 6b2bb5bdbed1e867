"""Running totals from counters that begin anew now and then. Pure: no I/O, no clock.

Counters begin at zero when a gateway or replica starts. What was counted before is not lost: every look adds what was
new in it, as Prometheus' `increase()` does, except that a moved `since` tells of a reset even where the new count has
already outgrown the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from tasks.cluster import Track, TrackCounters

_COUNTS = (
    "requests", "errors", "predictions", "ood", "shadow_pairs", "shadow_differ", "shadow_errors", "shadow_ood",
)  # fmt: skip
_BY_NAME = ("classes", "shadow_classes")
_HISTOGRAMS = ("latency_ms", "shadow_latency_ms")

Arithmetic = Callable[[int, int], int]


class Meter:
    """Totals by track since the first look, from one source of counters or from several (replicas, say).

    The totals do not depend on how often it was fed, as long as nothing begins anew between two looks; what was counted
    after the last look before a reset is lost, as it is for everyone. Memory: the totals, and the last look of each
    source.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, Track], TrackCounters] = {}
        self._totals: dict[Track, TrackCounters] = {}
        self._began = False

    @property
    def totals(self) -> Mapping[Track, TrackCounters]:
        """What was counted of every track's latest version since the first look; `since` is that of the first counters
        that are part of it."""
        return dict(self._totals)

    def feed(self, counters: Mapping[Track, TrackCounters]) -> Mapping[Track, TrackCounters]:
        """Take a look at the only source; see `feed_all`."""
        return self.feed_all({"": counters})

    def feed_all(self, sources: Mapping[str, Mapping[Track, TrackCounters]]) -> Mapping[Track, TrackCounters]:
        """Take a look at the counters of every source, by its name; returns what this look added.

        The first look is the start: what it shows was counted before. A source or track that comes later counts in
        full, and so does one that began anew. One that is missing may come back and has lost nothing. Another version
        on a track starts the track's totals anew.
        """
        added: dict[Track, TrackCounters] = {}
        for source, counters in sources.items():
            for track, now in counters.items():
                _add(added, track, self._news(source, track, now))
        for track, news in added.items():
            _add(self._totals, track, news)
        self._began = True
        return added

    def _news(self, source: str, track: Track, now: TrackCounters) -> TrackCounters:
        before = self._last.get((source, track))
        self._last[source, track] = now
        if before is None:
            return now if self._began else minus(now, now)
        news = minus(now, before)
        continues = (before.version, before.since) == (now.version, now.since) and not _went_down(news)
        return news if continues else now


def plus(left: TrackCounters, right: TrackCounters) -> TrackCounters:
    """Both together, as `left` names version and `since`."""
    return _combine(left, right, int.__add__)


def minus(now: TrackCounters, before: TrackCounters) -> TrackCounters:
    """What was added since `before`."""
    return _combine(now, before, int.__sub__)


def _went_down(news: TrackCounters) -> bool:
    """Whether any counter shrank. They begin anew together: then each of them did."""
    named = (getattr(news, name).values() for name in (*_BY_NAME, *_HISTOGRAMS))
    counts = (getattr(news, name) for name in _COUNTS)
    return any(count < 0 for count in chain(counts, *named, *news.shadow_by_class.values()))


def _add(totals: dict[Track, TrackCounters], track: Track, news: TrackCounters) -> None:
    total = totals.get(track)
    totals[track] = plus(total, news) if total is not None and total.version == news.version else news


def _combine(left: TrackCounters, right: TrackCounters, operation: Arithmetic) -> TrackCounters:
    changed: dict[str, Any] = {"shadow_by_class": _pairs(left.shadow_by_class, right.shadow_by_class, operation)}
    for name in _COUNTS:
        changed[name] = operation(getattr(left, name), getattr(right, name))
    for name in _BY_NAME:
        changed[name] = _by_name(getattr(left, name), getattr(right, name), operation)
    for name in _HISTOGRAMS:
        changed[name] = _histograms(getattr(left, name), getattr(right, name), operation)
    return replace(left, **changed)


def _by_name(left: Mapping[str, int], right: Mapping[str, int], operation: Arithmetic) -> dict[str, int]:
    return {name: operation(left.get(name, 0), right.get(name, 0)) for name in sorted({*left, *right})}


def _pairs(
    left: Mapping[str, tuple[int, int]], right: Mapping[str, tuple[int, int]], operation: Arithmetic
) -> dict[str, tuple[int, int]]:
    nothing = (0, 0)
    return {
        name: (
            operation(left.get(name, nothing)[0], right.get(name, nothing)[0]),
            operation(left.get(name, nothing)[1], right.get(name, nothing)[1]),
        )
        for name in sorted({*left, *right})
    }


def _histograms(left: Mapping[float, int], right: Mapping[float, int], operation: Arithmetic) -> dict[float, int]:
    """By cumulative bucket. A bound that one of them lacks has there the count of the next lower one: nothing is called
    quicker than it is known to be."""
    bounds = sorted({*left, *right})
    return dict(zip(bounds, map(operation, _at(left, bounds), _at(right, bounds)), strict=True))


def _at(histogram: Mapping[float, int], bounds: list[float]) -> list[int]:
    """The cumulative counts at these ascending bounds."""
    counts, below = [], 0
    for bound in bounds:
        below = histogram.get(bound, below)
        counts.append(below)
    return counts
