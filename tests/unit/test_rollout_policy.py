"""The canary's judge: what it decides on counts, why it says so, and what it does without any."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.areas import GateRule, JudgeSettings
from tasks.rollout.anytime import Rate
from tasks.rollout.gates import gate_names, log_threshold, rule_of
from tasks.rollout.policy import judge
from tasks.rollout.verdict import Decision, Evidence, GateReading, Paired, Stage, Verdict

LIMITS = JudgeSettings()
CLASSES = ("healthy", "early_blight", "late_blight", "mold")
ALL = gate_names(first=False, comparable=True)


def side(requests: int, **changes: object) -> Evidence:
    """A healthy version's counts: no errors, all quick, four classes alike."""
    quick = {10.0: requests, 250.0: requests, 1000.0: requests, math.inf: requests}
    mix = dict.fromkeys(CLASSES, requests // 4)
    plain = Evidence(requests=requests, predictions=requests, classes=mix, latency=quick)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def slow_latency(requests: int, slow: int) -> dict[float, int]:
    return {10.0: requests - slow, 250.0: requests - slow, 1000.0: requests, math.inf: requests}


def stage(**changes: object) -> Stage:
    given = {"weight": 0.25, "needed": 40, "last": False, "elapsed_s": 10.0, "deadline_s": 300.0, "classes": 4}
    return Stage(**{**given, **changes})  # type: ignore[arg-type]


def ask(
    canary: Evidence, *, paired: Paired | None = None, limits: JudgeSettings = LIMITS, **changes: object
) -> Verdict:
    return judge(canary, side(2000), paired or Paired(), stage(**changes), limits)


def gate(verdict: Verdict, name: str) -> GateReading:
    return next(reading for reading in verdict.readings if reading.name == name)


# Decisions --------------------------------------------------------------------------------------------------------


def test_a_healthy_canary_advances_and_is_promoted_at_the_last_step() -> None:
    assert ask(side(60)).decision is Decision.advance
    assert ask(side(60), last=True).decision is Decision.promote


def test_too_few_samples_mean_wait_and_past_the_deadline_inconclusive() -> None:
    assert ask(side(10)).decision is Decision.wait
    late = ask(side(10), elapsed_s=301.0)
    assert late.decision is Decision.inconclusive
    assert "10 of the 40 requests" in late.reasons[0]
    assert "deadline of 300 s" in late.reasons[0]


def test_a_step_counts_only_its_own_samples() -> None:
    assert ask(side(60), seen_before=50).decision is Decision.wait


BAD = {
    "errors": (side(200, errors=20), None, 0.25),
    "slow": (side(200, slow=80, latency=slow_latency(200, 80)), None, 0.25),
    "tail latency": (side(800, slow=36, latency=slow_latency(800, 36)), None, 0.25),
    "ood": (side(400, ood=120), None, 0.25),
    "class mix": (side(400, classes={"healthy": 250, "early_blight": 50, "late_blight": 50, "mold": 50}), None, 0.25),
    "accuracy": (side(300), Paired(pairs=300, losses=45, wins=3, both=240), 0.25),
    "disagreement": (Evidence(shadow_pairs=100, shadow_differ=70), None, 0.0),
    "class disagreement": (
        Evidence(shadow_pairs=400, shadow_differ=30, shadow_by_class={"mold": (30, 30), "healthy": (370, 0)}),
        None,
        0.0,
    ),
    "shadow errors": (Evidence(shadow_pairs=150, shadow_errors=25), None, 0.0),
    "shadow slow": (Evidence(shadow_pairs=150, shadow_slow=90), None, 0.0),
}


@pytest.mark.parametrize("name", BAD)
def test_harm_is_seen_by_the_gate_that_is_for_it_and_by_no_other(name: str) -> None:
    canary, paired, weight = BAD[name]
    verdict = ask(canary, paired=paired, weight=weight, needed=10_000)
    assert verdict.decision is Decision.rollback
    # Many slow answers lie in the tail too.
    expected = [name, "tail latency"] if name == "slow" else [name]
    assert [reading.name for reading in verdict.readings if reading.ok is False] == expected
    assert verdict.reasons == tuple(gate(verdict, one).sentence for one in expected)


def test_every_gate_has_a_case_above() -> None:
    assert set(BAD) == set(ALL)


def test_one_bad_request_is_no_failure() -> None:
    assert ask(side(40, errors=1)).decision is Decision.advance


def test_the_baseline_track_is_what_users_requests_are_compared_with() -> None:
    """The whole platform fails a tenth of the requests to young replicas: that is not the canary's fault."""
    canary, young = side(400, errors=40), side(400, errors=38)
    alone = judge(canary, side(4000), Paired(), stage(), LIMITS)
    beside = judge(canary, side(4000), Paired(), stage(), LIMITS, baseline=young)
    assert alone.decision is Decision.rollback
    assert beside.decision is Decision.advance
    assert beside.evidence["baseline_errors"] == 38


def test_without_common_classes_only_the_alike_gates_are_read() -> None:
    verdict = ask(Evidence(shadow_pairs=300, shadow_differ=300), weight=0.0, needed=200, classes=0)
    assert verdict.decision is Decision.advance
    assert [reading.name for reading in verdict.readings] == list(gate_names(first=False, comparable=False))


def test_weak_harm_in_several_gates_is_harm_together() -> None:
    """No gate reaches 200:1, their mean reaches 20:1."""
    canary = side(300, errors=5, ood=50)
    paired = Paired(pairs=200, losses=23, wins=4, both=160)
    verdict = ask(canary, paired=paired, needed=10_000)
    alone = [reading for reading in verdict.readings if reading.ok is False]
    assert alone == []
    assert verdict.decision is Decision.rollback
    assert "all together do" in verdict.reasons[0]


# First version ----------------------------------------------------------------------------------------------------


def first(right: int, **changes: object) -> Verdict:
    paired = Paired(pairs=100, both=right)
    return judge(side(100, **changes), Evidence(), paired, stage(weight=1.0, last=True, floor=0.8), LIMITS)


def test_a_first_version_is_held_to_fixed_limits() -> None:
    assert first(90).decision is Decision.promote
    assert "labelled images; 20.0% is the limit" in first(50).reasons[0]
    assert first(90, errors=30).decision is Decision.rollback
    assert first(90, slow=60, latency=slow_latency(100, 60)).decision is Decision.rollback


# Hard guards ------------------------------------------------------------------------------------------------------


def test_twenty_failures_in_a_row_end_it_whatever_came_before() -> None:
    verdict = ask(side(100_000, errors=20), needed=200_000, recent=Rate(20, 20))
    assert verdict.decision is Decision.rollback
    assert "each of its last 20 requests" in verdict.reasons[0]
    assert ask(side(100_000, errors=20), needed=200_000, recent=Rate(19, 20)).decision is Decision.wait
    assert ask(side(100_000, errors=19), needed=200_000, recent=Rate(19, 19)).decision is Decision.wait


def test_a_canary_without_a_ready_replica_ends_at_once() -> None:
    verdict = ask(side(5), ready=False)
    assert verdict.decision is Decision.rollback
    assert "no replica" in verdict.reasons[0]


# Rules of a gate --------------------------------------------------------------------------------------------------


def test_a_dry_run_gate_is_reported_and_not_counted() -> None:
    limits = LIMITS.model_copy(update={"errors": GateRule(margin=0.001, dry_run=True)})
    verdict = ask(side(200, errors=20), limits=limits)
    assert verdict.decision is Decision.advance
    assert gate(verdict, "errors").ok is False
    assert gate(verdict, "errors").dry_run
    assert log_threshold(ALL, limits) == pytest.approx(math.log(8 / 0.05)), "errors and shadow errors share a rule"


def test_a_gate_that_is_not_critical_stops_the_promotion_and_undoes_nothing() -> None:
    limits = LIMITS.model_copy(update={"errors": GateRule(margin=0.001, critical=False)})
    assert ask(side(200, errors=20), limits=limits, needed=300).decision is Decision.wait
    verdict = ask(side(200, errors=20), limits=limits)
    assert verdict.decision is Decision.inconclusive
    assert "with an error" in verdict.reasons[0]


def test_below_its_minimum_a_gate_says_nothing() -> None:
    limits = LIMITS.model_copy(update={"errors": GateRule(margin=0.001, min_samples=500)})
    verdict = ask(side(200, errors=20), limits=limits)
    assert verdict.decision is Decision.advance
    assert gate(verdict, "errors").ok is None


def test_no_traffic_at_all_is_no_evidence() -> None:
    for canary, champion in ((Evidence(), Evidence()), (side(100), Evidence()), (Evidence(), side(100))):
        verdict = judge(canary, champion, Paired(), stage(needed=1000), LIMITS)
        assert verdict.decision is Decision.wait
        assert {reading.ok for reading in verdict.readings} <= {None, True}


def test_every_gate_has_its_rule_and_an_equal_share_of_alpha() -> None:
    assert [rule_of(name, LIMITS).margin >= 0 for name in ALL] == [True] * 10
    assert log_threshold(ALL, LIMITS) == pytest.approx(math.log(10 / 0.05))


# What it says -----------------------------------------------------------------------------------------------------


def test_the_sentence_is_one_that_a_tired_person_understands() -> None:
    verdict = judge(side(2318, errors=95), side(40_000, errors=160), Paired(), stage(needed=5000), LIMITS)
    assert verdict.sentence == (
        "rolled back: the canary answered 4.1% of 2,318 requests with an error, the baseline 0.4%; "
        "evidence over 1,000,000:1 against a threshold of 200:1"
    )


def test_a_verdict_that_ends_something_encloses_the_true_values() -> None:
    ended = gate(ask(side(200, errors=20)), "errors")
    assert ended.low is not None and ended.high is not None
    assert ended.low < 0.1 < ended.high
    assert gate(ask(side(10)), "errors").low is None, "milliseconds a gate are not spent on every look"


def test_a_verdict_is_json_whatever_it_holds() -> None:
    text = json.dumps(ask(Evidence(), needed=1).to_json(), allow_nan=False)
    back = json.loads(text)
    assert back["decision"] == "continue"
    assert [row["name"] for row in back["gates"]] == list(ALL)


# Properties -------------------------------------------------------------------------------------------------------

counts = st.integers(0, 5000)


@st.composite
def canaries(draw: st.DrawFn) -> Evidence:
    requests = draw(counts)
    slow, pairs = draw(st.integers(0, requests)), draw(counts)
    return side(
        requests,
        errors=draw(st.integers(0, requests)),
        slow=slow,
        latency=slow_latency(requests, slow),
        ood=draw(st.integers(0, requests)),
        shadow_pairs=pairs,
        shadow_differ=draw(st.integers(0, pairs)),
        shadow_errors=draw(counts),
    )


@given(canaries(), canaries(), st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_it_never_says_nan_and_always_decides(one: Evidence, two: Evidence, lost: int, won: int, both: int) -> None:
    verdict = judge(one, two, Paired(lost + won + both, lost, won, both), stage(), LIMITS)
    assert verdict.decision in Decision
    for reading in verdict.readings:
        assert reading.log_evidence is not None
        assert not math.isnan(reading.log_evidence)
        assert not math.isnan(reading.value)


@given(canaries(), st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_more_errors_never_help(canary: Evidence, more: int) -> None:
    worse = dataclasses.replace(canary, errors=min(canary.requests, canary.errors + more))
    before, after = (gate(ask(one, needed=10**9), "errors").log_evidence for one in (canary, worse))
    assert before is not None and after is not None
    assert after >= before - 1e-9
