"""What a rollout can see, worked out before it starts: samples and minutes that each gate needs for a stated harm.

Pure: the samples come from `detection`, by seeded simulation with the judge's own evidence. Each harm is taken alone,
against its gate's own threshold; several at once are seen sooner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from configs.areas import HarmSettings
from tasks.rollout import detection
from tasks.rollout.detection import Above, Floats, Lost, Slower, Stream, Worse
from tasks.rollout.gates import gate_names, log_threshold, rule_of
from tasks.rollout.supply import Setup, StagePlan, Supply, labelled, mirrored, served

SURE: Final = 0.9
# A recommendation asks for a little more than the simulation found: it is a quantile of a few hundred rollouts.
_RESERVE: Final = 1.1
_HALVINGS: Final = 6
_LARGER: Final = (1.5, 2.0, 3.0, 5.0, 8.0, 13.0)
# How harms are called in the settings, by gate.
_HARMS: Final[Mapping[str, str]] = {
    "shadow errors": "errors",
    "shadow slow": "slow",
    "disagreement": "disagreement",
    "class disagreement": "class_disagreement",
    "errors": "errors",
    "slow": "slow",
    "tail latency": "tail_ms",
    "ood": "ood",
    "class mix": "class_mix",
    "accuracy": "accuracy",
}
_SHADOW: Final = ("shadow errors", "shadow slow", "disagreement", "class disagreement")


@dataclass(frozen=True, slots=True)
class GateForecast:
    """What one gate needs to see its harm.

    `usual` and `harm` are rates (ms for the tail of latency); `needed` and `needed_90`: samples in the median and in
    90 % of the rollouts, None: more than anybody waits for; `minutes` and `minutes_90` likewise, from the start of the
    rollout along its steps, the last of which goes on for as long as it takes. `at_step`: minutes for `needed_90`
    samples at the weight of each step alone. `available`: samples the rollout collects, `reachable`: those it could
    collect if each step used its whole deadline. `seen`: probability that the harm is seen before the rollout ends.
    `counts`: the gate does not only report.
    """

    name: str
    key: str
    usual: float
    harm: float
    unit: str
    available: int
    reachable: int
    needed: int | None
    needed_90: int | None
    minutes: float | None
    minutes_90: float | None
    at_step: tuple[float | None, ...]
    seen: float
    counts: bool

    @property
    def rank(self) -> tuple[float, float]:
        """Larger for a gate that sees more, then sooner."""
        return self.seen, -math.inf if self.minutes_90 is None else -self.minutes_90

    @property
    def state(self) -> str:
        """`seen`: in 90 % of the rollouts; `missed`: not in so many, more samples would do; `cannot`: not within the
        deadlines at this traffic; `silent`: nothing is sent that this gate could judge."""
        if self.reachable == 0:
            return "silent"
        if self.seen >= SURE:
            return "seen"
        return "missed" if self.needed_90 is not None and self.needed_90 <= self.reachable else "cannot"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Settings with which every harm that counts is seen in 90 % of the rollouts, within the deadlines."""

    shadow_requests: int
    steps: tuple[float, ...]
    min_samples: int
    minutes: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """The plan of a rollout. `recommended` None: no steps do it; `would_help` says what would, in sentences."""

    setup: Setup
    stages: tuple[StagePlan, ...]
    gates: tuple[GateForecast, ...]
    recommended: Recommendation | None = None
    would_help: tuple[str, ...] = ()

    @property
    def minutes(self) -> float:
        """How long a healthy rollout takes."""
        return sum(stage.seconds for stage in self.stages) / 60

    @property
    def late(self) -> tuple[StagePlan, ...]:
        """Stages that do not get their samples before the deadline."""
        return tuple(stage for stage in self.stages if not stage.decides)

    @property
    def deciding(self) -> tuple[GateForecast, ...]:
        """For every harm the gate with a say that sees it best: one is enough."""
        return _deciding(self.gates)

    @property
    def blind(self) -> tuple[GateForecast, ...]:
        """Gates whose harm nobody sees within the deadlines."""
        return tuple(gate for gate in self.deciding if gate.state == "cannot")

    @property
    def decides(self) -> bool:
        """Whether every stage gets its samples and every gate can see its harm in time."""
        return not self.late and not self.blind


def forecast(setup: Setup) -> Forecast:
    """What this rollout can see, and which steps would see more. Takes about a second for ten gates."""
    seen = outlook(setup)
    recommended, would_help = _recommend(setup, seen.gates)
    return replace(seen, recommended=recommended, would_help=would_help)


def outlook(setup: Setup) -> Forecast:
    """What this rollout can see, without a recommendation."""
    return Forecast(setup, setup.stages, _gates(setup))


def warnings(setup: Setup) -> list[str]:
    """What a person should know before this rollout starts; empty when it can see every stated harm in time."""
    return sentences(outlook(setup))


