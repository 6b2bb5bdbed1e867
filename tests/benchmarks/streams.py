"""Exact stopping times of the judge's gates over whole simulated streams, looked at after every single request.

Looking one by one at the 400,000 requests of each of 10,000 rollouts would take weeks. The evidence of `anytime.worse`
rises only with a bad answer of the canary or a good one of the baseline. So in a stretch of the stream between two bad
answers of the canary no look is above the stretch's *corner*: the counts at its beginning, and the baseline's good
answers at its end. Stretches with a corner below the threshold are skipped, others are halved until one look is left.
Each decision is the product's own function; nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.rollout.anytime import Rate, lost, worse

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
NEVER = int(np.iinfo(np.int64).max)
_CHUNK = 250


@dataclass(frozen=True, slots=True)
class Traffic:
    """Error rates, requests to the champion for each one to the canary, and the canary's requests in all."""

    ours: float
    theirs: float
    ratio: int
    requests: int


@dataclass(frozen=True, slots=True)
class Labels:
    """How often only the champion, only the challenger is right on a labelled image, and how many there are."""

    losses: float
    wins: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Rule:
    """Stop when the evidence for harm beyond the margin reaches the threshold."""

    margin: float
    log_threshold: float


@dataclass(frozen=True, slots=True)
class _Stretches:
    """From each bad answer of the canary up to the next: one row a rollout, one column a stretch.

    The canary's answer number `first` was its bad one number `bad`, its answer number `after` is the next. The baseline
    had `theirs` bad ones until then; `places` says which of its answers in the stretch are bad, counted from 0.
    """

    bad: Counts
    first: Counts
    after: Counts
    theirs: Counts
    places: Callable[[int, int], Counts]


def worse_after(traffic: Traffic, rule: Rule, rollouts: int, rng: np.random.Generator) -> Counts:
    """By rollout: requests of the canary until `anytime.worse` reaches the threshold, `NEVER` where it does not."""
    chunks = [min(_CHUNK, rollouts - start) for start in range(0, rollouts, _CHUNK)]
    return np.concatenate([_stops(_random_stretches(traffic, size, rng), traffic, rule) for size in chunks])


def _random_stretches(traffic: Traffic, rollouts: int, rng: np.random.Generator) -> _Stretches:
    mean = traffic.requests * traffic.ours
    columns = int(mean + 8 * math.sqrt(mean) + 20)
    errors = np.cumsum(rng.geometric(traffic.ours, (rollouts, columns)), axis=1)
    errors = np.minimum(errors, traffic.requests + 1)
    first, after = errors[:, :-1], errors[:, 1:]
    # In each round the canary answers first, then the baseline `ratio` times.
    before = rng.binomial(traffic.ratio * (first[:, :1] - 1), traffic.theirs)
    fresh = rng.binomial(traffic.ratio * (after - first), traffic.theirs)

    def places(row: int, column: int) -> Counts:
        """Given how many of the baseline's answers are bad, their places are uniform."""
        answers = traffic.ratio * int(after[row, column] - first[row, column])
        return np.sort(rng.choice(answers, int(fresh[row, column]), replace=False))

    return _Stretches(
        np.broadcast_to(np.arange(1, columns), first.shape),
        first,
        after,
        before + np.cumsum(fresh, axis=1) - fresh,
        places,
    )


def _stops(stretches: _Stretches, traffic: Traffic, rule: Rule) -> Counts:
    stops = np.full(stretches.first.shape[0], NEVER)
    likely = (_bound(stretches, traffic, rule.margin) >= rule.log_threshold) & (stretches.first <= traffic.requests)
    for row, column in zip(*(indices.tolist() for indices in np.nonzero(likely)), strict=True):
        if stops[row] == NEVER:
            stops[row] = _first_stop(stretches, row, column, traffic.ratio, rule)
    return stops


def _bound(stretches: _Stretches, traffic: Traffic, margin: float) -> Floats:
    """No mixture of likelihood ratios is above the largest one, whatever the baseline's rate; here: the pooled one."""
    ours, n = stretches.bad, stretches.first
    theirs, m = stretches.theirs, np.maximum(traffic.ratio * (stretches.after - 1), 1)
    rate = np.clip((ours + theirs - margin * n) / (n + m), 0.0, 1.0)
    limit, share, other = np.clip(rate + margin, 1e-12, 1.0), ours / n, theirs / m
    against_canary = np.where(share > limit, n * _divergence(share, limit), 0.0)
    return np.asarray(against_canary + np.where(other < rate, m * _divergence(other, rate), 0.0))


