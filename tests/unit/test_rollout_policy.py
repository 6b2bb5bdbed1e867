"""The judge and the gate: counts in, verdicts out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.areas import JudgeSettings
from tasks.rollout.policy import Decision, Evidence, Stage, binomial_tail, judge

LIMITS = JudgeSettings()
CHAMPION = Evidence(requests=2000, errors=4, slow=10, probes=2000, probes_correct=1880, p50_ms=4, p99_ms=20)


def stage(**changes: object) -> Stage:
    values: dict[str, object] = {"weight": 0.05, "needed": 40, "last": False, "elapsed_s": 5.0, "deadline_s": 300.0}
    return Stage(**(values | changes))  # type: ignore[arg-type]


def healthy(n: int) -> Evidence:
    return Evidence(requests=n, probes=n, probes_correct=round(n * 0.94), p50_ms=4, p99_ms=20)


def test_a_healthy_canary_advances_and_in_the_last_step_is_promoted() -> None:
    assert judge(healthy(60), CHAMPION, stage(), LIMITS, comparable=True).decision is Decision.advance
    assert judge(healthy(60), CHAMPION, stage(last=True), LIMITS, comparable=True).decision is Decision.promote


def test_too_few_samples_wait_and_after_the_deadline_are_inconclusive() -> None:
    assert judge(healthy(10), CHAMPION, stage(), LIMITS, comparable=True).decision is Decision.wait
    late = judge(healthy(10), CHAMPION, stage(elapsed_s=301), LIMITS, comparable=True)
    assert late.decision is Decision.inconclusive
    assert "10 of the 40" in late.reasons[0]


def test_what_was_seen_before_the_step_does_not_count_for_it() -> None:
    verdict = judge(healthy(60), CHAMPION, stage(seen_before=50), LIMITS, comparable=True)
    assert verdict.decision is Decision.wait


@pytest.mark.parametrize(
    ("canary", "word"),
    [
        (Evidence(requests=100, errors=10), "with an error"),
        (Evidence(requests=100, slow=90), "slower than 250 ms"),
        (Evidence(requests=100, probes=100, probes_correct=12), "labelled probes"),
    ],
    ids=["ten percent errors", "slow", "wrong"],
)
def test_a_bad_canary_is_rolled_back_for_its_own_reason(canary: Evidence, word: str) -> None:
    verdict = judge(canary, CHAMPION, stage(), LIMITS, comparable=True)
    assert verdict.decision is Decision.rollback
    assert len(verdict.reasons) == 1
    assert word in verdict.reasons[0]


def test_one_unlucky_request_in_forty_is_no_failure() -> None:
    verdict = judge(Evidence(requests=40, errors=1), CHAMPION, stage(), LIMITS, comparable=True)
    assert verdict.decision is Decision.advance


def test_total_failure_ends_the_canary_before_its_samples_are_complete() -> None:
    canary = Evidence(requests=20, errors=20)
    assert judge(canary, CHAMPION, stage(needed=500), LIMITS, comparable=True).decision is Decision.rollback


def test_shadow_sees_another_model_by_its_answers() -> None:
    canary = Evidence(shadow_pairs=200, shadow_differ=190)
    verdict = judge(canary, Evidence(), stage(weight=0.0, needed=200), LIMITS, comparable=True)
    assert verdict.decision is Decision.rollback
    assert "another answer than the champion" in verdict.reasons[0]


def test_models_that_know_other_classes_are_not_compared() -> None:
    canary = Evidence(shadow_pairs=200, shadow_differ=200)
    verdict = judge(canary, Evidence(), stage(weight=0.0, needed=200), LIMITS, comparable=False)
    assert verdict.decision is Decision.advance


def test_without_a_champion_the_floor_decides() -> None:
    bad = Evidence(requests=100, probes=100, probes_correct=50)
    verdict = judge(bad, Evidence(), stage(weight=1.0, last=True, floor=0.8), LIMITS, comparable=False)
    assert verdict.decision is Decision.rollback
    assert "20.0% is the limit" in verdict.reasons[0]


@given(n=st.integers(1, 400), k=st.integers(0, 400), p=st.floats(0.001, 0.999))
def test_the_binomial_tail_is_the_sum_of_its_terms(n: int, k: int, p: float) -> None:
    k = min(k, n)
    direct = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    assert binomial_tail(k, n, p) == pytest.approx(min(direct, 1.0), rel=1e-9, abs=1e-300)


@given(n=st.integers(40, 2000), errors=st.integers(0, 2000))
def test_more_errors_never_help(n: int, errors: int) -> None:
    errors = min(errors, n - 1)
    fewer = judge(Evidence(requests=n, errors=errors), CHAMPION, stage(), LIMITS, comparable=False)
    more = judge(Evidence(requests=n, errors=errors + 1), CHAMPION, stage(), LIMITS, comparable=False)
    assert not (fewer.decision is Decision.rollback and more.decision is not Decision.rollback)
