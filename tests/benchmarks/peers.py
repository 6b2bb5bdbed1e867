"""What others decide with, on the same traffic: reimplemented from their documentation, for comparison only.

The counts given are errors by interval of `CHECK` requests: one row a rollout, one column an interval. Each rule
answers how many requests of the canary it took to abort, `NEVER` where it did not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from tests.benchmarks.streams import NEVER, Counts, Floats, Traffic

CHECK = 100
FIVE_PERCENT = 1.96
_LENGTHS = (*range(20, 1000, 20), *range(1000, 4001, 250))
_STEP, _MOST = 0.25, 60
_KAYENTA_CONFIDENCE, _KAYENTA_TOLERANCE, _KAYENTA_POINTS = 0.98, 0.25, 50


def argo(canary: Counts, limit: float = 0.01) -> Counts:
    """Argo Rollouts: a measurement over the limit fails, and the first failed one aborts (failureLimit 0, the default).

    https://argo-rollouts.readthedocs.io/en/stable/features/analysis/
    """
    return _first(canary > limit * CHECK)


def flagger(canary: Counts, threshold: int = 10, steps: int = 10, limit: float = 0.01) -> Counts:
    """Flagger: rolls back at the `threshold`-th failed check, promotes after `steps` passed ones.

    As its documentation's example: success rate at least 99 %, threshold 10, stepWeight 5 up to maxWeight 50. Where no
    threshold is given it is 1. https://docs.flagger.app/usage/how-it-works
    """
    failed = canary > limit * CHECK
    broken, passed = np.cumsum(failed, axis=1), np.cumsum(~failed, axis=1)
    return _first((broken >= threshold) & (passed < steps))


def kayenta(canary: Counts, baseline: Counts, every: int = _KAYENTA_POINTS) -> Counts:
    """Kayenta's Mann-Whitney judge on one point an interval, a growing window judged every `every` points.

    98 % confidence; the interval of the shift must lie above a quarter of its Hodges-Lehmann estimate; an increase is
    bad; at least 50 points. https://spinnaker.io/docs/guides/user/canary/judge/ and .../best-practices/
    """
    high = np.zeros(canary.shape, dtype=bool)
    for points in range(_KAYENTA_POINTS, canary.shape[1] + 1, every):
        high[:, points - 1] = _increased(canary[:, :points], baseline[:, :points])
    return _first(high)


def _increased(canary: Counts, baseline: Counts) -> Counts:
    """Counts are whole numbers, so that all shifts at which the rank sum changes are whole numbers too."""
    points, size = canary.shape[1], int(max(canary.max(), baseline.max())) + 1
    ours, theirs = (np.stack([(side == k).sum(axis=1) for k in range(size)], axis=1) for side in (canary, baseline))
    shifts = range(1 - size, size)
    pairs = np.stack([_pairs_apart(ours, theirs, shift) for shift in shifts], axis=1)
    # Of x_i - mu > y_j just above each shift; there only values of the same side are tied.
    above = np.cumsum(pairs[:, ::-1], axis=1)[:, ::-1] - pairs
    ties = sum((side**3 - side).sum(axis=1) for side in (ours, theirs))
    both = 2 * points
    sigma = np.sqrt(points**2 / 12 * (both + 1 - ties / (both * (both - 1))))
    middle = above - points**2 / 2
    score = (middle - 0.5 * np.sign(middle)) / np.maximum(sigma, 1e-12)[:, None]
    lower, estimate = (
        np.argmax(score <= z, axis=1) + 1 - size for z in (stats.norm.ppf(0.5 + _KAYENTA_CONFIDENCE / 2), 0.0)
    )
    return np.asarray(lower > _KAYENTA_TOLERANCE * np.abs(estimate))


def _pairs_apart(ours: Counts, theirs: Counts, shift: int) -> Counts:
    """How many pairs differ by `shift`, from how often each value occurs."""
    if shift >= 0:
        return np.asarray((ours[:, shift:] * theirs[:, : ours.shape[1] - shift]).sum(axis=1))
    return _pairs_apart(theirs, ours, -shift)


def kayenta_agrees(rollouts: int, rng: np.random.Generator) -> bool:
    """Whether `_increased` decides as the rule written down: ranks with ties, and roots of the standardised sum."""
    rates = rng.choice((0.005, 0.02, 0.05), (rollouts, 2, 1))
    sides = rng.binomial(CHECK, rates, (rollouts, 2, _KAYENTA_POINTS + 10))
    return all(
        bool(_increased(ours[None], theirs[None])[0]) == _increased_by_roots(ours, theirs) for ours, theirs in sides
    )


def _increased_by_roots(ours: Counts, theirs: Counts) -> bool:
    def score(shift: float, quantile: float) -> float:
        ranks = stats.rankdata(np.concatenate([ours - shift, theirs]))
        ties = np.unique(ranks, return_counts=True)[1]
        n, both = ours.size, 2 * ours.size
        middle = ranks[:n].sum() - n * (n + 1) / 2 - n * n / 2
        variance = n * n / 12 * (both + 1 - (ties**3 - ties).sum() / (both * (both - 1)))
        return float((middle - 0.5 * np.sign(middle)) / math.sqrt(variance) - quantile)

    # Shifts between whole numbers at the ends, where no value of one side equals one of the other.
    ends = ours.min() - theirs.max() - 0.37, ours.max() - theirs.min() + 0.37
    z = float(stats.norm.ppf(0.5 + _KAYENTA_CONFIDENCE / 2))
    lower, estimate = (optimize.brentq(score, *ends, args=(quantile,), xtol=1e-9) for quantile in (z, 0.0))
    return bool(lower > _KAYENTA_TOLERANCE * abs(estimate) + 1e-6)


def z_scores(canary: Counts, baseline: Counts, ratio: int, every: int) -> Floats:
    """The pooled two-proportion test over all requests so far, at every `every`-th interval."""
    ours, theirs = (np.cumsum(side, axis=1)[:, every - 1 :: every] for side in (canary, baseline))
    n = CHECK * every * np.arange(1, ours.shape[1] + 1)
    m = n * ratio
    pooled = (ours + theirs) / (n + m)
    deviation = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))
    return np.asarray((ours / n - theirs / m) / np.maximum(deviation, 1e-12))


def repeated_test(scores: Floats, critical: float, every: int, *, two_sided: bool = False) -> Counts:
    """Abort at the first look whose score is significant."""
    return _first((np.abs(scores) if two_sided else scores) >= critical, CHECK * every)


def spacing_for(canary: Counts, baseline: Counts, ratio: int, median: float) -> int:
    """The widest spacing of looks, in intervals, with which the 5 % test needs at most `median` requests here."""

    def needed(every: int) -> float:
        stops = repeated_test(z_scores(canary, baseline, ratio, every), FIVE_PERCENT, every, two_sided=True)
        return float(np.quantile(stops, 0.5, method="inverted_cdf"))

    return max((every for every in range(1, int(median // CHECK) + 1) if needed(every) <= median), default=1)


def critical_for(scores: Floats, median: float, every: int) -> float:
    """The strictest level with which a repeated test of these harmful streams needs at most `median` requests."""
    looks = max(1, int(median // (CHECK * every)))
    highest = scores[:, :looks].max(axis=1)
    return float(np.quantile(highest, 0.5, method="lower"))


@dataclass(frozen=True, slots=True)
class Threshold:
    """Abort when an interval of `length` requests has at least `errors` errors.

    `difference`: more than expected from the baseline's in the same interval.
    """

    length: int
    errors: float
    difference: bool

    def __str__(self) -> str:
        what = "errors beyond the baseline's share" if self.difference else "errors"
        return f"{self.errors:g} {what} in {self.length}"

    def chance(self, traffic: Traffic) -> float:
        """Probability that one interval aborts."""
        if not self.difference:
            return float(stats.binom.sf(self.errors - 1, self.length, traffic.ours))
        answers = traffic.ratio * self.length
        theirs = np.arange(stats.binom.ppf(1 - 1e-12, answers, traffic.theirs) + 1)
        needed = np.ceil(self.errors + theirs / traffic.ratio - 1e-9)
        weights = stats.binom.pmf(theirs, answers, traffic.theirs)
        return float(weights @ stats.binom.sf(needed - 1, self.length, traffic.ours))

    def aborts(self, traffic: Traffic) -> float:
        """Probability of an abort within all requests."""
        return float(-np.expm1(traffic.requests // self.length * np.log1p(-self.chance(traffic))))

    def median(self, traffic: Traffic) -> float:
        """Requests until half of all rollouts are aborted, if they ran for ever."""
        chance = self.chance(traffic)
        return self.length * math.ceil(math.log(0.5) / math.log1p(-min(chance, 1 - 1e-12))) if chance else math.inf

    def after(self, traffic: Traffic, rollouts: int, rng: np.random.Generator) -> Counts:
        """Simulated, as the others."""
        intervals = traffic.requests // self.length
        ours = rng.binomial(self.length, traffic.ours, (rollouts, intervals)).astype(np.float64)
        if self.difference:
            theirs = rng.binomial(self.length * traffic.ratio, traffic.theirs, (rollouts, intervals))
            ours -= theirs / traffic.ratio
        return _first(ours >= self.errors - 1e-9, self.length)


def best_threshold(healthy: Traffic, harmful: Traffic, allowed: float, *, difference: bool) -> Threshold:
    """The quickest threshold rule that aborts at most `allowed` of the healthy rollouts. It knows both error rates."""
    rules = (_strictest(length, healthy, allowed, difference) for length in _LENGTHS)
    return min(rules, key=lambda rule: (rule.median(harmful), rule.aborts(healthy)))


def _strictest(length: int, healthy: Traffic, allowed: float, difference: bool) -> Threshold:
    """The lowest threshold that is allowed: fewer errors abort more often."""
    step = _STEP if difference else 1.0
    low, high = 1, int(_MOST / step)
    while low < high:
        middle = (low + high) // 2
        kept = Threshold(length, middle * step, difference).aborts(healthy) <= allowed
        low, high = (low, middle) if kept else (middle + 1, high)
    return Threshold(length, low * step, difference)


def _first(hits: Counts | npt.NDArray[np.bool_], length: int = CHECK) -> Counts:
    found = np.asarray(hits, dtype=bool)
    return np.where(found.any(axis=1), (np.argmax(found, axis=1) + 1) * length, NEVER)
