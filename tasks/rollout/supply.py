"""How samples come in during a rollout: stages, the traffic they get, and what both sides have by when. Pure."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from configs.areas import CanarySettings, HarmSettings, JudgeSettings
from tasks.rollout.detection import MOST_SAMPLES, Floats, Ints

_TIMES: Final = 400


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests a second at the gateway during the rollout. `labelled_per_s` of them are photos whose class is known,
    `images` different ones, sent in turn."""

    requests_per_s: float
    labelled_per_s: float = 0.0
    images: int = 0

    def __post_init__(self) -> None:
        if self.requests_per_s <= 0 or not 0 <= self.labelled_per_s <= self.requests_per_s:
            raise ValueError(f"{self} is no traffic")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: canary samples it needs and seconds until they are there."""

    weight: float
    samples: int
    seconds: float
    deadline_s: float

    @property
    def decides(self) -> bool:
        """Whether the samples are there before the deadline."""
        return self.seconds <= self.deadline_s

    @property
    def collected(self) -> int:
        """Samples when the stage ends, by itself or by its deadline."""
        return int(self.samples * min(1.0, self.deadline_s / self.seconds))


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything a plan depends on. `classes`: how many both versions know, 0 where answers cannot be compared;
    `baseline`: the champion runs once more beside the canary and gets as much traffic."""

    canary: CanarySettings
    judge: JudgeSettings
    harms: HarmSettings
    traffic: Traffic
    classes: int = 8
    baseline: bool = False

    @property
    def deadline_s(self) -> float:
        """Time one step may take, extensions included."""
        extensions = self.canary.max_extensions if self.canary.undecided == "extend" else 0
        return float(self.canary.deadline_s * (1 + extensions))

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """The stages in their order; the shadow stage has weight 0 and sees every request."""
        shares = ((0.0, self.canary.shadow_requests),) if self.canary.shadow_requests else ()
        wanted = (*shares, *((step, self.canary.min_samples) for step in self.canary.steps))
        return tuple(
            StagePlan(weight, samples, samples / (self.traffic.requests_per_s * (weight or 1.0)), self.deadline_s)
            for weight, samples in wanted
        )


@dataclass(frozen=True, slots=True)
class Supply:
    """How samples come in: seconds since the start, and by then samples of the canary and of its baseline, the last
    stage going on for as long as it takes. `available`: the canary's when the rollout ends; `reachable`: those it
    could have if each step used its whole deadline."""

    seconds: Floats
    canary: Floats
    baseline: Floats
    available: int
    reachable: int

    def baseline_at(self, samples: Ints) -> Ints:
        """Samples of the baseline when the canary has so many."""
        return np.interp(samples, self.canary, self.baseline).astype(np.int64)

    def minutes_at(self, samples: float | None) -> float | None:
        """Minutes from the start of the rollout until the canary has so many; None: never."""
        if samples is None or samples > self.canary[-1]:
            return None
        return float(np.interp(samples, self.canary, self.seconds)) / 60


def mirrored(setup: Setup) -> Supply:
    """Every request is mirrored, and answered by the champion too."""
    rate, end = setup.traffic.requests_per_s, float(MOST_SAMPLES)
    samples = np.array([0.0, end])
    return Supply(samples / rate, samples, samples, begun(setup)[0].collected, int(rate * setup.deadline_s))


def begun(setup: Setup) -> tuple[StagePlan, ...]:
    """The stages that are begun: one that is not decided in time is the last."""
    decided = list(itertools.takewhile(lambda stage: stage.decides, setup.stages))
    return setup.stages[: len(decided) + 1]


def served(setup: Setup) -> Supply:
    """Canary requests step by step; the baseline has its own track, or is all the rest of the traffic."""
    rate, stages = setup.traffic.requests_per_s, setup.stages
    last = replace(stages[-1], samples=MOST_SAMPLES)
    legs = [stage for stage in (*stages[:-1], last) if stage.weight > 0]
    added = np.array([float(leg.samples) for leg in legs])
    weights = np.array([leg.weight for leg in legs])
    beside = np.minimum(weights, 1.0 - weights) if setup.baseline else 1.0 - weights
    began = sum(stage.seconds for stage in stages if stage.weight == 0)
    return Supply(
        began + np.append(0.0, (added / (rate * weights)).cumsum()),
        np.append(0.0, added.cumsum()),
        np.append(0.0, (added / weights * beside).cumsum()),
        sum(stage.collected for stage in begun(setup) if stage.weight > 0),
        int(sum(rate * step * setup.deadline_s for step in setup.canary.steps)),
    )


def labelled(setup: Setup) -> Supply:
    """Images that both versions answered: each is sent once in a cycle, and answered by one version at a time."""
    planned = [(stage.weight, min(stage.seconds, stage.deadline_s)) for stage in begun(setup)]
    longest = [(stage.weight, stage.deadline_s) for stage in setup.stages]
    times = np.linspace(0.0, sum(seconds for _, seconds in longest), _TIMES)
    stretched = [*planned[:-1], (planned[-1][0], float(times[-1]))]
    pairs = np.array([_pairs(_until(stretched, float(now)), setup.traffic) for now in times])
    available, reachable = (int(_pairs(legs, setup.traffic)) for legs in (planned, longest))
    return Supply(times, pairs, pairs, available, reachable)


def _until(legs: list[tuple[float, float]], now: float) -> list[tuple[float, float]]:
    cut, left = [], now
    for weight, seconds in legs:
        cut.append((weight, min(seconds, left)))
        left -= cut[-1][1]
    return cut


def _pairs(legs: list[tuple[float, float]], traffic: Traffic) -> float:
    """Images that the canary answered at least once and the champion too, where who answers is drawn anew each time."""
    if not traffic.images:
        return 0.0
    per_second = traffic.labelled_per_s / traffic.images
    unseen = [(_never(w, per_second * seconds), _never(1.0 - w, per_second * seconds)) for w, seconds in legs]
    canary, champion = (1.0 - math.prod(side) for side in zip(*unseen, strict=True))
    return float(traffic.images * canary * champion)


def _never(share: float, cycles: float) -> float:
    """Probability that a version with this share of the traffic answered an image in none of so many cycles."""
    part, whole = math.modf(cycles)
    return math.pow(1.0 - share, whole) * (1.0 - part * share)