def sentences(plan: Forecast) -> list[str]:
    """The warnings of a plan: what cannot be decided, what may be missed, what is not looked at."""
    rate = plan.setup.traffic.requests_per_s
    found = [
        f"the {_stage(stage)} cannot decide: its {stage.samples:,} requests take {stage.seconds / 60:,.0f} min at "
        f"{rate:g} requests/s, the deadline is {stage.deadline_s / 60:,.0f} min"
        for stage in plan.late
    ]
    found += [f"{_names(gate)} cannot be seen before the deadline: {_needs(gate)}" for gate in plan.blind]
    if missed := [gate for gate in plan.deciding if gate.state == "missed" and not plan.late]:
        listed = ", ".join(f"{_names(gate)}: {1 - gate.seen:.0%}" for gate in missed)
        found.append(f"too few requests a step to be sure; share of such rollouts that miss a harm: {listed}")
    found += [
        f"{gate.name} is not judged: no labelled images are sent (replay.enabled)"
        for gate in plan.deciding
        if gate.state == "silent"
    ]
    return found


def smallest_seen(setup: Setup, gate: GateForecast) -> float | None:
    """The smallest of some larger harms that this gate sees in 90 % of the rollouts as they are planned, if any."""
    for harm in _larger(gate):
        worse = replace(setup, harms=_with_harm(setup.harms, gate.key, harm))
        supply = _supply(gate.name, worse)
        if _seen(gate.name, worse, supply) >= SURE:
            return harm
    return None


def shown(key: str, value: float) -> str:
    """A rate as people read it; the tail of latency is in ms."""
    return f"{value:,.0f} ms" if key == "tail_ms" else f"{100 * value:.3g}%"


def _larger(gate: GateForecast) -> Iterator[float]:
    for factor in _LARGER:
        harm = gate.usual + factor * (gate.harm - gate.usual)
        if gate.key == "tail_ms" or 0.0 < harm < 1.0:
            yield harm


def _with_harm(harms: HarmSettings, key: str, value: float) -> HarmSettings:
    kept = getattr(harms, key)
    return harms.model_copy(update={key: kept.model_copy(update={"harm": value})})


def _gates(setup: Setup) -> tuple[GateForecast, ...]:
    names = gate_names(first=False, comparable=setup.classes > 0)
    return tuple(_gate(name, setup) for name in names if name not in _SHADOW or setup.canary.shadow_requests)


def _gate(name: str, setup: Setup) -> GateForecast:
    supply, key = _supply(name, setup), _HARMS[name]
    stated, rule = getattr(setup.harms, key), rule_of(name, setup.judge)
    alarms = detection.samples_to_harm(
        _stream(name, setup),
        supply.baseline_at,
        _threshold(setup),
        at_least=_at_least(name, setup),
        available=supply.available,
    )
    needed, needed_90 = _quantile(alarms, 0.5), _quantile(alarms, SURE)
    return GateForecast(
        name,
        key,
        stated.usual,
        stated.harm,
        _unit(name),
        supply.available,
        supply.reachable,
        needed,
        needed_90,
        supply.minutes_at(needed),
        supply.minutes_at(needed_90),
        _at_step(name, needed_90, setup),
        float((alarms <= supply.available).mean()),
        not rule.dry_run,
    )


def _deciding(gates: tuple[GateForecast, ...]) -> tuple[GateForecast, ...]:
    """One gate a harm. Where none is better it is the later one, which sees what users see."""
    best: dict[str, GateForecast] = {}
    for gate in gates:
        if gate.counts and (gate.key not in best or gate.rank >= best[gate.key].rank):
            best[gate.key] = gate
    return tuple(best.values())


def _seen(name: str, setup: Setup, supply: Supply) -> float:
    return detection.seen_within(
        _stream(name, setup),
        supply.baseline_at,
        _threshold(setup),
        at_least=_at_least(name, setup),
        available=supply.available,
    )


def _threshold(setup: Setup) -> float:
    return log_threshold(gate_names(first=False, comparable=setup.classes > 0), setup.judge)


def _at_least(name: str, setup: Setup) -> int:
    """Samples before a gate says anything; one class gets its share of them."""
    least = rule_of(name, setup.judge).min_samples
    return least * setup.classes if name == "class disagreement" else least


def _stream(name: str, setup: Setup) -> Stream:
    stated, rule = getattr(setup.harms, _HARMS[name]), rule_of(name, setup.judge)
    makers: Mapping[str, Callable[[], Stream]] = {
        "disagreement": lambda: Above(stated.harm, rule.margin),
        "class disagreement": lambda: Above(stated.harm, rule.margin, setup.classes, rule.min_samples),
        "tail latency": lambda: Slower(
            stated.usual,
            stated.harm,
            setup.judge.tail.quantile,
            setup.judge.tail.factor,
            setup.judge.latency_objective_ms,
        ),
        "class mix": lambda: Worse(stated.usual, stated.harm, rule.margin, 2 * setup.classes),
        "accuracy": lambda: Lost(stated.usual, stated.harm, rule.margin),
    }
    return makers.get(name, lambda: Worse(stated.usual, stated.harm, rule.margin))()


def _unit(name: str) -> str:
    if name in _SHADOW:
        return "mirrored requests"
    return "labelled images" if name == "accuracy" else "canary requests"


def _quantile(alarms: Floats, share: float) -> int | None:
    value = float(np.quantile(alarms, share, method="higher"))
    return int(value) if math.isfinite(value) else None


