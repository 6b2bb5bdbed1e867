"""Evidence for a look at any time: true e-processes, monotone in harm, symmetric, and finite whatever was counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.rollout import anytime
from tasks.rollout.anytime import (
    Rate,
    above,
    below,
    difference_interval,
    each_above,
    lost,
    mean,
    quantile_interval,
    rate_interval,
    shifted,
    slower,
    worse,
)

Floats = npt.NDArray[np.float64]

BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, math.inf)
HUGE = 10**12
ROUNDING = 1e-9
# In sums of 10^12 terms a double is exact to about 10^-3.
HUGE_ROUNDING = 0.02
SURE = 1e-4
MARGINS = (0.0, 0.001, 0.05, 0.3)

shares = st.floats(0.0, 1.0)
margins = st.floats(0.0, 0.5)
totals = st.integers(0, 5_000)


@st.composite
def rates(draw: st.DrawFn, largest: int = 5_000) -> Rate:
    total = draw(st.integers(0, largest))
    return Rate(draw(st.integers(0, total)), total)


@st.composite
def histograms(draw: st.DrawFn, largest: int = 3_000) -> dict[float, int]:
    counts = draw(st.lists(st.integers(0, largest), min_size=len(BOUNDS), max_size=len(BOUNDS)))
    return dict(zip(BOUNDS, np.cumsum(counts).tolist(), strict=True))


def cumulative(latencies: Floats) -> dict[float, int]:
    return {bound: int((latencies <= bound).sum()) for bound in BOUNDS}


def worsened(rate: Rate, more: int) -> Rate:
    return Rate(min(rate.bad + more, rate.total), rate.total)


# Monotone in harm ------------------------------------------------------------------------------------------------


@given(rate=rates(), more=totals, limit=shares)
def test_more_bad_answers_never_lower_the_evidence_of_a_rate_above_a_limit(rate: Rate, more: int, limit: float) -> None:
    harmed = worsened(rate, more)
    assert above(harmed, limit) >= above(rate, limit) - ROUNDING
    assert below(harmed, limit) <= below(rate, limit) + ROUNDING


@settings(deadline=None)
@given(canary=rates(), baseline=rates(), more=totals, margin=margins)
def test_more_bad_answers_of_the_canary_never_speak_for_it(
    canary: Rate, baseline: Rate, more: int, margin: float
) -> None:
    assert worse(worsened(canary, more), baseline, margin) >= worse(canary, baseline, margin) - ROUNDING


@settings(deadline=None)
@given(canary=rates(), baseline=rates(), more=totals, margin=margins)
def test_more_bad_answers_of_the_baseline_never_speak_against_the_canary(
    canary: Rate, baseline: Rate, more: int, margin: float
) -> None:
    assert worse(canary, worsened(baseline, more), margin) <= worse(canary, baseline, margin) + ROUNDING


@settings(deadline=None)
@given(canary=rates(), baseline=rates(), pair=st.tuples(margins, margins))
def test_a_wider_margin_never_raises_the_evidence(canary: Rate, baseline: Rate, pair: tuple[float, float]) -> None:
    narrow, wide = sorted(pair)
    assert worse(canary, baseline, wide) <= worse(canary, baseline, narrow) + ROUNDING


@given(losses=totals, wins=totals, ties=totals, more=totals, margin=margins)
def test_a_lost_image_in_place_of_a_tie_never_lowers_the_evidence(
    losses: int, wins: int, ties: int, more: int, margin: float
) -> None:
    pairs = losses + wins + ties
    turned = min(more, ties)
    before, after = lost(losses, wins, pairs, margin), lost(losses + turned, wins, pairs, margin)
    assert after >= before - ROUNDING
    assert lost(losses, wins + turned, pairs, margin) <= before + ROUNDING


@settings(deadline=None)
@given(canary=histograms(), baseline=histograms(), bucket=st.integers(0, len(BOUNDS) - 2), many=totals)
def test_answers_that_move_to_a_slower_bucket_never_speak_for_the_canary(
    canary: dict[float, int], baseline: dict[float, int], bucket: int, many: int
) -> None:
    bounds = sorted(canary)
    own = canary[bounds[bucket]] - (canary[bounds[bucket - 1]] if bucket else 0)
    delayed = dict(canary)
    delayed[bounds[bucket]] -= min(many, own)
    assert slower(delayed, baseline, 0.99, 2.0) >= slower(canary, baseline, 0.99, 2.0) - ROUNDING
    assert slower(baseline, delayed, 0.99, 2.0) <= slower(baseline, canary, 0.99, 2.0) + ROUNDING


@given(many=st.lists(rates(), max_size=6), limit=shares)
def test_many_rates_at_once_are_each_read_as_alone(many: list[Rate], limit: float) -> None:
    assert each_above(many, limit) == pytest.approx([above(rate, limit) for rate in many], abs=ROUNDING)


# Symmetric under exchange ----------------------------------------------------------------------------------------


@given(rate=rates(), limit=st.floats(0.001, 0.999))
def test_good_and_bad_exchanged_exchange_above_and_below(rate: Rate, limit: float) -> None:
    assert below(rate, limit) == above(rate.complement, 1.0 - limit)
    assert above(rate, limit) == pytest.approx(below(rate.complement, 1.0 - limit), abs=1e-6)


@given(losses=totals, wins=totals, ties=totals, margin=margins)
def test_the_same_bet_against_both_models_cannot_win_twice(losses: int, wins: int, ties: int, margin: float) -> None:
    pairs = losses + wins + ties
    assert min(lost(losses, wins, pairs, margin), lost(wins, losses, pairs, margin)) <= ROUNDING
    assert (lost(losses, wins, pairs, 0.0) > lost(wins, losses, pairs, 0.0)) == (losses > wins)


@settings(deadline=None, max_examples=15)
@given(canary=rates(), baseline=rates(), alpha=st.floats(0.001, 0.5))
def test_versions_exchanged_exchange_and_negate_the_ends_of_their_difference(
    canary: Rate, baseline: Rate, alpha: float
) -> None:
    low, high = difference_interval(canary, baseline, alpha)
    assert difference_interval(baseline, canary, alpha) == (-high, -low)
    assert -1.0 <= low <= canary.share - baseline.share <= high <= 1.0


@given(mix=st.tuples(*[st.dictionaries(st.sampled_from("abcd"), totals)] * 2), margin=st.floats(0.01, 0.5))
@settings(deadline=None, max_examples=40)
def test_a_shift_of_the_class_mix_counts_in_both_directions(
    mix: tuple[dict[str, int], dict[str, int]], margin: float
) -> None:
    assert shifted(*mix, 4, margin) == pytest.approx(shifted(*reversed(mix), 4, margin), abs=ROUNDING)


@given(mix=st.tuples(*[st.dictionaries(st.sampled_from("abcd"), totals, min_size=1)] * 2))
@settings(deadline=None, max_examples=40)
def test_classes_that_nobody_named_weigh_too(mix: tuple[dict[str, int], dict[str, int]]) -> None:
    expected = shifted(*mix, 4, 0.05) - math.log(10.0)
    assert shifted(*mix, 40, 0.05) == pytest.approx(expected, abs=ROUNDING)


# Looks -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(1, 599), max_size=12))
def test_how_the_stream_is_cut_into_looks_changes_nothing(seed: int, cuts: list[int]) -> None:
    stream = np.random.default_rng(seed).random((4, 600))
    at_once = list(readings(stream, [600]))[-1]
    assert list(readings(stream, [*sorted(cuts), 600]))[-1] == at_once


def readings(stream: Floats, looks: list[int]) -> Iterator[tuple[float, ...]]:
    """All evidence at each look, from counts that are added up from look to look."""
    bad, delayed, total = np.zeros(2, dtype=int), np.zeros((2, len(BOUNDS)), dtype=int), 0
    for start, end in pairwise([0, *looks]):
        part = stream[:, start:end]
        bad += [int((part[0] < 0.05).sum()), int((part[1] < 0.01).sum())]
        delayed += [list(cumulative(1.0 / np.maximum(part[row], 1e-9)).values()) for row in (2, 3)]
        total += part.shape[1]
        canary, baseline = (Rate(int(count), total) for count in bad)
        ours, theirs = (dict(zip(BOUNDS, row.tolist(), strict=True)) for row in delayed)
        yield (
            above(canary, 0.02),
            worse(canary, baseline, 0.001),
            lost(canary.bad, baseline.bad, 2 * total, 0.01),
            slower(ours, theirs, 0.9, 1.5),
            shifted({"a": canary.bad, "b": total - canary.bad}, {"a": baseline.bad, "b": total}, 2, 0.1),
        )


# Finite whatever was counted -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(canary=rates(HUGE), baseline=rates(HUGE), margin=shares, limit=shares)
def test_no_count_makes_the_evidence_overflow(canary: Rate, baseline: Rate, margin: float, limit: float) -> None:
    values = [above(canary, limit), below(canary, limit), worse(canary, baseline, margin)]
    values += each_above([canary, baseline], limit)
    values.append(shifted({"a": canary.bad, "b": baseline.bad}, {"a": baseline.total}, 38, margin))
    values.append(lost(canary.bad, canary.total - canary.bad, canary.total + baseline.total, margin))
    assert all(not math.isnan(value) and value < math.inf for value in values)


@settings(deadline=None)
@given(canary=histograms(HUGE), baseline=histograms(HUGE), quantile=st.floats(0.01, 0.999), factor=st.floats(1.0, 9.0))
def test_no_histogram_makes_the_evidence_overflow(
    canary: dict[float, int], baseline: dict[float, int], quantile: float, factor: float
) -> None:
    value = slower(canary, baseline, quantile, factor)
    assert not math.isnan(value) and value < math.inf
    low, high = quantile_interval(canary, quantile, 0.05)
    assert 0.0 <= low <= high


@pytest.mark.parametrize("limit", [0.0, 1e-300, 0.5, 1.0])
@pytest.mark.parametrize("rate", [Rate(0, HUGE), Rate(HUGE, HUGE), Rate(1, HUGE), Rate(HUGE // 2, HUGE)])
def test_limits_at_the_ends_of_the_scale_have_evidence_too(rate: Rate, limit: float) -> None:
    for value in (above(rate, limit), below(rate, limit)):
        assert math.isfinite(value)
    if rate.share <= limit:
        assert above(rate, limit) <= HUGE_ROUNDING


@settings(deadline=None)
@given(rate=rates(), margin=margins)
def test_without_traffic_there_is_no_evidence(rate: Rate, margin: float) -> None:
    nothing = Rate(0, 0)
    assert above(nothing, margin) == below(nothing, margin) == 0.0
    assert worse(nothing, rate, margin) == worse(rate, nothing, margin) == worse(nothing, nothing, margin) == -math.inf
    assert lost(0, 0, 0, margin) == pytest.approx(0.0)


def test_without_samples_nothing_is_known_and_nothing_is_said() -> None:
    some, none = dict.fromkeys(BOUNDS, 100), dict.fromkeys(BOUNDS, 0)
    for pair in ((none, some), (some, none), (none, none), ({}, some), (some, {}), ({}, {})):
        assert slower(*pair, 0.99, 2.0) == -math.inf
    assert shifted({}, {}, 4, 0.1) == shifted({"a": 9}, {}, 4, 0.1) == -math.inf
    assert each_above([], 0.1) == []
    assert rate_interval(Rate(0, 0), 0.05) == (0.0, 1.0)
    assert difference_interval(Rate(0, 0), Rate(3, 9), 0.05) == (-1.0, 1.0)
    assert quantile_interval({}, 0.99, 0.05) == quantile_interval(none, 0.99, 0.05) == (0.0, math.inf)
    assert mean([], 3) == mean([-math.inf], 1) == mean([1.0], 0) == -math.inf


@pytest.mark.parametrize("counts", [(-1, 0), (2, 1), (0, -1)])
def test_counts_that_cannot_be_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="is no rate"):
        Rate(*counts)


def test_pairs_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into 9 pairs"):
        lost(5, 5, 9, 0.0)


@given(logs=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), missing=st.integers(0, 20))
def test_the_mean_is_that_of_the_numbers_missing_ones_being_zero(logs: list[float], missing: int) -> None:
    count = len(logs) + missing
    expected = float(np.logaddexp.reduce(np.array(logs))) - math.log(count)
    assert mean([*logs, -math.inf], count) == pytest.approx(expected, abs=1e-6)


# Expectation at most 1, exactly ----------------------------------------------------------------------------------

GRID = (0.0, 1e-6, 0.0005, 0.003, 0.01, 0.03, 0.1, 0.27, 0.5, 0.83, 0.999, 1.0)


def binomial(total: int, share: float) -> Floats:
    return np.asarray(stats.binom.pmf(np.arange(total + 1), total, share))


@pytest.mark.parametrize("total", [1, 3, 12, 60])
@pytest.mark.parametrize("limit", GRID)
def test_the_expectation_of_the_evidence_above_a_limit_is_at_most_1_up_to_the_limit(total: int, limit: float) -> None:
    evidence = np.exp([above(Rate(bad, total), limit) for bad in range(total + 1)])
    for share in (share for share in GRID if share <= limit):
        assert binomial(total, share) @ evidence <= 1 + ROUNDING


@pytest.mark.parametrize("canary, baseline", [(1, 1), (6, 6), (4, 40), (25, 25)])
@pytest.mark.parametrize("margin", MARGINS)
def test_the_expectation_of_the_evidence_of_a_worse_canary_is_at_most_1_at_every_harmless_pair_of_rates(
    canary: int, baseline: int, margin: float
) -> None:
    evidence = np.exp(
        [[worse(Rate(x, canary), Rate(y, baseline), margin) for y in range(baseline + 1)] for x in range(canary + 1)]
    )
    for theirs in np.union1d(GRID, np.linspace(0.0, 1.0, 101)):
        for ours in {min(theirs + margin, 1.0), min(theirs + margin, 1.0) / 2}:
            assert binomial(canary, ours) @ evidence @ binomial(baseline, theirs) <= 1 + ROUNDING


@pytest.mark.parametrize(
    "canary, baseline", [((2500, 4000), (2100, 4000)), ((900, 4000), (14, 100)), ((40, 90), (1000, 5000))]
)
@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_the_evidence_of_a_worse_canary_is_never_above_the_product_at_any_rate_of_the_baseline(
    canary: tuple[int, int], baseline: tuple[int, int], margin: float
) -> None:
    """Between the points of the grid too, which is what makes it true evidence whatever that rate is."""
    ours, theirs = Rate(*canary), Rate(*baseline)
    rates = np.geomspace(0.05, 0.9, 1_500)
    factors, weights = np.array(anytime._FALLS).T
    mixed = np.log(weights / weights.sum())[:, None] + np.log(factors)[:, None] * theirs.bad
    under = np.logaddexp.reduce(mixed - theirs.total * np.log1p(rates * (factors[:, None] - 1.0)))
    over = [above(ours, rate + margin) for rate in rates]
    assert worse(ours, theirs, margin) <= (np.array(over) + under).min() + ROUNDING


@pytest.mark.parametrize("pairs", [1, 5, 30])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.2])
def test_the_expectation_of_the_evidence_of_lost_accuracy_is_at_most_1_for_every_share_of_discordant_pairs(
    pairs: int, margin: float
) -> None:
    counts = [(losses, wins) for losses in range(pairs + 1) for wins in range(pairs + 1 - losses)]
    evidence = np.exp([lost(losses, wins, pairs, margin) for losses, wins in counts])
    table = [(losses, wins, pairs - losses - wins) for losses, wins in counts]
    for won in np.linspace(0.0, (1.0 - margin) / 2, 15):
        shares = (won + margin, won, max(0.0, 1.0 - 2 * won - margin))
        assert stats.multinomial.pmf(table, pairs, shares) @ evidence <= 1 + ROUNDING


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_expectation_of_the_evidence_of_slow_answers_is_at_most_1_at_equal_quantiles(quantile: float) -> None:
    """Three buckets, so that all histograms can be listed; the quantile lies in the second one in all pairs."""
    bounds, total = (10.0, 20.0, math.inf), 7
    tables = [(a, b, total - a - b) for a in range(total + 1) for b in range(total + 1 - a)]
    named = [dict(zip(bounds, np.cumsum(table).tolist(), strict=True)) for table in tables]
    evidence = np.exp([[slower(ours, theirs, quantile, 1.0) for theirs in named] for ours in named])
    for first in np.linspace(0.0, quantile, 6):
        theirs = stats.multinomial.pmf(tables, total, (first, 1.0 - first, 0.0))
        ours = stats.multinomial.pmf(tables, total, (0.0, quantile, 1.0 - quantile))
        assert ours @ evidence @ theirs <= 1 + ROUNDING


# Ville's inequality, exactly -------------------------------------------------------------------------------------

LIMIT = math.log(20.0)


def smallest(count: int, enough: Callable[[int], bool]) -> int:
    """The smallest of 0..count for which a monotone condition holds; count + 1 where none does."""
    low, high = 0, count + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


@pytest.mark.parametrize("limit", [0.005, 0.05, 0.35])
def test_a_stream_at_the_limit_is_called_above_it_in_at_most_5_percent_though_looked_at_after_each_request(
    limit: float,
) -> None:
    alive, caught = np.array([1.0]), 0.0
    for total in range(1, 601):
        alive = np.append(alive * (1 - limit), 0.0) + np.append(0.0, alive * limit)
        first = smallest(total, lambda bad, total=total: above(Rate(bad, total), limit) >= LIMIT)  # type: ignore[misc]
        caught += alive[first:].sum()
        alive[first:] = 0.0
    assert 0.002 < caught <= 0.05
    assert caught + alive.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_a_harmless_canary_is_called_worse_in_at_most_5_percent_though_looked_at_after_each_request(
    margin: float,
) -> None:
    steps = 35
    stops = {turn: _stops(*turn, margin) for n in range(1, steps + 1) for turn in ((n, n - 1), (n, n))}
    caught = [_caught(stops, steps, theirs, theirs + margin) for theirs in (0.02, 0.1, 0.3, 0.5, 0.8)]
    assert max(caught) <= 0.05
    assert max(caught) > 0.0005, "a test that can never stop proves nothing"


def _stops(canary: int, baseline: int, margin: float) -> npt.NDArray[np.int64]:
    """By bad answers of the baseline: the fewest of the canary's that stop. Never falls, so each search begins late."""
    found, first = [], 0
    for theirs in range(baseline + 1):
        while first <= canary and worse(Rate(first, canary), Rate(theirs, baseline), margin) < LIMIT:
            first += 1
        found.append(first)
    return np.array(found)


