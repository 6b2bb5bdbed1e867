"""How many samples the judge needs to see a stated harm: simulated with the judge's own evidence. Pure, seeded.

A gate's harm is claimed at the first look at which its evidence reaches the threshold. That moment has no closed form
(it is the crossing time of a random walk), so a few hundred rollouts are drawn on a geometric grid of looks. The judge
looks more often than this grid: its true need is lower by at most the grid's step, 8 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tasks.rollout import anytime
from tasks.rollout.anytime import Rate

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Counts = tuple[npt.NDArray[Any], ...]

ROLLOUTS: Final = 200
# Nobody waits for more samples than this: harm that needs them is not seen.
MOST_SAMPLES: Final = 1_000_000
_PILOTS: Final = 20
_COARSE, _FINE = 1.5, 1.08
# The fine grid reaches from this part of the usual need to as many times of it.
_AROUND: Final = 6.0
# Upper bounds of latency in ms, about as far apart as those of the gateway.
_NORMAL: Final = NormalDist()
_BOUNDS: Final[Floats] = np.append(np.geomspace(1.0, 10_000.0, 39), math.inf)


@dataclass(frozen=True, slots=True)
class Looks:
    """Cumulative samples of both sides at every look."""

    canary: Ints
    baseline: Ints


class Stream(Protocol):
    """What one gate is told about a harmful canary and its baseline."""

    def draw(self, rng: np.random.Generator, looks: Looks, rollouts: int) -> Counts:
        """Cumulative counts at every look, each an array that begins with the axes rollout and look."""

    def evidence(self, *counts: Any) -> float:
        """The gate's evidence (natural logarithm) for the counts of one look."""

    def bound(self, *counts: Any) -> Floats:
        """At least the evidence, for all rollouts and looks at once: most looks need no closer look."""


@dataclass(frozen=True, slots=True)
class Worse:
    """A rate that is compared with the baseline's. `groups`: e-processes that the evidence is averaged over, all others
    of which are taken to say nothing."""

    usual: float
    harm: float
    margin: float
    groups: int = 1

    def draw(self, rng: np.random.Generator, looks: Looks, rollouts: int) -> Counts:
        """See `Stream.draw`."""
        ours = _binomial(rng, looks.canary, self.harm, rollouts)
        theirs = _binomial(rng, looks.baseline, self.usual, rollouts)
        return ours, np.broadcast_to(looks.canary, ours.shape), theirs, np.broadcast_to(looks.baseline, ours.shape)

    def evidence(self, *counts: Any) -> float:
        """See `Stream.evidence`."""
        bad, total, their_bad, their_total = map(int, counts)
        found = anytime.worse(Rate(bad, total), Rate(their_bad, their_total), self.margin)
        return found - math.log(self.groups)

    def bound(self, *counts: Any) -> Floats:
        """At one rate of the baseline, by the likelihood of what was seen: no alternative explains it better."""
        bad, total, their_bad, their_total = counts
        pooled = (bad + their_bad - self.margin * total) / (total + their_total)
        rate = np.clip(pooled, 1e-9, max(1e-9, 1.0 - self.margin - 1e-9))
        against = _above_bound(bad, total, rate + self.margin)
        below = _above_bound(their_total - their_bad, their_total, 1.0 - rate)
        result: Floats = against + below - math.log(self.groups)
        return result


@dataclass(frozen=True, slots=True)
class Above:
    """A rate that is held against a fixed limit, in one of `groups` equally frequent groups of samples. A group with
    fewer than `at_least` samples says nothing yet."""

    harm: float
    limit: float
    groups: int = 1
    at_least: int = 1

    def draw(self, rng: np.random.Generator, looks: Looks, rollouts: int) -> Counts:
        """See `Stream.draw`."""
        own = looks.canary // self.groups
        bad = _binomial(rng, own, self.harm, rollouts)
        return bad, np.broadcast_to(own, bad.shape)

    def evidence(self, *counts: Any) -> float:
        """See `Stream.evidence`."""
        bad, total = map(int, counts)
        return anytime.above(Rate(bad, total), self.limit) - math.log(self.groups)

    def bound(self, *counts: Any) -> Floats:
        """By the likelihood of what was seen."""
        bad, total = counts
        found = _above_bound(bad, total, np.full(bad.shape, self.limit)) - math.log(self.groups)
        return np.where(total >= self.at_least, found, -math.inf)