def _divergence(share: Floats, limit: Floats) -> Floats:
    """Of Kullback and Leibler, between two coins."""
    p, q = (np.clip(rate, 1e-300, 1 - 1e-16) for rate in (share, limit))
    return np.asarray(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def _first_stop(stretches: _Stretches, row: int, column: int, ratio: int, rule: Rule) -> int:
    parts = (stretches.bad, stretches.first, stretches.after, stretches.theirs)
    bad, first, after, theirs = (int(part[row, column]) for part in parts)

    def enough(canary: int, baseline_bad: int, baseline: int) -> bool:
        return worse(Rate(bad, canary), Rate(baseline_bad, baseline), rule.margin) >= rule.log_threshold

    if not enough(first, theirs, ratio * (after - 1)):
        return NEVER
    looks = _peaks(first, after, theirs, stretches.places(row, column), ratio)
    return _first_look(looks, enough)


def _peaks(first: int, after: int, theirs: int, places: Counts, ratio: int) -> Counts:
    """The looks of a stretch after which the evidence falls: (canary's answers, baseline's bad ones, baseline's all).

    They come before a bad answer of the baseline, or before the canary's next one.
    """
    rounds = np.arange(first, after)
    served = ratio * (rounds - first + 1)
    at_end = (rounds, theirs + np.searchsorted(places, served), ratio * (first - 1) + served)
    before_bad = (first + places // ratio, theirs + np.arange(places.size), ratio * (first - 1) + places)
    looks = np.concatenate([np.stack(at_end, axis=1), np.stack(before_bad, axis=1)])
    return np.asarray(looks[np.lexsort((looks[:, 2], looks[:, 0]))])


def _first_look(looks: Counts, enough: Callable[[int, int, int], bool]) -> int:
    """Canary's answers at the first look that is enough."""
    if not enough(int(looks[0, 0]), int(looks[0, 1]), int(looks[-1, 2])):
        return NEVER
    if len(looks) == 1:
        return int(looks[0, 0])
    found = _first_look(looks[: len(looks) // 2], enough)
    return found if found != NEVER else _first_look(looks[len(looks) // 2 :], enough)


def shortcut_agrees(rollouts: int, rng: np.random.Generator) -> bool:
    """Whether skipping stretches stops where a look after every single request does, on the same streams."""
    traffic, rule = Traffic(0.05, 0.02, 3, 300), Rule(0.001, math.log(8.0))
    for _ in range(rollouts):
        ours, theirs = (rng.random((traffic.requests, n)) < p for n, p in ((1, traffic.ours), (3, traffic.theirs)))
        stretches = _stretches_of(np.flatnonzero(ours) + 1, np.flatnonzero(theirs), traffic)
        if int(_stops(stretches, traffic, rule)[0]) != _one_by_one(ours[:, 0], theirs, rule):
            return False
    return True


def _stretches_of(errors: Counts, baseline_errors: Counts, traffic: Traffic) -> _Stretches:
    ends = np.append(errors, traffic.requests + 1)
    starts = traffic.ratio * (ends - 1)

    def places(_: int, column: int) -> Counts:
        begin, end = starts[column : column + 2]
        return np.asarray(baseline_errors[(baseline_errors >= begin) & (baseline_errors < end)] - begin)

    theirs = np.searchsorted(baseline_errors, starts[:-1])
    return _Stretches(np.arange(1, ends.size)[None], ends[None, :-1], ends[None, 1:], theirs[None], places)


def _one_by_one(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_], rule: Rule) -> int:
    bad = other = served = 0
    for n, (failed, answers) in enumerate(zip(ours.tolist(), theirs.tolist(), strict=True), 1):
        bad += failed
        for is_bad in (None, *answers):
            other, served = other + bool(is_bad), served + (is_bad is not None)
            if worse(Rate(bad, n), Rate(other, served), rule.margin) >= rule.log_threshold:
                return n
    return NEVER


def lost_after(labels: Labels, rule: Rule, rollouts: int, rng: np.random.Generator) -> Counts:
    """By rollout: labelled images until `anytime.lost` reaches the threshold, `NEVER` where it does not.

    Only a lost image raises the evidence. A bet never earns more than its stake times the sum of the differences, and
    a stake is at most 1 / (1 + margin): looks below that bound are skipped.
    """
    chunks = [min(_CHUNK, rollouts - start) for start in range(0, rollouts, _CHUNK)]
    return np.concatenate([_lost_stops(labels, rule, size, rng) for size in chunks])


def _lost_stops(labels: Labels, rule: Rule, rollouts: int, rng: np.random.Generator) -> Counts:
    draws = rng.random((rollouts, labels.pairs))
    loss = draws < labels.losses
    losses = np.cumsum(loss, axis=1)
    wins = np.cumsum(~loss & (draws < labels.losses + labels.wins), axis=1)
    pairs = np.arange(1, labels.pairs + 1)
    bound = (losses - wins - rule.margin * pairs) / (1.0 + rule.margin)
    stops = np.full(rollouts, NEVER)
    for row, column in zip(
        *(found.tolist() for found in np.nonzero(loss & (bound >= rule.log_threshold))), strict=True
    ):
        if stops[row] == NEVER:
            counts = int(losses[row, column]), int(wins[row, column]), column + 1
            stops[row] = column + 1 if lost(*counts, rule.margin) >= rule.log_threshold else NEVER
    return stops