def _at_step(name: str, samples: int | None, setup: Setup) -> tuple[float | None, ...]:
    rate = setup.traffic.requests_per_s
    if samples is None or _unit(name) != "canary requests":
        return tuple(None for _ in setup.canary.steps)
    return tuple(samples / (rate * step) / 60 for step in setup.canary.steps)


def _supply(name: str, setup: Setup) -> Supply:
    if name in _SHADOW:
        return mirrored(setup)
    return labelled(setup) if name == "accuracy" else served(setup)


def _recommend(setup: Setup, gates: tuple[GateForecast, ...]) -> tuple[Recommendation | None, tuple[str, ...]]:
    """The settings themselves where they do; else more samples, with the first steps left out where they are slow."""
    wanted = tuple(sorted((gate for gate in _deciding(gates) if gate.state != "silent"), key=lambda gate: gate.seen))
    if hopeless := [gate for gate in wanted if gate.needed_90 is None]:
        return None, tuple(f"a larger harm than {_names(gate)}: {_needs(gate)}" for gate in hopeless)
    for dropped in range(len(setup.canary.steps)):
        if found := _enough(setup, wanted, setup.canary.steps[dropped:]):
            return found, ()
    return None, tuple(_would_help(setup, wanted))


def _enough(setup: Setup, gates: tuple[GateForecast, ...], steps: tuple[float, ...]) -> Recommendation | None:
    """About the fewest samples with these steps that are enough for every gate, None if they do not come in time."""
    shadowed = max((gate.needed_90 or 0 for gate in gates if gate.name in _SHADOW and gate.state != "seen"), default=0)
    shadow = max(setup.canary.shadow_requests, _round_up(_RESERVE * shadowed) if shadowed else 0)

    def tried(samples: int) -> Setup:
        changes = {"steps": steps, "shadow_requests": shadow, "min_samples": samples}
        return replace(setup, canary=setup.canary.model_copy(update=changes))

    as_many = math.ceil(setup.canary.min_samples * len(setup.canary.steps) / len(steps))
    most = int(setup.traffic.requests_per_s * steps[0] * setup.deadline_s / _RESERVE)
    found = _fewest(lambda samples: _sees_all(tried(samples), gates), as_many if as_many <= most else 1, most)
    if found is None:
        return None
    minutes = sum(stage.seconds for stage in tried(found).stages) / 60
    return Recommendation(shadow, steps, found, minutes)


def _sees_all(setup: Setup, gates: tuple[GateForecast, ...]) -> bool:
    return all(stage.decides for stage in setup.stages) and all(
        _seen(gate.name, setup, _supply(gate.name, setup)) >= SURE for gate in gates
    )


def _fewest(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """A round number not far above the smallest from `low` to `high` that is enough, if there is one."""
    if low > high:
        return None
    if enough(low):
        return low
    if not enough(high):
        return None
    most = high
    for _ in range(_HALVINGS):
        middle = math.isqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return min(_round_up(_RESERVE * high), most)


def _round_up(value: float) -> int:
    """To two digits: nobody configures 1,637 requests."""
    unit: int = 10 ** max(0, math.floor(math.log10(max(value, 1.0))) - 1)
    return math.ceil(value / unit) * unit


def _would_help(setup: Setup, gates: tuple[GateForecast, ...]) -> Iterator[str]:
    """More traffic or a longer deadline, and more labelled images where those are what is missing."""
    rate, steps = setup.traffic.requests_per_s, setup.canary.steps
    needed = max((gate.needed_90 or 0 for gate in gates if _unit(gate.name) == "canary requests"), default=0)
    shadowed = max((gate.needed_90 or 0 for gate in gates if gate.name in _SHADOW), default=0)
    each = max(setup.canary.min_samples, _round_up(_RESERVE * needed / len(steps)))
    slowest = max(each / (rate * steps[0]), max(setup.canary.shadow_requests, _RESERVE * shadowed) / rate)
    if slowest > setup.deadline_s:
        more, longer = _round_up(rate * slowest / setup.deadline_s), _round_up(slowest)
        yield f"{each:,} requests a step are needed: {more:,} requests/s would bring them in time, {rate:g} do not"
        yield f"or a deadline of {longer:,} s a step, instead of {setup.deadline_s:,.0f} s"
    for gate in gates:
        if gate.name == "accuracy" and gate.state != "seen":
            yield (
                f"{gate.needed_90:,} labelled images that both versions answer before the deadlines show "
                f"{_names(gate)}; {gate.reachable:,} can be had"
            )


def _names(gate: GateForecast) -> str:
    return f"{gate.name} {shown(gate.key, gate.harm)} instead of {shown(gate.key, gate.usual)}"


def _needs(gate: GateForecast) -> str:
    if gate.needed_90 is None:
        return f"even {detection.MOST_SAMPLES:,} {gate.unit} would not show it"
    return f"{gate.needed_90:,} {gate.unit} would show it, {gate.reachable:,} can be had"


def _stage(stage: StagePlan) -> str:
    return "shadow stage" if stage.weight == 0 else f"step at {stage.weight:.0%} of the traffic"
