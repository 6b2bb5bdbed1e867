"""The planner: what a rollout can see is told before it starts, and is what the judge would do."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from configs.areas import CanarySettings, HarmSettings, JudgeSettings
from configs.settings import Settings
from flows.planning import coarse_shares, expected_traffic, measured_rate, rollout_warnings
from ml.version import Version
from tasks.cluster import Track, TrackCounters
from tasks.cluster.kubernetes.traffic import allocate, shares
from tasks.rollout import detection, planner
from tasks.rollout.detection import Above, Looks, Lost, Slower, Stream, Worse, samples_to_harm, seen_within
from tasks.rollout.planner import sentences, shown, smallest_seen
from tasks.rollout.policy import judge
from tasks.rollout.procedure import Plan
from tasks.rollout.supply import Setup, Traffic, labelled, mirrored, served
from tasks.rollout.verdict import Evidence, Paired, Stage
from tests.support.memory_cluster import MemoryCluster

JUDGE = JudgeSettings()
HARMS = HarmSettings()
THRESHOLD = math.log(10 / JUDGE.alpha)
CANARY = CanarySettings(shadow_requests=1000, steps=(0.05, 0.25, 0.5), min_samples=1000, deadline_s=600)
SETUP = Setup(CANARY, JUDGE, HARMS, Traffic(100.0, 20.0, 600))
ENOUGH = replace(SETUP, traffic=Traffic(100.0, 100.0, 600))
forecast = functools.lru_cache(planner.forecast)
outlook = functools.lru_cache(planner.outlook)
V1, V2 = Version.parse("v1.0.0"), Version.parse("v1.1.0")


def with_canary(setup: Setup, **changes: object) -> Setup:
    return replace(setup, canary=CanarySettings.model_validate(setup.canary.model_dump() | changes))


def with_harm(setup: Setup, **harms: float) -> Setup:
    values = HARMS.model_dump()
    for name, harm in harms.items():
        values[name]["harm"] = harm
    return replace(setup, harms=HarmSettings.model_validate(values))


def gate(setup: Setup, name: str) -> planner.GateForecast:
    return next(found for found in outlook(setup).gates if found.name == name)


def as_many(samples: detection.Ints) -> detection.Ints:
    return samples


# --- the simulation is the judge's own arithmetic


def reading(canary: Evidence, champion: Evidence, paired: Paired, name: str) -> float:
    verdict = judge(canary, champion, paired, Stage(0.5, 1, True, 0.0, 60.0, classes=8), JUDGE)
    found = next(gate for gate in verdict.readings if gate.name == name)
    assert found.log_evidence is not None
    return found.log_evidence


def test_the_evidence_that_is_simulated_is_the_one_the_judge_reads() -> None:
    errors = Worse(0.005, 0.05, JUDGE.errors.margin).evidence(40, 1000, 20, 4000)
    canary, champion = Evidence(requests=1000, errors=40), Evidence(requests=4000, errors=20)
    assert errors == pytest.approx(reading(canary, champion, Paired(), "errors"))
    differ = Above(0.6, JUDGE.disagreement.margin).evidence(120, 200)
    assert differ == pytest.approx(
        reading(Evidence(shadow_pairs=200, shadow_differ=120), champion, Paired(), "disagreement")
    )
    lost = Lost(0.96, 0.85, JUDGE.accuracy.margin).evidence(30, 5, 300)
    assert lost == pytest.approx(reading(canary, champion, Paired(300, 30, 5, 250), "accuracy"))


def test_one_class_alone_never_counts_for_more_than_the_judge_gives_it() -> None:
    one = Above(0.95, JUDGE.class_disagreement.margin, 8, 20).evidence(24, 25)
    pairs = {"rust": (25, 24)} | {f"class {i}": (25, 2) for i in range(7)}
    canary = Evidence(shadow_pairs=200, shadow_differ=38, shadow_by_class=pairs)
    assert one <= reading(canary, Evidence(), Paired(), "class disagreement") + 1e-9
    mix = Worse(0.125, 0.5, JUDGE.class_mix.margin, 16).evidence(150, 300, 130, 1000)
    ours = Evidence(requests=300, predictions=300, classes={"rust": 150, "healthy": 150})
    theirs = Evidence(requests=1000, predictions=1000, classes={"rust": 130, "healthy": 870})
    assert mix <= reading(ours, theirs, Paired(), "class mix") + 1e-9


@pytest.mark.parametrize(
    "stream",
    [
        Worse(0.005, 0.05, 0.001),
        Worse(0.125, 0.5, 0.2, 16),
        Above(0.6, 0.35),
        Lost(0.96, 0.85, 0.02),
        Slower(100.0, 1500.0, 0.99, 2.0, 250.0),
    ],
    ids=["worse", "one of many", "above", "lost", "slower"],
)
def test_no_look_is_skipped_that_would_have_shown_the_harm(stream: Stream) -> None:
    samples = np.array([20, 60, 150, 400, 1000])
    counts = stream.draw(np.random.default_rng(3), Looks(samples, 3 * samples), 12)
    bound = stream.bound(*counts)
    for rollout, look in np.ndindex(12, samples.size):
        assert bound[rollout, look] >= stream.evidence(*(count[rollout, look] for count in counts)) - 1e-9


def test_a_larger_harm_is_seen_with_fewer_samples_and_the_same_seed_says_the_same() -> None:
    def median(harm: float) -> float:
        stream = Worse(0.005, harm, 0.001)
        return float(np.median(samples_to_harm(stream, as_many, THRESHOLD, at_least=20, available=500)))

    assert median(0.2) < median(0.05) < median(0.02)
    assert median(0.05) == median(0.05)


def test_a_healthy_canary_is_called_harmful_no_more_often_than_alpha_allows() -> None:
    """At a threshold of 200:1 one rollout in 200; 400 rollouts show more than 8 with a probability of 0.001."""
    healthy = Worse(0.005, 0.005, 0.0)
    alarms = samples_to_harm(healthy, as_many, THRESHOLD, at_least=20, available=500, rollouts=400)
    assert np.isfinite(alarms).sum() <= 8


def test_no_harm_is_seen_before_a_gate_may_speak() -> None:
    total = Worse(0.005, 1.0, 0.001)
    assert seen_within(total, as_many, THRESHOLD, at_least=20, available=19) == 0.0
    assert seen_within(total, lambda n: 19 * n, THRESHOLD, at_least=20, available=40) == 1.0


# --- how samples come in


def test_the_baseline_has_the_rest_of_the_traffic_or_as_much_as_the_canary() -> None:
    canary = np.array([1000, 2000, 3000])
    assert served(SETUP).baseline_at(canary).tolist() == [19_000, 22_000, 23_000]
    assert served(replace(SETUP, baseline=True)).baseline_at(canary).tolist() == [1000, 2000, 3000]
    assert mirrored(SETUP).baseline_at(canary).tolist() == [1000, 2000, 3000]


def test_minutes_are_those_of_the_steps() -> None:
    supply = served(SETUP)
    assert supply.minutes_at(1000) == pytest.approx((10 + 200) / 60)
    assert supply.minutes_at(3000) == pytest.approx((10 + 200 + 40 + 20) / 60)
    assert supply.minutes_at(None) is None
    assert outlook(ENOUGH).minutes == pytest.approx(4.5)


def test_a_stage_that_is_late_ends_the_rollout() -> None:
    slow = replace(SETUP, traffic=Traffic(10.0))
    assert [stage.decides for stage in slow.stages] == [True, False, True, True]
    assert served(slow).available == 300


def test_an_image_is_a_pair_once_both_versions_have_answered_it() -> None:
    assert labelled(replace(SETUP, traffic=Traffic(100.0))).available == 0
    few = labelled(SETUP).available
    many = labelled(ENOUGH).available
    assert 0 < few < many <= 600


# --- what the plan says


def test_a_rollout_with_enough_traffic_sees_every_harm_and_says_nothing() -> None:
    plan = forecast(ENOUGH)
    assert plan.decides
    assert sentences(plan) == []
    assert plan.recommended is not None
    assert (plan.recommended.steps, plan.recommended.min_samples) == (CANARY.steps, CANARY.min_samples)


def test_half_of_the_rollouts_need_less_than_nine_tenths_do() -> None:
    for found in outlook(ENOUGH).gates:
        assert found.needed is not None
        assert found.needed_90 is not None
        assert found.needed <= found.needed_90


def test_too_few_requests_a_step_are_said_with_the_number_that_would_do() -> None:
    setup = with_canary(SETUP, shadow_requests=200, min_samples=40)
    plan = forecast(setup)
    assert plan.decides
    assert gate(setup, "errors").state == "missed"
    assert any(
        sentence.startswith("too few requests a step") and "errors 5%" in sentence for sentence in sentences(plan)
    )
    advice = plan.recommended
    assert advice is not None
    better = outlook(with_canary(setup, **{name: getattr(advice, name) for name in ("shadow_requests", "min_samples")}))
    assert all(found.seen >= 0.88 for found in better.deciding)


def test_a_step_without_traffic_cannot_decide_and_the_plan_says_what_would_help() -> None:
    plan = forecast(replace(SETUP, traffic=Traffic(0.1)))
    assert not plan.decides
    assert plan.recommended is None
    assert any("step at 5% of the traffic cannot decide" in sentence for sentence in sentences(plan))
    assert "requests/s would bring them in time, 0.1 do not" in plan.would_help[0]


def test_slow_first_steps_are_left_out_where_the_others_do() -> None:
    setup = replace(with_canary(SETUP, deadline_s=3600, min_samples=500), traffic=Traffic(0.5))
    plan = forecast(setup)
    assert plan.recommended is not None
    assert plan.recommended.steps == (0.25, 0.5)


def test_a_harm_inside_the_margin_is_never_seen() -> None:
    plan = forecast(with_harm(ENOUGH, errors=0.006))
    assert not plan.decides
    assert [found.name for found in plan.blind] == ["errors"]
    assert "even 1,000,000 canary requests would not show it" in plan.would_help[0]


def test_a_small_loss_of_accuracy_asks_for_more_labelled_images() -> None:
    plan = forecast(with_harm(ENOUGH, accuracy=0.93))
    assert [found.name for found in plan.blind] == ["accuracy"]
    assert "labelled images" in plan.would_help[0]


def test_a_gate_that_only_reports_cannot_spoil_a_plan() -> None:
    silent = JUDGE.model_copy(update={"accuracy": JUDGE.accuracy.model_copy(update={"dry_run": True})})
    setup = with_harm(replace(ENOUGH, judge=silent), accuracy=0.93)
    assert gate(setup, "accuracy").state == "cannot"
    assert outlook(setup).decides


def test_a_gate_that_does_not_roll_back_still_stops_a_promotion_and_is_planned_for() -> None:
    gentle = JUDGE.model_copy(update={"errors": JUDGE.errors.model_copy(update={"critical": False})})
    assert not outlook(with_harm(replace(ENOUGH, judge=gentle), errors=0.006)).decides


def test_without_labelled_images_accuracy_is_said_to_be_unjudged() -> None:
    plan = outlook(replace(SETUP, traffic=Traffic(100.0)))
    assert plan.decides
    assert sentences(plan) == ["accuracy is not judged: no labelled images are sent (replay.enabled)"]


def test_versions_with_other_classes_are_not_compared_by_their_answers() -> None:
    names = {found.name for found in outlook(replace(ENOUGH, classes=0)).gates}
    assert names == {"shadow errors", "shadow slow", "errors", "slow", "tail latency", "ood"}


def test_without_a_shadow_stage_nothing_is_mirrored() -> None:
    assert "disagreement" not in {found.name for found in outlook(with_canary(ENOUGH, shadow_requests=0)).gates}


def test_extensions_of_the_deadline_count() -> None:
    assert with_canary(SETUP, undecided="extend", max_extensions=2).deadline_s == 1800


def test_a_larger_harm_that_is_seen_instead_is_named() -> None:
    setup = with_canary(SETUP, shadow_requests=200, min_samples=40)
    found = gate(setup, "errors")
    larger = smallest_seen(setup, found)
    assert larger is not None
    assert found.harm < larger < 0.3
    assert shown("errors", 0.02) == "2%"
    assert shown("tail_ms", 1500.0) == "1,500 ms"


def test_traffic_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="is no traffic"):
        Traffic(10.0, 20.0)


# --- before a release


class Counting(MemoryCluster):
    """A cluster whose stable track has answered more requests at every look."""

    looks = 0

    def counters(self) -> Mapping[Track, TrackCounters]:
        self.looks += 1
        since = datetime(2026, 1, 1, tzinfo=UTC)
        return {Track.stable: TrackCounters(V1, since, 30 * self.looks, 0, {})}


def plan_of(champion: Version | None) -> Plan:
    return Plan(V2, champion, (0.0, 0.05, 0.25, 0.5), 1, 1, 8)


def test_a_release_measures_its_traffic_and_says_what_it_cannot_see() -> None:
    settings = Settings(replay={"enabled": False}, canary=CANARY.model_dump() | {"deadline_s": 60})
    assert measured_rate(Counting(), 2.0, clock=iter([0.0, 3.0]).__next__, sleep=lambda _: None) == 10.0
    found = rollout_warnings(settings, Counting(), plan_of(V1), seconds=0.01)
    assert any("no labelled images" in sentence for sentence in found)
    assert rollout_warnings(settings, Counting(), plan_of(None)) == []


class WholePods(Counting):
    """Splits traffic as pods behind a Service do."""

    def reachable(self, weights: Mapping[Track, float], replicas: Mapping[Track, int]) -> Mapping[Track, float]:
        return shares(allocate(replicas, weights))


def test_a_plan_says_what_its_steps_become_where_traffic_is_split_by_whole_replicas() -> None:
    assert coarse_shares(Counting(), plan_of(V1)) == []
    [sentence] = coarse_shares(WholePods(), replace(plan_of(V1), replicas=3))
    assert "5% becomes 25%, 25% becomes 25%, 50% becomes" in sentence


def test_the_replayer_is_part_of_the_traffic() -> None:
    assert expected_traffic(Settings(replay={"rate_per_s": 20.0}), 5.0) == Traffic(25.0, 20.0, 512)
    assert expected_traffic(Settings(replay={"enabled": False}), 0.0) is None