def _caught(stops: dict[tuple[int, int], npt.NDArray[np.int64]], steps: int, theirs: float, ours: float) -> float:
    alive, caught = np.ones((1, 1)), 0.0
    for n in range(1, steps + 1):
        for turn, share, axis in (((n, n - 1), ours, 0), ((n, n), theirs, 1)):
            grown = np.zeros(np.add(alive.shape, (1, 0) if axis == 0 else (0, 1)))
            moved = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
            kept = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
            grown[moved] += alive * share
            grown[kept] += alive * (1.0 - share)
            stopped = np.arange(grown.shape[0])[:, None] >= stops[turn][None, :]
            caught += float(grown[stopped].sum())
            grown[stopped] = 0.0
            alive = grown
    return caught


# Confidence sequences over whole streams -------------------------------------------------------------------------

ALPHA = 0.2
LOOKS = (1, 2, 4, 7, 12, 20, 35, 60, 100, 170, 290, 500)


def tolerated(streams: int) -> int:
    """More misses than these are no accident in `streams` streams of a method that keeps ALPHA."""
    return int(stats.binom.ppf(1 - SURE, streams, ALPHA))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_the_interval_of_a_rate_holds_it_at_all_looks(share: float) -> None:
    streams, looks, missed = 40, LOOKS[2::2], 0
    counts = np.cumsum(np.random.default_rng(7).random((streams, LOOKS[-1])) < share, axis=1)
    for row in counts:
        ends = [rate_interval(Rate(int(row[look - 1]), look), ALPHA) for look in looks]
        missed += not all(low <= share <= high for low, high in ends)
        assert all(low <= high for low, high in ends)
    assert missed <= tolerated(streams)
    assert ends[-1][1] - ends[-1][0] < 0.25


