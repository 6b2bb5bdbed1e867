"""Evidence that may be looked at after every request: e-processes and confidence sequences for counts. Pure numerics.

An *e-process* of a null hypothesis H0 is a number that starts at 1 and whose expectation is at most 1 at every moment
at which somebody might stop, as long as H0 is true. So it reaches 1/alpha with probability at most alpha over the
whole, unbounded stream (Ville, 1939): no correction for looks is needed, and none is lost by looking rarely
(Ramdas, Gruenwald, Vovk and Shafer, "Game-theoretic statistics and safe anytime-valid inference", Statistical Science
2023). Here each is a mixture of likelihood ratios (Robbins, 1970), or of bets, over a fixed grid of alternatives, and
therefore a function of the counts alone: how the stream was cut into looks cannot matter, and memory is constant.

All functions return the natural logarithm of the evidence. It is finite, except that -inf says "none at all". Counts
are integers with `0 <= bad <= total`; rates, margins and limits are shares in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Alternatives, as factors on the odds of the limit, and prior weights: dense where rollouts are decided (half again
# to ten times as many errors), with tails for disasters and for small differences in long streams. The factor 1 is
# a stake that is not bet: it bounds the loss where one side carries no evidence.
_RISES: Final = ((1.12, 0.6), (1.3, 0.9), (1.8, 1.4), (2.7, 1.5), (5.0, 1.2), (12.0, 0.7), (60.0, 0.5))
_FALLS: Final = ((1.0, 5.0), (0.93, 1.0), (0.8, 1.2), (0.6, 1.2), (0.35, 1.0))
# Bets on paired differences, as shares of the largest that cannot lose everything.
_STAKES: Final = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# Possible rates of the baseline: from one in 100,000 on, 4.6 % apart.
_RATES: Final[Floats] = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, 257)])
_BISECTIONS: Final = 40


@dataclass(frozen=True, slots=True)
class Rate:
    """`bad` of `total`."""

    bad: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.bad <= self.total:
            raise ValueError(f"{self.bad} of {self.total} is no rate")

    @property
    def share(self) -> float:
        """The observed share, 0 without a sample."""
        return self.bad / self.total if self.total else 0.0

    @property
    def complement(self) -> Rate:
        """The others."""
        return Rate(self.total - self.bad, self.total)


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Odds factors and the logarithms of their weights, as columns."""

    factors: Floats
    log_factors: Floats
    log_weights: Floats

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> _Mixture:
        factors, weights = np.array(pairs, dtype=np.float64).T
        return cls(factors[:, None], np.log(factors)[:, None], np.log(weights / weights.sum())[:, None])

    def log_normalizers(self, limits: Floats) -> Floats:
        """log(1 - q + q f): what a sample costs a bet that the odds are `f` times those of the limit `q`."""
        with np.errstate(divide="ignore"):
            return np.log1p(limits[None, :] * (self.factors - 1.0))

    def log_evidence(self, bad: int | Floats, total: int | Floats, normalizers: Floats) -> Floats:
        """Evidence of each count against each limit that `normalizers` was made of; one of both may be many."""
        terms = self.log_factors * bad + self.log_weights
        terms = terms - total * normalizers
        top = terms.max(axis=0)
        result: Floats = np.log(np.exp(terms - top).sum(axis=0)) + top
        return result


_RISE: Final = _Mixture.of(_RISES)
_FALL: Final = _Mixture.of(_FALLS)


@lru_cache(maxsize=256)
def _normalizers(limit: float) -> Floats:
    return _RISE.log_normalizers(np.array([limit]))


def above(rate: Rate, limit: float) -> float:
    """Evidence against H0: the rate is at most `limit`.

    A mixture of binomial likelihood ratios; a test martingale at the limit itself, smaller below it.
    """
    if rate.total == 0:
        return 0.0
    return float(_above(rate.bad, rate.total, limit)[0])


def _above(bad: int | Floats, total: int | Floats, limit: float) -> Floats:
    # At the ends of the scale a bet would be all or nothing; a hair inside them it is merely extreme.
    return _RISE.log_evidence(bad, total, _normalizers(min(max(limit, 1e-12), 1.0)))


