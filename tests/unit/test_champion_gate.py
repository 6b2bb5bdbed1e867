"""The champion's gate: floors, paired comparison, and what it says about them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from configs.areas import GateSettings
from configs.errors import IntegrityError
from ml.predictions import Predictions
from ml.results import ClassScore, Evaluation, ExportResult, SeverityScore, SourceScore
from tasks.report import views
from tasks.rollout.gate import against_champion, gate
from tasks.rollout.paired import Pairs, bootstrap_interval, compare, mcnemar, pair
from tasks.rollout.verdict import Decision, GateReading, Verdict

LIMITS = GateSettings()


def evaluation(accuracy: float = 0.95, **changes: object) -> Evaluation:
    names = ("healthy", "rust")
    classes = tuple(
        ClassScore(name=n, support=100, recall=accuracy, recall_low=0.9, recall_high=0.97, precision=0.9, f1=0.9)
        for n in names
    )
    return Evaluation(
        dataset="d", dataset_hash="x", split="test", holdout_hash="h", images=200, accuracy=accuracy,
        accuracy_low=0.9, accuracy_high=0.97, macro_f1=accuracy, missed_disease_rate=1 - accuracy, classes=classes,
        by_severity=(), confusion=((95, 5), (5, 95)), ece_before=0.06, ece_after=0.01, temperature=1.3,
        ood_threshold=0.0, ood_flagged_share=0.01, latency_p50_ms=0.5, mistakes=(), pictures=(),
    ).model_copy(update=changes)  # fmt: skip


def exported(**changes: object) -> ExportResult:
    values: dict[str, object] = {
        "onnx": "model.onnx", "sha256": "0" * 64, "size_bytes": 400_000, "opset": 20, "parity_images": 200,
        "parity_max_abs_diff": 1e-7, "parity_argmax_equal": True, "latency_p50_ms": 0.4, "latency_p99_ms": 0.9,
        "torch_latency_p50_ms": 1.0, "int8_considered": False, "int8_taken": False, "int8_reason": "",
    }  # fmt: skip
    return ExportResult.model_validate(values | changes)


def pairs(lost: int, won: int, both: int, neither: int = 0, *, diseased: bool = True) -> Pairs:
    """Images by what the two models made of them, each its own group; wrong answers to diseased ones were "healthy"."""
    challenger = np.repeat([False, True, True, False], [lost, won, both, neither])
    champion = np.repeat([True, False, True, False], [lost, won, both, neither])
    sick = np.full(len(champion), diseased)
    return Pairs(challenger, champion, challenger, champion, sick, np.arange(len(champion)))


def judged(seen: Pairs, **limits: object) -> Verdict:
    return gate(evaluation(), exported(), evaluation(), LIMITS.model_copy(update=limits), pairs=seen)


def reading(verdict: Verdict, name: str) -> GateReading:
    return next(r for r in verdict.readings if r.name == name)


# Floors ---------------------------------------------------------------------------------------------------------------


def test_a_good_challenger_passes_and_the_verdict_says_when_there_is_no_champion() -> None:
    verdict = gate(evaluation(), exported(), None, LIMITS)
    assert verdict.decision is Decision.advance
    assert any("no champion" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("model", "file", "word"),
    [
        ({"latency_p50_ms": 400.0}, {}, "one image takes 400.00 ms"),
        ({"ece_after": 0.3}, {}, "calibration error"),
        ({"accuracy": 0.5}, {}, "accuracy is 50.0%"),
        ({}, {"size_bytes": 600_000_000}, "600,000,000 bytes"),
        ({}, {"parity_max_abs_diff": 0.01}, "differ by 1.0e-02"),
        ({}, {"parity_argmax_equal": False}, "different classes"),
        ({"by_severity": (SeverityScore(low=0.0, high=0.2, images=60, accuracy=0.3),)}, {}, "0% to 20% 30.0% of 60"),
        ({"by_source": (SourceScore(name="farm_a", images=60, accuracy=0.3),)}, {}, "farm_a 30.0% of 60"),
    ],
    ids=["slow", "overconfident", "inaccurate", "large", "other numbers", "other classes", "severity", "source"],
)
def test_a_floor_stops_the_challenger_for_its_own_reason(
    model: dict[str, object], file: dict[str, object], word: str
) -> None:
    verdict = gate(evaluation(**model), exported(**file), None, LIMITS)
    assert verdict.decision is Decision.rollback
    assert word in verdict.reasons[0]
    assert sum(r.ok is False for r in verdict.readings) == 1


def test_every_class_below_the_floor_is_named_the_weakest_first() -> None:
    recalls = {"a": (0.4, 50), "b": (0.2, 50), "c": (0.9, 50), "d": (0.1, 3)}
    classes = tuple(
        ClassScore(name=n, support=s, recall=r, recall_low=0, recall_high=1, precision=1, f1=1)
        for n, (r, s) in recalls.items()
    )
    verdict = gate(evaluation(classes=classes), exported(), None, LIMITS)
    assert "b 20.0% of 50, a 40.0% of 50; at least 50.0%" in verdict.reasons[0]
    assert "not judged for lack of images: d 10.0% of 3" in verdict.reasons[0]
    assert reading(verdict, "recall").value == 0.2


def test_a_slice_with_too_few_images_is_reported_not_judged() -> None:
    bands = (SeverityScore(low=0.0, high=0.2, images=LIMITS.min_slice_images - 1, accuracy=0.0),)
    verdict = gate(evaluation(by_severity=bands), exported(), None, LIMITS)
    assert verdict.decision is Decision.advance
    assert reading(verdict, "severity").ok is None
    assert "needed to be judged" in reading(verdict, "severity").sentence


@pytest.mark.parametrize(
    "other", [{"holdout_hash": "other"}, {"classes": evaluation().classes[:1]}], ids=["holdout", "classes"]
)
def test_models_are_compared_only_on_the_same_holdout_and_classes(other: dict[str, object]) -> None:
    verdict = gate(evaluation(0.90), exported(), evaluation(0.99, **other), LIMITS)
    assert verdict.decision is Decision.advance
    assert any("other classes or saw another holdout" in reason for reason in verdict.reasons)


def test_a_comparable_champion_is_never_passed_over_in_silence() -> None:
    with pytest.raises(ValueError, match="pairs are needed"):
        gate(evaluation(), exported(), evaluation(), LIMITS)


def test_a_worn_holdout_warns_and_does_not_stop() -> None:
    fresh = gate(evaluation(), exported(), None, LIMITS, holdout_uses=LIMITS.max_holdout_uses)
    worn = gate(evaluation(), exported(), None, LIMITS, holdout_uses=LIMITS.max_holdout_uses + 1)
    assert not any("warning" in reason for reason in fresh.reasons)
    assert worn.decision is Decision.advance
    assert any("has decided 21 releases" in reason for reason in worn.reasons)


def test_the_report_knows_every_gate_by_name() -> None:
    model = evaluation(
        by_severity=(SeverityScore(low=0.0, high=0.2, images=60, accuracy=0.9),),
        by_source=(SourceScore(name="farm_a", images=60, accuracy=0.9),),
    )
    verdict = gate(model, exported(), model, LIMITS, pairs=pairs(1, 1, 198))
    shown = {row.gate for row in views.holdout_view(verdict).gates}
    assert shown.isdisjoint(r.name for r in verdict.readings)
    assert len(shown) == len(verdict.readings) == 13


# Against the champion -------------------------------------------------------------------------------------------------


def test_the_sentence_tells_what_happened_image_by_image() -> None:
    sentence = reading(judged(pairs(14, 9, 1100, 77)), "accuracy vs champion").sentence
    assert sentence.startswith(
        "accuracy 92.4% against the champion's 92.8%: lost 14 and won 9 of 1,200 images; "
        "difference \N{MINUS SIGN}0.4 points (95 % \N{MINUS SIGN}1.2 to +0.4), McNemar p = 0.40"
    )


def test_a_reading_carries_rates_with_the_champion_for_reference() -> None:
    verdict = judged(pairs(14, 9, 1100, 77))
    right, missed = reading(verdict, "accuracy vs champion"), reading(verdict, "missed disease vs champion")
    assert (right.value, right.reference) == (pytest.approx(1109 / 1200), pytest.approx(1114 / 1200))
    assert right.limit == pytest.approx(1114 / 1200 - LIMITS.accuracy_margin)
    assert missed.value == pytest.approx(1 - right.value)
    assert missed.limit == pytest.approx(1 - 1114 / 1200 + LIMITS.missed_disease_margin)
    for r in (right, missed):
        assert r.low is not None and r.high is not None
        assert 0 <= r.low < r.value < r.high <= 1


def test_a_loss_beyond_the_margin_fails_even_when_it_may_be_chance() -> None:
    verdict = judged(pairs(6, 3, 91))
    assert verdict.decision is Decision.rollback
    assert reading(verdict, "accuracy vs champion").ok is False
    assert reading(verdict, "accuracy by chance").ok is True


def test_a_proven_loss_fails_even_inside_the_margin() -> None:
    verdict = judged(pairs(90, 40, 9870))
    assert verdict.decision is Decision.rollback
    assert reading(verdict, "accuracy vs champion").ok is True
    assert reading(verdict, "accuracy by chance").ok is False


def test_non_inferiority_allows_a_proven_loss_inside_the_margin_and_wants_a_holdout_that_can_show_it() -> None:
    assert judged(pairs(90, 40, 9870), comparison="shown_not_worse").decision is Decision.advance
    small = judged(pairs(0, 0, 50), comparison="shown_not_worse")
    assert small.decision is Decision.rollback
    assert "cannot be ruled out" in small.reasons[0]


def test_diseases_taken_for_healthy_count_apart_from_accuracy() -> None:
    sick = np.arange(200) < 100
    right = np.full(200, True)
    wrong_kind = np.where(np.arange(200) < 10, False, right)
    seen = Pairs(right, right, wrong_kind, right, sick, np.arange(200))
    verdict = judged(seen)
    assert verdict.decision is Decision.rollback
    assert "missed disease 10.0% against the champion's 0.0%: lost 10 and won 0 of 100 diseased" in verdict.reasons[0]
    assert "difference +10.0 points" in verdict.reasons[0]


def test_without_a_healthy_class_nothing_is_said_about_missed_disease() -> None:
    names = {r.name for r in against_champion(pairs(1, 1, 98, diseased=False), LIMITS)}
    assert names == {"accuracy vs champion", "accuracy by chance"}


@settings(max_examples=50)
@given(right=st.lists(st.booleans(), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_a_challenger_equal_to_the_champion_passes_on_any_holdout(right: list[bool], seed: int) -> None:
    answers, sick = np.array(right), np.random.default_rng(seed).random(len(right)) < 0.5
    seen = Pairs(answers, answers, answers, answers, sick, np.arange(len(right)))
    assert all(r.ok for r in against_champion(seen, LIMITS))


@settings(max_examples=50)
@given(lost=st.integers(0, 60), won=st.integers(0, 60), more=st.integers(1, 20))
def test_losing_more_images_never_helps(lost: int, won: int, more: int) -> None:
    fewer = against_champion(pairs(lost, won, 200), LIMITS)
    worse = against_champion(pairs(lost + more, won, 200 - more), LIMITS)
    assert all(not b.ok or a.ok for a, b in zip(fewer, worse, strict=True))


# McNemar and the interval ---------------------------------------------------------------------------------------------


@given(lost=st.integers(0, 300), won=st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial_test_on_images_that_differ(lost: int, won: int) -> None:
    worse, differs = mcnemar(lost, won)
    n = max(lost + won, 1)
    assert worse == pytest.approx(binomtest(lost, n, alternative="greater").pvalue, rel=1e-9)
    assert differs == pytest.approx(min(1.0, binomtest(lost, n).pvalue) if lost + won else 1.0, rel=1e-9)


def test_mcnemar_of_many_images_keeps_its_digits() -> None:
    assert mcnemar(50_500, 49_500)[1] == pytest.approx(binomtest(50_500, 100_000).pvalue, rel=1e-6)
    assert mcnemar(100_000, 0)[0] == 0.0


@settings(max_examples=50)
@given(lost=st.integers(0, 40), won=st.integers(0, 40), both=st.integers(1, 100))
def test_exchanging_the_models_turns_the_comparison_around(lost: int, won: int, both: int) -> None:
    seen = pairs(lost, won, both)
    there = compare(seen.challenger_right, seen.champion_right, seen.group)
    back = compare(seen.champion_right, seen.challenger_right, seen.group)
    assert (there.lost, there.won, there.p_differs) == (back.won, back.lost, back.p_differs)
    assert there.difference == -back.difference
    # The same seed draws other resamples of the mirrored kinds: the ends agree up to the resampling's noise.
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.25 * (there.high - there.low))
    assert there.low <= there.difference <= there.high


@pytest.mark.parametrize("size", [1, 4], ids=["single images", "groups of four"])
def test_the_interval_covers_the_true_difference(size: int) -> None:
    """400 holdouts of 400 images; whole groups are lost or won. Binomial noise of the coverage: 1.1 points."""
    rng, groups = np.random.default_rng(7), 400 // size
    held = 0
    for seed in range(400):
        net = size * rng.choice([-1, 0, 1], groups, p=[0.08, 0.87, 0.05])
        low, high = bootstrap_interval(net, np.full(groups, size), seed=seed, resamples=1000)
        held += low <= 0.05 - 0.08 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_near_duplicates_are_one_vote() -> None:
    """Ten copies of one lost photo prove no more than the photo."""
    lost, won = np.zeros(10, dtype=bool), np.ones(10, dtype=bool)
    assert compare(lost, won, np.zeros(10, dtype=np.int64)).p_worse == 0.5
    assert compare(lost, won, np.arange(10)).p_worse == pytest.approx(0.5**10)


def test_ten_thousand_images_are_compared_in_a_blink() -> None:
    rng = np.random.default_rng(0)
    champion = rng.random(10_000) < 0.95
    challenger = np.where(rng.random(10_000) < 0.04, ~champion, champion)
    began = time.process_time()
    found = compare(challenger, champion, np.arange(10_000))
    assert time.process_time() - began < 0.5
    assert found.images == 10_000
    assert found == compare(challenger, champion, np.arange(10_000))


# Predictions ----------------------------------------------------------------------------------------------------------


def predictions(folder: Path, name: str, **changes: object) -> Predictions:
    columns: dict[str, object] = {
        "sha256": ["a", "b", "c"], "label": ["rust", "rust", "healthy"], "predicted": ["rust", "healthy", "healthy"],
        "group": ["g", "g", "h"],
    }  # fmt: skip
    pq.write_table(pa.table(columns | changes), folder / name)
    return Predictions.read(folder / name)


def test_predictions_are_joined_by_image_not_by_place(tmp_path: Path) -> None:
    ours = predictions(tmp_path, "ours")
    turned = {"sha256": ["c", "b", "a"], "label": ["healthy", "rust", "rust"], "predicted": ["rust", "rust", "rust"]}
    seen = pair(ours, predictions(tmp_path, "theirs", **turned), ("healthy",))
    assert seen.challenger_right.tolist() == [True, False, True]
    assert seen.champion_right.tolist() == [True, True, False]
    assert seen.challenger_caught.tolist() == [True, False, False]
    assert seen.diseased.tolist() == [True, True, False]
    assert seen.group[0] == seen.group[1] != seen.group[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"sha256": ["a", "b", "d"]}, "2 of them the same"), ({"label": ["rust", "mould", "healthy"]}, "labels")],
    ids=["images", "labels"],
)
def test_predictions_of_another_holdout_are_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        pair(predictions(tmp_path, "ours"), predictions(tmp_path, "theirs", **changes), ("healthy",))


def test_damaged_predictions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="no readable predictions"):
        Predictions.read(tmp_path / "cut")
    with pytest.raises(IntegrityError, match="no readable predictions"):
        Predictions.read(tmp_path / "missing")
    with pytest.raises(IntegrityError, match="names an image twice"):
        predictions(tmp_path, "twice", sha256=["a", "a", "b"])