@dataclass(frozen=True, slots=True)
class Lost:
    """Accuracy on labelled images that both versions answered. `common`: part of the champion's errors that the
    challenger makes too; models of one family err on the same images, and then a loss is seen sooner."""

    usual: float
    harm: float
    margin: float
    common: float = 0.5

    def draw(self, rng: np.random.Generator, looks: Looks, rollouts: int) -> Counts:
        """See `Stream.draw`."""
        both = min(self.common * (1.0 - self.usual), 1.0 - self.harm)
        losses, wins = 1.0 - self.harm - both, 1.0 - self.usual - both
        drawn = _multinomial(rng, looks.canary, np.array([losses, wins, 1.0 - losses - wins]), rollouts)
        return drawn[..., 0], drawn[..., 1], drawn.sum(axis=2)

    def evidence(self, *counts: Any) -> float:
        """See `Stream.evidence`."""
        losses, wins, pairs = map(int, counts)
        return anytime.lost(losses, wins, pairs, self.margin)

    def bound(self, *counts: Any) -> Floats:
        """A bet wins only where more than the margin is lost, and at most log(2) a lost image."""
        losses, wins, pairs = counts
        return np.where(losses - wins > self.margin * pairs, losses * math.log(2.0), 0.0)


@dataclass(frozen=True, slots=True)
class Slower:
    """The tail of latency in ms: log-normal, with the shape `sigma`, and the quantile `q` at `usual` or `harm` ms."""

    usual: float
    harm: float
    q: float
    factor: float
    floor: float
    sigma: float = 0.6
    _next: Ints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        reach = np.maximum(self.factor * _BOUNDS, self.floor)
        object.__setattr__(self, "_next", np.minimum(np.searchsorted(_BOUNDS, reach), _BOUNDS.size - 1))

    def draw(self, rng: np.random.Generator, looks: Looks, rollouts: int) -> Counts:
        """See `Stream.draw`. Cumulative histograms, their buckets along the last axis."""
        sides = ((looks.canary, self.harm), (looks.baseline, self.usual))
        ours, theirs = (_multinomial(rng, total, self._shares(tail), rollouts).cumsum(axis=2) for total, tail in sides)
        return ours, theirs

    def evidence(self, *counts: Any) -> float:
        """See `Stream.evidence`."""
        ours, theirs = (_histogram(side) for side in counts)
        return anytime.slower(ours, theirs, self.q, self.factor, self.floor)

    def bound(self, *counts: Any) -> Floats:
        """Bucket by bucket, by the likelihood of what was seen."""
        ours, theirs = counts
        total, other = ours[..., -1:], theirs[..., -1:]
        over = _above_bound(total - ours[..., self._next], total, np.full(ours.shape, 1.0 - self.q))
        faster = np.concatenate([np.zeros_like(other), theirs[..., :-1]], axis=-1)
        under = _above_bound(faster, other, np.full(ours.shape, self.q))
        result: Floats = (np.logaddexp(0.0, over) + np.logaddexp(0.0, under)).min(axis=-1) - 2.0 * math.log(2.0)
        return result

    def _shares(self, tail: float) -> Floats:
        """Share of each bucket. A log-normal quantile lies `sigma` times the normal's from the median."""
        middle = math.log(tail) - self.sigma * _NORMAL.inv_cdf(min(max(self.q, 1e-6), 1.0 - 1e-6))
        cumulative = [_NORMAL.cdf((math.log(bound) - middle) / self.sigma) for bound in _BOUNDS[:-1]]
        return np.diff(np.array([0.0, *cumulative, 1.0]))