@pytest.mark.parametrize("ours, theirs", [(0.05, 0.05), (0.3, 0.1)])
def test_the_interval_of_a_difference_holds_it_at_all_looks(ours: float, theirs: float) -> None:
    streams, looks, missed = 25, LOOKS[5::3], 0
    rng = np.random.default_rng(11)
    canary = np.cumsum(rng.random((streams, LOOKS[-1])) < ours, axis=1)
    baseline = np.cumsum(rng.random((streams, LOOKS[-1])) < theirs, axis=1)
    for one, other in zip(canary, baseline, strict=True):
        ends = [difference_interval(Rate(int(one[n - 1]), n), Rate(int(other[n - 1]), n), ALPHA) for n in looks]
        missed += not all(low <= ours - theirs <= high for low, high in ends)
    assert missed <= tolerated(streams)


@settings(deadline=None, max_examples=20)
@given(canary=rates(), baseline=rates(), alpha=st.floats(0.001, 0.5))
def test_an_interval_ends_where_its_evidence_reaches_its_half_of_alpha(
    canary: Rate, baseline: Rate, alpha: float
) -> None:
    threshold, hair = math.log(2.0 / alpha), 1e-7
    low, high = rate_interval(canary, alpha)
    assert low == 0.0 or above(canary, low - hair) >= threshold > above(canary, low + hair)
    assert high == 1.0 or below(canary, high + hair) >= threshold > below(canary, high - hair)
    low, _ = difference_interval(canary, baseline, alpha)
    assert low == -1.0 or worse(canary, baseline, low - hair) >= threshold > worse(canary, baseline, low + hair)


