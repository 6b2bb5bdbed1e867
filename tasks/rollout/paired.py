"""Two models on the same images: what one got right and the other did not. Pure; a seed makes the interval repeatable.

Only images on which the two differ say which is better: both are compared on the very same photos, so their common
difficulty cancels out, and a smaller loss is seen than between two separate samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.errors import IntegrityError
from ml.predictions import Predictions

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Answers of challenger and champion to the same images, in one order; arrays of length N.

    `caught`: not taken for healthy. `diseased`: all False where no class means healthy, since then nothing can be
    missed. `group` numbers the groups of near-duplicates.
    """

    challenger_right: Bools
    champion_right: Bools
    challenger_caught: Bools
    champion_caught: Bools
    diseased: Bools
    group: Ints


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the challenger did to the champion's right answers on `images` images.

    `lost`: images that only the champion got right, `won`: that only the challenger did. `low` and `high`: 95 %
    interval of the difference of their shares, challenger minus champion. `p_worse`: chance that two equally good
    models differ this much or more against the challenger; `p_differs`: in either direction.
    """

    images: int
    challenger_right: int
    lost: int
    won: int
    low: float
    high: float
    p_worse: float
    p_differs: float

    @property
    def difference(self) -> float:
        """Share of right answers, challenger minus champion."""
        return (self.won - self.lost) / self.images

    @property
    def challenger_share(self) -> float:
        """The challenger's share of right answers."""
        return self.challenger_right / self.images

    @property
    def champion_share(self) -> float:
        """The champion's share of right answers."""
        return (self.challenger_right + self.lost - self.won) / self.images


def pair(challenger: Predictions, champion: Predictions, healthy: Collection[str]) -> Pairs:
    """Put both models' answers into one order, by image. `healthy`: classes that mean no disease.

    Raises:
        IntegrityError: they did not answer the same images, or an image's label differs.
    """
    ours, theirs = np.argsort(challenger.image), np.argsort(champion.image)
    if not np.array_equal(challenger.image[ours], champion.image[theirs]):
        both = len(set(challenger.image) & set(champion.image))
        raise IntegrityError(
            f"Challenger and champion were scored on {len(ours)} and {len(theirs)} images, {both} of them the same: "
            "their predictions are not of one holdout. Nothing was decided. Next: evaluate both again."
        )
    label = challenger.label[ours]
    if not np.array_equal(label, champion.label[theirs]):
        raise IntegrityError(
            "Challenger and champion were scored with different labels on the same images. Nothing was decided. "
            "Next: evaluate both again."
        )
    answers = challenger.predicted[ours], champion.predicted[theirs]
    well = list(healthy)
    return Pairs(
        challenger_right=np.equal(answers[0], label).astype(bool),
        champion_right=np.equal(answers[1], label).astype(bool),
        challenger_caught=~np.isin(answers[0], well),
        champion_caught=~np.isin(answers[1], well),
        diseased=~np.isin(label, well) & bool(well),
        group=np.unique(challenger.group[ours], return_inverse=True)[1].astype(np.int64),
    )


def compare(challenger: Bools, champion: Bools, group: Ints, *, seed: int = 0) -> Comparison:
    """Compare right answers on the same images; at least one image.

    Near-duplicates err together, so a group counts once wherever chance is reckoned: it votes with its net of won and
    lost images, and is drawn as a whole. With every image its own group the p-values are McNemar's.
    """
    change = challenger.astype(np.int64) - champion.astype(np.int64)
    size = np.bincount(group)
    net = np.bincount(group, weights=change).astype(np.int64)[size > 0]
    p_worse, p_differs = mcnemar(int((net < 0).sum()), int((net > 0).sum()))
    low, high = bootstrap_interval(net, size[size > 0], seed=seed)
    return Comparison(
        images=len(change),
        challenger_right=int(challenger.sum()),
        lost=int((change < 0).sum()),
        won=int((change > 0).sum()),
        low=low,
        high=high,
        p_worse=p_worse,
        p_differs=p_differs,
    )


def mcnemar(lost: int, won: int) -> tuple[float, float]:
    """Exact McNemar test: (one-sided p that the loss is chance, two-sided p).

    Of two equally good models each wins half of the images on which they differ: `lost` is Binomial(lost + won, 1/2)
    (McNemar, Psychometrika 1947; exact by the binomial distribution instead of its chi-square approximation).
    """
    differing = lost + won
    return _upper_half_tail(lost, differing), min(1.0, 2 * _upper_half_tail(max(lost, won), differing))


def _upper_half_tail(successes: int, trials: int) -> float:
    """P(X >= successes) for X ~ Binomial(trials, 1/2), summed in log space."""
    if successes <= 0:
        return 1.0
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, trials + 1)))))
    k = np.arange(successes, trials + 1)
    terms = log_factorial[trials] - log_factorial[k] - log_factorial[trials - k] - trials * math.log(2)
    return min(1.0, float(np.exp(terms).sum()))


def bootstrap_interval(
    net: Ints, size: Ints, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(net) / sum(size), drawing whole groups.

    `net[i]`: won minus lost images of group i, `size[i]`: its images. Groups with the same numbers are alike, so a
    resample is one draw from a multinomial over the kinds of groups: the same distribution at a fraction of the work
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; whole groups: Davison and Hinkley 1997,
    section 3.8). Half an image is added to each cell of the paired table, two in all (Agresti and Min, Statistics in
    Medicine 2005): a small holdout on which nothing changed does not claim that nothing can.
    """
    kinds, counts = np.unique(np.stack([net, size], axis=1), axis=0, return_counts=True)
    kinds = np.concatenate([kinds, [[-1, 1], [1, 1], [0, 1]]])
    weights = np.concatenate([counts, [0.5, 0.5, 1.0]])
    drawn = np.random.default_rng(seed).multinomial(len(net), weights / weights.sum(), size=resamples)
    differences = (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