def below(rate: Rate, limit: float) -> float:
    """Evidence against H0: the rate is at least `limit`. The mirror image of `above`."""
    return above(rate.complement, 1.0 - limit)


def worse(canary: Rate, baseline: Rate, margin: float) -> float:
    """Evidence against H0: the canary's rate is at most the baseline's plus `margin` (non-inferiority).

    For a baseline rate t the product of the evidence against "canary <= t + margin" and against "baseline >= t" is an
    e-process; H0 leaves t open, so the smallest product over all t counts (universal inference: Wasserman, Ramdas and
    Balakrishnan, PNAS 2020; for two proportions see Turner and Gruenwald, 2023). The first factor falls and the second
    rises with t, so between two neighbours of a grid the product is at least first(right) * second(left): the
    minimum of that over a fixed grid never overstates the evidence.
    """
    if canary.total == 0 or baseline.total == 0 or canary.share <= baseline.share + margin:
        return -math.inf
    rises, falls = _two_rate_tables(margin)
    against_canary = _RISE.log_evidence(canary.bad, canary.total, rises)
    return float((against_canary + _FALL.log_evidence(baseline.bad, baseline.total, falls)).min())


@lru_cache(maxsize=64)
def _two_rate_tables(margin: float) -> tuple[Floats, Floats]:
    limits = np.clip(_RATES[1:] + margin, 1e-12, 1.0)
    left = np.minimum(_RATES[:-1], 1.0 - 1e-12)
    return _RISE.log_normalizers(limits), _FALL.log_normalizers(left)


def lost(losses: int, wins: int, pairs: int, margin: float) -> float:
    """Evidence against H0: the challenger loses at most `margin` of accuracy, from answers to the same images.

    `losses`: only the champion was right; `wins`: only the challenger; `pairs`: all images both answered. The
    difference of a pair is 1, -1 or 0, with a mean of at most `margin` under H0; a bet of stake s on it multiplies the
    capital by 1 + s (difference - margin) (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting", JRSS B 2024). Stakes are mixed.
    """
    ties = pairs - losses - wins
    if min(losses, wins, ties) < 0:
        raise ValueError(f"{losses} lost and {wins} won do not fit into {pairs} pairs")
    logs = []
    for stake in (share / (1.0 + margin) for share in _STAKES):
        won, even = math.log1p(-stake * (1.0 + margin)), math.log1p(-stake * margin)
        logs.append(losses * math.log1p(stake * (1.0 - margin)) + wins * won + ties * even)
    return mean(logs, len(logs))


def slower(
    canary: Mapping[float, int], baseline: Mapping[float, int], quantile: float, factor: float, floor: float = 0.0
) -> float:
    """Evidence against H0: the canary's `quantile` of latency is at most `factor` times the baseline's, or `floor` ms.

    Both arguments are cumulative histograms with the same upper bounds (ms), the last one infinite. A quantile is an
    exceedance: above it lie at most 1 - quantile of the answers (Howard and Ramdas, "Sequential estimation of
    quantiles", Bernoulli 2022). As in `worse`, the baseline's unknown quantile is minimised over, bucket by bucket.
    """
    bounds, theirs, ours = _columns(baseline, canary)
    if not bounds.size or not ours[-1] or not theirs[-1]:
        return -math.inf
    share = 1.0 - quantile
    next_bound = np.minimum(np.searchsorted(bounds, np.maximum(factor * bounds, floor)), bounds.size - 1)
    over = _above(ours[-1] - ours[next_bound], ours[-1], share)
    # The baseline's quantile lies above a bucket's lower bound: at most this many of its answers were faster.
    faster = np.concatenate([[0.0], theirs[:-1]])
    under = _above(faster, theirs[-1], quantile)
    return float((_half_kept(over) + _half_kept(under)).min())


def total_of(histogram: Mapping[float, int]) -> int:
    """How many values a cumulative histogram holds."""
    return max(histogram.values(), default=0)