def samples_to_harm(
    stream: Stream,
    baseline_at: Callable[[Ints], Ints],
    threshold: float,
    *,
    at_least: int,
    available: int,
    rollouts: int = ROLLOUTS,
    seed: int = 0,
) -> Floats:
    """Canary samples at which each of `rollouts` simulated rollouts sees the harm; infinite where it never does.

    `baseline_at` says how many samples the baseline has when the canary has so many; `threshold` is the natural
    logarithm of the evidence that is needed; no look comes before `at_least` samples, and one at exactly `available`.
    """
    rng = np.random.default_rng(seed)
    coarse = _grid(at_least, MOST_SAMPLES, _COARSE)
    pilot = _first_alarms(stream, _looks(coarse, baseline_at), threshold, rng, _PILOTS)
    middle = float(np.median(pilot))
    if math.isfinite(middle):
        coarse = coarse[coarse < middle * _AROUND]
        fine = _grid(max(at_least, int(middle / _AROUND)), int(middle * _AROUND) + 1, _FINE)
        coarse = np.concatenate([coarse[coarse < fine[0]], fine])
    samples = np.unique(np.append(coarse, available)) if available >= at_least else coarse
    return _first_alarms(stream, _looks(samples, baseline_at), threshold, rng, rollouts)


def seen_within(
    stream: Stream,
    baseline_at: Callable[[Ints], Ints],
    threshold: float,
    *,
    at_least: int,
    available: int,
    rollouts: int = ROLLOUTS,
    seed: int = 0,
) -> float:
    """Share of rollouts that see the harm by `available` canary samples. See `samples_to_harm`."""
    if available < at_least:
        return 0.0
    samples = np.unique(np.append(_grid(at_least, available, _COARSE), available))
    alarms = _first_alarms(stream, _looks(samples, baseline_at), threshold, np.random.default_rng(seed), rollouts)
    return float(np.isfinite(alarms).mean())


def _first_alarms(stream: Stream, looks: Looks, threshold: float, rng: np.random.Generator, rollouts: int) -> Floats:
    counts = stream.draw(rng, looks, rollouts)
    candidates = stream.bound(*counts) >= threshold
    alarms = np.full(rollouts, math.inf)
    for rollout in range(rollouts):
        for look in np.flatnonzero(candidates[rollout]):
            if stream.evidence(*(count[rollout, look] for count in counts)) >= threshold:
                alarms[rollout] = looks.canary[look]
                break
    return alarms


def _looks(samples: Ints, baseline_at: Callable[[Ints], Ints]) -> Looks:
    return Looks(samples, baseline_at(samples))


def _grid(low: int, high: int, ratio: float) -> Ints:
    """Whole numbers from `low` to `high`, each at most `ratio` times the one before."""
    steps = max(1, math.ceil(math.log(max(high, low + 1) / low) / math.log(ratio)))
    return np.unique(np.geomspace(low, max(high, low + 1), steps + 1).astype(np.int64))


def _binomial(rng: np.random.Generator, totals: Ints, share: float, rollouts: int) -> Ints:
    added = np.diff(totals, prepend=0)
    return rng.binomial(added, share, size=(rollouts, totals.size)).cumsum(axis=1)


def _multinomial(rng: np.random.Generator, totals: Ints, shares: Floats, rollouts: int) -> Ints:
    added = np.diff(totals, prepend=0)
    return rng.multinomial(added, shares / shares.sum(), size=(rollouts, totals.size)).cumsum(axis=1)


def _above_bound(bad: npt.NDArray[Any], total: npt.NDArray[Any], limit: npt.NDArray[Any]) -> Floats:
    """total * KL(share seen, limit): the largest log-likelihood ratio of a rate above `limit` to it; 0 below it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = bad / np.maximum(total, 1)
        hit = np.where(bad > 0, bad * np.log(share / limit), 0.0)
        missed = np.where(bad < total, (total - bad) * np.log((1.0 - share) / (1.0 - limit)), 0.0)
    return np.where(share > limit, hit + missed, 0.0)


def _histogram(cumulative: npt.NDArray[Any]) -> Mapping[float, int]:
    return dict(zip(_BOUNDS.tolist(), cumulative.tolist(), strict=True))
