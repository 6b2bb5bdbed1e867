"""The canary's judge by simulation: false aborts, requests until harm is seen, beside other rules; and its speed.

`python -m tests.benchmarks.bench_judge` (3 minutes on one core). Every cell is at least `ROLLOUTS` seeded rollouts,
looked at after every single request; the product's functions decide. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import math
import sys
import time
import timeit
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from configs.areas import JudgeSettings
from tasks.rollout.gates import Sides, gate_names, log_threshold, read
from tasks.rollout.policy import judge
from tasks.rollout.verdict import Decision, Evidence, Paired, Stage, Verdict
from tests.benchmarks import peers
from tests.benchmarks.streams import (
    NEVER,
    Counts,
    Floats,
    Labels,
    Rule,
    Traffic,
    lost_after,
    shortcut_agrees,
    worse_after,
)

ROLLOUTS = 10_000
# Rare false aborts need more to be known well enough to tune another rule to them.
HEALTHY_ROLLOUTS = 60_000
HORIZON, SHORT = 20_000, 1_000
PREFIXES = (50, 200, 1_000, 5_000, HORIZON)
BASES, RATIOS = (0.001, 0.005, 0.02, 0.05), (19, 1)
HEALTHY, HARMFUL = 0.005, 0.02
LIMITS = JudgeSettings()
GATES = gate_names(first=False, comparable=True)
ALONE, TOGETHER = -math.log(LIMITS.alpha), log_threshold(GATES, LIMITS)
THRESHOLDS = {"one gate alone": ALONE, f"one of {len(GATES)} gates": TOGETHER}
FEWER = 3.0
CLASSES = tuple(f"class {number}" for number in range(38))
LOOK_LIMIT_MS = 1.0
CONSOLE = Console(width=150)


@dataclass(frozen=True, slots=True)
class Promise:
    """What was promised, and whether it was kept. What is only `shown` was not promised for these circumstances."""

    words: str
    kept: bool
    shown: bool = False


def main() -> list[Promise]:
    """Simulate, print the tables, and return what was promised."""
    rng = np.random.default_rng(20_26)
    promises = [
        Promise("skipping hopeless looks decides as looking after each request", shortcut_agrees(30, rng)),
        Promise("Kayenta's rule decides as its ranks and its root finding do", peers.kayenta_agrees(200, rng)),
    ]
    for part in (_false_aborts, _side_by_side, _accuracy, _whole_rollouts, _speed):
        began = time.perf_counter()
        promises += part(rng)
        CONSOLE.print(f"({time.perf_counter() - began:.0f} s)\n")
    _print_promises(promises)
    return promises


# No harm --------------------------------------------------------------------------------------------------------------


def _false_aborts(rng: np.random.Generator) -> Iterator[Promise]:
    title = f"False aborts (%) within so many requests, alpha {LIMITS.alpha:.0%}, one gate alone: the easiest to trip"
    table = _table(title, "errors of both", "traffic", "margin, points", *(f"{n:,}" for n in PREFIXES))
    highest = 0.0
    for margin in (0.0, LIMITS.errors.margin):
        for ratio in RATIOS:
            for base in BASES:
                stops = worse_after(Traffic(base, base, ratio, HORIZON), Rule(margin, ALONE), ROLLOUTS, rng)
                found = [_share(stops <= n) for n in PREFIXES]
                highest = max(highest, _wilson(stops < NEVER)[1])
                table.add_row(f"{base:.1%}", f"{ratio}:1", f"{100 * margin:g}", *found)
    CONSOLE.print(table)
    yield Promise(
        f"false aborts <= {LIMITS.alpha:.0%} in every cell (highest upper end {highest:.1%})", highest <= LIMITS.alpha
    )


# Side by side ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Result:
    """One rule on healthy and on harmful traffic: requests until it aborts. `exact`: a median that is known."""

    name: str
    healthy: Counts
    harmful: Counts
    exact: float | None = None

    @property
    def median(self) -> float:
        return self.exact or _quantile(self.harmful, 0.5)

    @property
    def aborts(self) -> float:
        return float(np.mean(self.healthy < NEVER))


@dataclass(frozen=True, slots=True)
class _Intervals:
    """Errors by interval: of healthy canaries, of harmful ones, and of the baseline beside both."""

    good: Counts
    bad: Counts
    baseline: Counts
    ratio: int

    @classmethod
    def drawn(cls, ratio: int, rng: np.random.Generator) -> _Intervals:
        size = (ROLLOUTS, HORIZON // peers.CHECK)
        good, bad = (rng.binomial(peers.CHECK, rate, size) for rate in (HEALTHY, HARMFUL))
        return cls(good, bad, rng.binomial(peers.CHECK * ratio, HEALTHY, size), ratio)

    def both(self, name: str, rule: Callable[[Counts], Counts]) -> _Result:
        return _Result(name, rule(self.good), rule(self.bad))

    def z_test(self, name: str, every: int) -> _Result:
        """At 5 % a look, two-sided."""
        return self.both(
            name,
            lambda side: peers.repeated_test(
                peers.z_scores(side, self.baseline, self.ratio, every), peers.FIVE_PERCENT, every, two_sided=True
            ),
        )


def _side_by_side(rng: np.random.Generator) -> list[Promise]:
    return [promise for ratio in RATIOS for promise in _compared(ratio, rng)]


def _compared(ratio: int, rng: np.random.Generator) -> list[Promise]:
    intervals = _Intervals.drawn(ratio, rng)
    others = _defaults(intervals, rng)
    results, promises = list[_Result](), list[Promise]()
    for name, threshold in THRESHOLDS.items():
        ours = _ours(f"this judge, {name}", threshold, ratio, rng)
        tuned = [_tuned(ours, ratio, difference, rng) for difference in (False, True)]
        test = _as_quick(intervals, ours)
        results += [ours, *tuned, _tuned_test(intervals, ours), test]
        promises += _judged(ours, tuned, test, others[0], ratio)
    _print_results(ratio, [*results, *others])
    return promises + _known_numbers(others, ratio)


def _ours(name: str, threshold: float, ratio: int, rng: np.random.Generator) -> _Result:
    rule = Rule(LIMITS.errors.margin, threshold)
    healthy, harmful = _healthy_and_harmful(ratio)
    good = worse_after(healthy, rule, HEALTHY_ROLLOUTS, rng)
    return _Result(name, good, worse_after(harmful, rule, ROLLOUTS, rng))


def _healthy_and_harmful(ratio: int) -> tuple[Traffic, Traffic]:
    return Traffic(HEALTHY, HEALTHY, ratio, HORIZON), Traffic(HARMFUL, HEALTHY, ratio, HORIZON)


def _defaults(intervals: _Intervals, rng: np.random.Generator) -> list[_Result]:
    # Kayenta asks for a baseline of the canary's size.
    twin = _Intervals.drawn(1, rng).baseline
    return [
        intervals.both("Argo Rollouts: limit 1 %, failureLimit 0", peers.argo),
        intervals.both("Flagger: 99 %, threshold 10, 10 steps", peers.flagger),
        intervals.both("Flagger: 99 %, threshold not set (1)", lambda side: peers.flagger(side, 1)),
        intervals.both("Kayenta: Mann-Whitney each 50 points, 1:1", lambda side: peers.kayenta(side, twin)),
        intervals.both("Kayenta: each 10 points from 50 on, 1:1", lambda side: peers.kayenta(side, twin, 10)),
        intervals.z_test("two-proportion z-test, 5 %, 20 looks", intervals.good.shape[1] // 20),
    ]


def _tuned(ours: _Result, ratio: int, difference: bool, rng: np.random.Generator) -> _Result:
    """The quickest threshold that aborts no more healthy rollouts than the judge did."""
    healthy, harmful = _healthy_and_harmful(ratio)
    rule = peers.best_threshold(healthy, harmful, max(ours.aborts, 1 / HEALTHY_ROLLOUTS), difference=difference)
    good, bad = (rule.after(traffic, ROLLOUTS, rng) for traffic in (healthy, harmful))
    return _Result(f"  tuned to it: {rule}", good, bad, rule.median(harmful))


def _tuned_test(intervals: _Intervals, ours: _Result) -> _Result:
    """A boundary that has seen these very rates before, as quick as the judge."""

    def scores(side: Counts) -> Floats:
        return peers.z_scores(side, intervals.baseline, intervals.ratio, 1)

    critical = peers.critical_for(scores(intervals.bad), ours.median, 1)
    name = f"  tuned to it: z {critical:.2f} each {peers.CHECK}"
    return intervals.both(name, lambda side: peers.repeated_test(scores(side), critical, 1))


def _as_quick(intervals: _Intervals, ours: _Result) -> _Result:
    """The usual test, repeated so often that it finds the harm as soon as the judge."""
    every = peers.spacing_for(intervals.bad, intervals.baseline, intervals.ratio, ours.median)
    return intervals.z_test(f"  as quick: z-test, 5 %, each {peers.CHECK * every:,}", every)


def _judged(ours: _Result, tuned: list[_Result], test: _Result, argo: _Result, ratio: int) -> Iterator[Promise]:
    where = f"{ours.name}, {ratio}:1"
    best = min(rule.median for rule in tuned)
    words = f"{where}: median {ours.median:,.0f} <= {best:,.0f} of the tuned threshold"
    yield Promise(words, ours.median <= best, shown=ratio == 1)
    # Of ours the upper end, over twenty times as many requests as Argo's ten checks.
    upper = _wilson(ours.healthy < NEVER)[1]
    in_ten_checks = float(np.mean(argo.healthy <= SHORT))
    for name, share in (("Argo's default in ten checks", in_ten_checks), ("the test as quick", test.aborts)):
        words = f"{where}: {upper:.2%} false aborts, {FEWER:g}x fewer than {share:.1%} of {name}"
        yield Promise(words, FEWER * upper <= share)


def _known_numbers(others: list[_Result], ratio: int) -> list[Promise]:
    """That the peers do what the literature says of them."""
    argo, test = float(np.mean(others[0].healthy <= SHORT)), others[-1].aborts
    return [
        Promise(f"Argo's default aborts {argo:.0%} of healthy ten-check rollouts (61 %)", abs(argo - 0.61) < 0.02),
        Promise(f"20 looks at 5 % raise {test:.0%} false alarms at {ratio}:1 (24 %)", abs(test - 0.24) < 0.025),
    ]


def _print_results(ratio: int, results: list[_Result]) -> None:
    title = (
        f"Errors {HEALTHY:.1%} -> {HARMFUL:.1%}, champion:canary {ratio}:1, at most {HORIZON:,} requests of the canary"
    )
    table = _table(
        title, "rule", f"false aborts in {SHORT:,}, %", f"in {HORIZON:,}, %", "median requests", "90 %", "harm found, %"
    )
    for result in results:
        table.add_row(
            result.name,
            _share(result.healthy <= SHORT),
            _share(result.healthy < NEVER),
            _requests(result.median),
            _requests(_quantile(result.harmful, 0.9)),
            _share(result.harmful < NEVER),
        )
    CONSOLE.print(table)


# Accuracy -------------------------------------------------------------------------------------------------------------

_WRONG, _HARM, _MILD, _POINT = 0.04, 0.10, 0.045, 0.01
_PAIRS, _SOON = 3_000, 400


def _accuracy(rng: np.random.Generator) -> list[Promise]:
    columns = ("96 -> 90 %: median", "90 %", "96 -> 95.5 %: aborts, %", "at the margin: aborts, %")
    table = _table(
        f"Accuracy, at most {_PAIRS:,} labelled images", "threshold", "margin, points", "both wrong on", *columns
    )
    promises = list[Promise]()
    for margin in dict.fromkeys((_POINT, LIMITS.accuracy.margin)):
        for name, threshold in THRESHOLDS.items():
            for both in ("independent", "2.5 %", "nested"):
                found = [
                    lost_after(_labels(wrong, both), Rule(margin, threshold), ROLLOUTS, rng)
                    for wrong in (_HARM, _MILD, _WRONG + margin)
                ]
                median, late = (_requests(_quantile(found[0], share)) for share in (0.5, 0.9))
                aborts = [_share(stops < NEVER) for stops in found[1:]]
                table.add_row(name, f"{100 * margin:g}", both, median, late, *aborts)
                # Not promised: ten gates and no common mistake at once, or a wider margin.
                shown = (both == "independent" and threshold == TOGETHER) or margin > _POINT
                promises += _accuracy_promises(f"accuracy, {name}, margin {100 * margin:g}, {both}", found, shown)
    CONSOLE.print(table)
    return promises


def _accuracy_promises(where: str, found: list[Counts], shown: bool) -> list[Promise]:
    harm, *harmless = found
    median, upper = _quantile(harm, 0.5), max(_wilson(stops < NEVER)[1] for stops in harmless)
    return [
        Promise(f"{where}: median {median:,.0f} <= {_SOON} images", median <= _SOON, shown),
        Promise(f"{where}: {upper:.2%} of harmless ones called harm", upper <= LIMITS.alpha),
    ]


def _labels(wrong: float, both: str) -> Labels:
    """`both`: how the champion's mistakes and the challenger's go together."""
    common = {"independent": _WRONG * wrong, "2.5 %": 0.025, "nested": _WRONG}[both]
    return Labels(wrong - common, _WRONG - common, _PAIRS)


# All gates together ---------------------------------------------------------------------------------------------------

_LOOKS = (40, 100, 250, 600, 1_500, 4_000)


def _whole_rollouts(rng: np.random.Generator) -> list[Promise]:
    """Canaries that are as bad as each margin allows, in every gate at once."""
    aborted = np.array([_rolled_back(rng) for _ in range(ROLLOUTS)])
    upper = _wilson(aborted)[1]
    words = (
        f"all {len(GATES)} gates at their margins: {_share(aborted)} % of rollouts aborted, at {len(_LOOKS)} looks each"
    )
    CONSOLE.print(words)
    return [Promise(words, upper <= LIMITS.alpha)]


def _rolled_back(rng: np.random.Generator) -> bool:
    canary = baseline = np.zeros(_WIDTH, dtype=np.int64)
    paired, seen = np.zeros(3, dtype=np.int64), 0
    for look in _LOOKS:
        canary, baseline = canary + _served(look - seen, 1, 1.0, rng), baseline + _served(look - seen, 9, 0.0, rng)
        lost = 0.02 + LIMITS.accuracy.margin
        paired, seen = paired + rng.multinomial(look - seen, (lost, 0.02, 0.98 - lost)), look
        stage = Stage(0.1, 10 * _LOOKS[-1], False, 0.0, 60.0, classes=_MIX.size)
        pairs = Paired(look, int(paired[0]), int(paired[1]), int(paired[2]))
        verdict = judge(_evidence(canary, look), _evidence(baseline, 9 * look), pairs, stage, LIMITS)
        if verdict.decision is Decision.rollback:
            return True
    return False


_MIX = np.array([0.4, 0.3, 0.2, 0.1])
# Errors, slow, not a leaf, other answers, classes, other answers by class, answers by bucket of latency.
_WIDTH = 4 + 2 * _MIX.size + 3


def _served(requests: int, ratio: int, harm: float, rng: np.random.Generator) -> Counts:
    """Counts of so many requests; `harm` 1: exactly as bad as every margin allows."""
    total = requests * ratio
    margins = (LIMITS.errors.margin, LIMITS.slow.margin, LIMITS.ood.margin)
    rates = [base + harm * margin for base, margin in zip((0.005, 0.005, 0.03), margins, strict=True)]
    shift = harm * LIMITS.class_mix.margin * np.array([1.0, -1.0, 0.0, 0.0])
    classes = rng.multinomial(total, _MIX + shift)
    other = [rng.binomial(total, LIMITS.disagreement.margin), *rng.binomial(classes, LIMITS.class_disagreement.margin)]
    slow = rng.binomial(total, rates[1])
    # The baseline's quantile lies within the objective; the canary's may be twice that.
    tail = rng.binomial(total, harm * (1.0 - LIMITS.tail.quantile))
    counts = [rng.binomial(total, rates[0]), slow, rng.binomial(total, rates[2]), other[0], *classes, *other[1:]]
    return np.array([*counts, total - max(slow, tail), max(slow, tail) - tail, tail])


def _evidence(counts: Counts, total: int) -> Evidence:
    kinds = [f"class {number}" for number in range(_MIX.size)]
    values = counts.tolist()
    classes, other = values[4 : 4 + _MIX.size], values[4 + _MIX.size : 4 + 2 * _MIX.size]
    ends = (LIMITS.latency_objective_ms, 2 * LIMITS.latency_objective_ms, math.inf)
    return Evidence(
        requests=total,
        errors=values[0],
        slow=values[1],
        predictions=total,
        ood=values[2],
        classes=dict(zip(kinds, classes, strict=True)),
        latency=dict(zip(ends, np.cumsum(values[-3:]).tolist(), strict=True)),
        shadow_pairs=total,
        shadow_differ=values[3],
        shadow_by_class={kind: (n, k) for kind, n, k in zip(kinds, classes, other, strict=True)},
    )


# Speed and memory -----------------------------------------------------------------------------------------------------


def _speed(_: np.random.Generator) -> list[Promise]:
    small, large = (_long_rollout(requests) for requests in (10**3, 10**7))
    twenty = GATES * 2
    took = {
        f"judge, {len(GATES)} gates": _least_ms(lambda: _look(large)),
        f"{len(twenty)} gates read": _least_ms(lambda: read(twenty, large, LIMITS, intervals=False)),
    }
    peaks = [_peak_bytes(sides) for sides in (small, large)]
    table = _table(f"One look at {large.canary.requests:,} requests and {len(CLASSES)} classes", "what", "ms", "limit")
    for name, milliseconds in took.items():
        table.add_row(name, f"{milliseconds:.2f}", f"{LOOK_LIMIT_MS:g}")
    CONSOLE.print(table)
    return [
        *(Promise(f"a look, {name}: {spent:.2f} ms", spent < LOOK_LIMIT_MS) for name, spent in took.items()),
        Promise(
            f"a look takes {peaks[0]:,} bytes at {small.canary.requests:,} requests, {peaks[1]:,} at "
            f"{large.canary.requests:,}",
            peaks[1] <= 1.1 * peaks[0],
        ),
    ]


def _look(sides: Sides) -> Verdict:
    stage = Stage(0.25, 10**9, False, 0.0, 60.0, classes=sides.classes)
    return judge(sides.canary, sides.champion, sides.paired, stage, LIMITS)


def _long_rollout(requests: int) -> Sides:
    """Everything counted; the canary a hair beyond each margin, so that no gate is spared its arithmetic."""
    harmful, baseline = _side(requests, 1.0), _side(9 * requests, 0.0)
    images, wins = requests // 10, requests // 260
    pairs = Paired(images, wins + math.floor(LIMITS.accuracy.margin * images) + 1, wins, requests // 11)
    return Sides(harmful, baseline, baseline, pairs, classes=len(CLASSES))


def _side(total: int, harm: float) -> Evidence:
    def bad(share: float, margin: float) -> int:
        return math.floor(total * (share + harm * margin)) + 2 * round(harm)

    bounds = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 250.0, 500.0, 1000.0, 2000.0, 5000.0, math.inf)
    within = {bound: int(total * (1.0 - 0.6**number)) for number, bound in enumerate(bounds, 1)} | {math.inf: total}
    most, least = bad(0.3, LIMITS.class_mix.margin), bad(0.3, -LIMITS.class_mix.margin)
    rest = (total - most - least) // (len(CLASSES) - 2)
    named = dict.fromkeys(CLASSES, rest) | {CLASSES[0]: most, CLASSES[1]: least}
    return Evidence(
        requests=total,
        errors=bad(0.005, LIMITS.errors.margin),
        slow=bad(0.02, LIMITS.slow.margin),
        predictions=total,
        ood=bad(0.03, LIMITS.ood.margin),
        classes=named,
        latency=within,
        shadow_pairs=total,
        shadow_differ=bad(0.0, LIMITS.disagreement.margin),
        shadow_errors=bad(0.005, LIMITS.errors.margin),
        shadow_slow=bad(0.02, LIMITS.slow.margin),
        shadow_latency=within,
        shadow_by_class=dict.fromkeys(CLASSES, (total // 50, total // 100)),
    )


def _least_ms(work: Callable[[], object]) -> float:
    """The best of many short batches: other work on the machine only ever adds."""
    return 1e3 * min(timeit.repeat(work, number=5, repeat=60)) / 5


def _peak_bytes(sides: Sides) -> int:
    _look(sides)
    tracemalloc.start()
    try:
        _look(sides)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Tables ---------------------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _wilson(hits: npt.NDArray[np.bool_]) -> tuple[float, float]:
    n, share, z = hits.size, float(hits.mean()), 1.96
    middle, wide = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - wide) / (1 + z * z / n)), (middle + wide) / (1 + z * z / n)


def _share(hits: npt.NDArray[np.bool_]) -> str:
    low, high = _wilson(hits)
    return f"{100 * hits.mean():.2f} ({100 * low:.2f}-{100 * high:.2f})"


def _quantile(stops: Counts, share: float) -> float:
    """Infinite where fewer were stopped at all."""
    value = int(np.quantile(stops, share, method="inverted_cdf"))
    return math.inf if value == NEVER else float(value)


def _requests(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:,.0f}"


def _print_promises(promises: list[Promise]) -> None:
    table = _table("Promises", "what", "")
    for promise in promises:
        missed = "not kept, and not promised here" if promise.shown else "MISSED"
        table.add_row(promise.words, "kept" if promise.kept else missed)
    CONSOLE.print(table)


if __name__ == "__main__":
    sys.exit(0 if all(promise.kept or promise.shown for promise in main()) else 1)