def _columns(first: Mapping[float, int], second: Mapping[float, int]) -> tuple[Floats, Floats, Floats]:
    """Bounds in order, and both cumulative counts; a histogram that lacks a bound lacks all."""
    bounds = sorted(first)
    if not second:
        return np.empty(0), np.empty(0), np.empty(0)
    counts = [np.array([float(histogram[bound]) for bound in bounds]) for histogram in (first, second)]
    return np.array(bounds), counts[0], counts[1]


def _half_kept(logs: Floats) -> Floats:
    """Half of the capital is never bet: where a side says nothing, half of the evidence is lost and no more."""
    result: Floats = np.logaddexp(0.0, logs) - math.log(2.0)
    return result


def shifted(canary: Mapping[str, int], baseline: Mapping[str, int], classes: int, margin: float) -> float:
    """Evidence against H0: no class's share among the canary's answers differs from the baseline's by over `margin`.

    The mean over `classes` classes and both directions: a mean of e-processes is one (Vovk and Wang, "E-values:
    calibration, combination and applications", Annals of Statistics 2021).
    """
    total_c, total_b = sum(canary.values()), sum(baseline.values())
    if not total_c or not total_b:
        return -math.inf
    names, logs = canary.keys() | baseline.keys(), list[float]()
    for name in names:
        ours, theirs = canary.get(name, 0), baseline.get(name, 0)
        # Without a visible difference `worse` says nothing; most classes are spared it.
        if abs(ours / total_c - theirs / total_b) > margin:
            one, other = Rate(ours, total_c), Rate(theirs, total_b)
            logs += [worse(one, other, margin), worse(other, one, margin)]
    return mean(logs, 2 * max(classes, len(names)))


def each_above(rates: Sequence[Rate], limit: float) -> list[float]:
    """`above` of each rate, all at once."""
    if not rates:
        return []
    bad, total = (np.array(counts, dtype=np.float64) for counts in zip(*((r.bad, r.total) for r in rates), strict=True))
    logs: list[float] = _above(bad, total, limit).tolist()
    return logs


def mean(logs: Sequence[float], count: int) -> float:
    """log of the mean of `count` numbers whose logarithms are given; missing ones count as zero."""
    top = max(logs, default=-math.inf)
    if top == -math.inf or count == 0:
        return -math.inf
    return top + math.log(math.fsum(math.exp(log - top) for log in logs)) - math.log(count)


def rate_interval(rate: Rate, alpha: float) -> tuple[float, float]:
    """A confidence sequence: with probability 1 - alpha the true rate lies inside at every look at once.

    The limits that neither `above` nor `below` rejects at alpha / 2.
    """
    threshold = math.log(2.0 / alpha)
    low = _first(lambda limit: above(rate, limit) < threshold)
    high = 1.0 - _first(lambda limit: above(rate.complement, limit) < threshold)
    return low, high


def difference_interval(canary: Rate, baseline: Rate, alpha: float) -> tuple[float, float]:
    """A confidence sequence for the canary's rate minus the baseline's: the margins that `worse` rejects in neither
    direction at alpha / 2. Exchanging the two exchanges and negates the ends."""
    threshold = math.log(2.0 / alpha)

    def low(one: Rate, other: Rate) -> float:
        return 2.0 * _first(lambda half: worse(one, other, 2.0 * half - 1.0) < threshold) - 1.0

    return low(canary, baseline), -low(baseline, canary)


def quantile_interval(histogram: Mapping[float, int], quantile: float, alpha: float) -> tuple[float, float]:
    """A confidence sequence for a quantile of latency in ms, as wide as the buckets at least (inf: no upper end)."""
    total, share, threshold = total_of(histogram), 1.0 - quantile, math.log(2.0 / alpha)
    if total == 0:
        return 0.0, math.inf
    rates = {bound: Rate(total - count, total) for bound, count in sorted(histogram.items())}
    low = max((bound for bound, rate in rates.items() if above(rate, share) >= threshold), default=0.0)
    high = min((bound for bound, rate in rates.items() if below(rate, share) >= threshold), default=math.inf)
    return low, high


def _first(accepted: Callable[[float], bool]) -> float:
    """The smallest share in [0, 1] that is accepted, where larger ones are too; never above the true one."""
    low, high = 0.0, 1.0
    if accepted(low):
        return low
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if accepted(middle) else (middle, high)
    return low