def heavy(rng: np.random.Generator, count: int, scale_ms: float) -> Floats:
    """Latencies with a Pareto tail of exponent 1.2: finite mean, infinite variance."""
    return scale_ms * (1.0 + np.asarray(rng.pareto(1.2, count)))


def test_the_interval_of_a_quantile_holds_it_at_all_looks_under_a_heavy_tail() -> None:
    streams, true_ms, missed = 60, 8.0 * 0.1 ** (-1 / 1.2), 0
    for seed in range(streams):
        latencies = heavy(np.random.default_rng(seed), LOOKS[-1], 8.0)
        ends = [quantile_interval(cumulative(latencies[:look]), 0.9, ALPHA) for look in LOOKS]
        missed += not all(low <= true_ms <= high for low, high in ends)
    assert missed <= tolerated(streams)
    assert ends[-1][0] >= 20.0 and ends[-1][1] <= 200.0


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_canary_that_keeps_the_factor_is_not_called_slower_under_a_heavy_tail(scale: float) -> None:
    """At twice the latency and a factor of 2, H0 holds with equality."""
    streams, rejected = 80, 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        ours, theirs = heavy(rng, 2_000, 5.0 * scale), heavy(rng, 2_000, 5.0)
        looks = range(100, 2_001, 190)
        found = max(slower(cumulative(ours[:n]), cumulative(theirs[:n]), 0.9, 2.0) for n in looks)
        rejected += found >= math.log(1 / ALPHA)
    assert rejected <= tolerated(streams)


def test_a_canary_with_a_ten_times_longer_tail_is_called_slower() -> None:
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ours, theirs = heavy(rng, 1_000, 50.0), heavy(rng, 1_000, 5.0)
        found.append(slower(cumulative(ours), cumulative(theirs), 0.9, 2.0))
    assert min(found) > LIMIT
