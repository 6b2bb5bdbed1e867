"""Labels that arrive after a promotion: when they call for the version before it, and which files of them are read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from configs.areas import ReviewSettings
from configs.errors import ConfigError
from tasks.feedback.labels import Answer, Label, read_labels
from tasks.rollout.anytime import Rate
from tasks.rollout.late import ACCURACY, CLASS_ACCURACY, PROMISE, Labelled, Promise, Window, judge_late
from tasks.rollout.verdict import Decision, GateReading, Verdict

NOW = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
LIMITS = ReviewSettings()
KEPT = Promise(accuracy=0.94, classes=8)


def labelled(version: str, wrong: int, total: int, classes: int = 4) -> Labelled:
    """Wrong answers spread evenly over the classes."""
    parts = [
        (wrong // classes + (i < wrong % classes), total // classes + (i < total % classes)) for i in range(classes)
    ]
    return Labelled(version, {f"class-{i}": Rate(*part) for i, part in enumerate(parts)})


def judged(current: Labelled, previous: Labelled | None, promise: Promise = KEPT, *, closed: bool = False) -> Verdict:
    return judge_late(current, previous, promise, LIMITS, closed=closed)


def harmful(current: Labelled, previous: Labelled, promise: Promise) -> bool:
    verdict = judge_late(current, previous, promise, LIMITS, closed=False, intervals=False)
    return verdict.decision is Decision.rollback


def reading(verdict: Verdict, name: str) -> GateReading:
    return next(reading for reading in verdict.readings if reading.name == name)


# The judge ------------------------------------------------------------------------------------------------------------


def test_a_version_that_is_wrong_much_more_often_than_the_one_before_it_is_harmful() -> None:
    verdict = judged(labelled("v1.1.0", 100, 400), labelled("v1.0.0", 24, 400))
    assert verdict.decision is Decision.rollback
    assert "v1.1.0 was wrong in 25.0% of 400 labelled answers, v1.0.0 before it in 6.0% of 400" in verdict.sentence
    assert "other days and other photos, so not a trial" in verdict.sentence
    overall = reading(verdict, ACCURACY)
    assert overall.log_evidence is not None
    assert overall.log_threshold is not None
    assert overall.log_evidence >= overall.log_threshold
    assert overall.low is not None
    assert overall.low > LIMITS.accuracy_margin
    assert verdict.evidence["current_wrong"] == 100


@pytest.mark.parametrize(("closed", "decision"), [(False, Decision.wait), (True, Decision.promote)])
def test_a_version_as_good_as_the_one_before_it_keeps_its_place(closed: bool, decision: Decision) -> None:
    verdict = judged(labelled("v1.1.0", 25, 400), labelled("v1.0.0", 24, 400), closed=closed)
    assert verdict.decision is decision
    assert all(reading.ok for reading in verdict.readings)


@pytest.mark.parametrize(("closed", "decision"), [(False, Decision.wait), (True, Decision.inconclusive)])
def test_too_few_labels_decide_nothing_however_bad_they_are(closed: bool, decision: Decision) -> None:
    verdict = judged(labelled("v1.1.0", 40, LIMITS.min_samples - 1), labelled("v1.0.0", 0, 400), closed=closed)
    assert verdict.decision is decision
    assert "49 labelled answers of v1.1.0 are too few" in verdict.sentence


@pytest.mark.parametrize("previous", [None, Labelled("v1.0.0"), labelled("v1.0.0", 0, 300)], ids=["none", "0", "300"])
def test_no_labels_at_all_are_no_harm(previous: Labelled | None) -> None:
    verdict = judged(Labelled("v1.1.0"), previous)
    assert verdict.decision is Decision.wait
    assert all(reading.ok is None for reading in verdict.readings)
    assert verdict.to_json()["gates"][0]["log_evidence"] in (None, 0.0)


def test_harm_to_one_class_is_seen_where_the_others_hide_it() -> None:
    rates = {f"class-{i}": Rate(5, 250) for i in range(7)}
    current = Labelled("v1.1.0", {**rates, "rust": Rate(30, 60)})
    previous = Labelled("v1.0.0", {**rates, "rust": Rate(2, 60)})
    verdict = judged(current, previous)
    assert verdict.decision is Decision.rollback
    assert reading(verdict, ACCURACY).ok
    assert "of the photos of rust v1.1.0 got 50.0% of 60 wrong, v1.0.0 before it 3.3% of 60" in verdict.sentence


def test_a_field_that_became_harder_for_both_is_no_reason_to_return() -> None:
    verdict = judged(labelled("v1.1.0", 120, 400), labelled("v1.0.0", 118, 400))
    assert verdict.decision is Decision.inconclusive
    assert "a return would not help: v1.0.0 is not shown to be better" in verdict.sentence
    assert reading(verdict, PROMISE).ok is False
    assert not reading(verdict, PROMISE).critical


def test_a_broken_promise_calls_for_the_version_before_it_when_nothing_else_is_known() -> None:
    verdict = judged(labelled("v1.1.0", 120, 400), Labelled("v1.0.0"))
    assert verdict.decision is Decision.rollback
    assert "on the holdout in 6.0% (5 points more are allowed)" in verdict.sentence


def test_the_first_version_has_nothing_to_return_to() -> None:
    verdict = judged(labelled("v1.0.0", 120, 400), None)
    assert verdict.decision is Decision.inconclusive
    assert "there is no version before it to return to" in verdict.sentence
    assert [reading.name for reading in verdict.readings] == [PROMISE]


def test_without_a_recorded_promise_the_versions_are_still_compared() -> None:
    unknown = Promise(accuracy=None, classes=8)
    verdict = judged(labelled("v1.1.0", 100, 400), labelled("v1.0.0", 24, 400), unknown)
    assert [reading.name for reading in verdict.readings] == [ACCURACY, CLASS_ACCURACY]
    assert verdict.decision is Decision.rollback
    assert judged(labelled("v1.0.0", 90, 100), None, unknown).decision is Decision.wait


def test_more_wrong_answers_never_mean_less_evidence() -> None:
    for name in (ACCURACY, CLASS_ACCURACY, PROMISE):
        logs = [
            reading(judged(labelled("v2", wrong, 300), labelled("v1", 15, 300)), name).log_evidence or 0.0
            for wrong in range(15, 300, 45)
        ]
        assert logs == sorted(logs)
        assert logs[-1] > 10


def test_looked_at_every_night_a_harmless_version_is_called_harmful_less_often_than_alpha() -> None:
    """It is wrong just as much more often as is allowed; labels arrive in 28 nightly batches."""
    rng, false_alarms, reviews = np.random.default_rng(3), 0, 200
    truth = Promise(accuracy=0.88, classes=4)
    for _ in range(reviews):
        previous = Labelled("v1", {f"c{i}": Rate(int(rng.binomial(100, 0.12)), 100) for i in range(4)})
        wrong = rng.binomial(8, 0.12 + LIMITS.accuracy_margin, size=(28, 4)).cumsum(axis=0)
        nights = (
            Labelled("v2", {f"c{i}": Rate(int(wrong[night, i]), 8 * (night + 1)) for i in range(4)})
            for night in range(28)
        )
        false_alarms += any(harmful(tonight, previous, truth) for tonight in nights)
    assert false_alarms <= 0.05 * reviews


def test_the_window_follows_the_promotion() -> None:
    window = Window.after(NOW, LIMITS)
    assert NOW - window.since == timedelta(days=14)
    assert window.until - NOW == timedelta(days=14)
    assert window.closes_at - NOW == timedelta(days=28)


# Files of labels ------------------------------------------------------------------------------------------------------

HEADER = "request_id,label,source,received_at,version,predicted,predicted_at\n"
WHOLE = "r-1,rust,asha,2026-02-20T10:00:00+05:30,v1.1.0,healthy,2026-02-18T09:00:00Z\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "labels.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_whole_line_and_a_short_one(tmp_path: Path) -> None:
    read = read_labels(write(tmp_path, "\ufeff" + HEADER + WHOLE + "r-2, rust ,ravi,,,,\n"), NOW)
    answer = Answer("v1.1.0", "healthy", datetime(2026, 2, 18, 9, tzinfo=UTC))
    assert read == [
        Label(2, "r-1", "rust", "asha", datetime(2026, 2, 20, 4, 30, tzinfo=UTC), answer),
        Label(3, "r-2", "rust", "ravi", NOW),
    ]
    assert len(read_labels(write(tmp_path, "source,request_id,label\nasha,r-1,rust\n"), NOW)) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: the column request_id, label, source is missing"),
        ("request_id,label\n", "line 1: the column source is missing"),
        ("request_id,label,source,colour\n", "line 1: unknown column colour"),
        ("request_id,label,source,source\n", "line 1: a column is there twice"),
        ("request_id,label,source,version\n", "line 1: version, predicted, predicted_at belong together"),
        ("request_id,label,source\n", "holds no labels"),
        (HEADER + "r-1,,asha,,,,\n", "line 2: label must be"),
        (HEADER + "r-1,rust,as\x07ha,,,,\n", "line 2: source must be"),
        (HEADER + "../1,rust,asha,,,,\n", "line 2: '../1' is not a request id"),
        (HEADER + "r-1,rust,asha\n", "line 2: it has more or fewer cells"),
        (HEADER + "r-1,rust,asha,,,,,,\n", "line 2: it has more or fewer cells"),
        (HEADER + "r-1,rust,asha,yesterday,,,\n", "line 2: received_at 'yesterday' is not a time"),
        (HEADER + "r-1,rust,asha,2026-02-20T10:00:00,,,\n", "has no offset from UTC"),
        (HEADER + "r-1,rust,asha,2027-02-20T10:00:00Z,,,\n", "lies in the future"),
        (HEADER + "r-1,rust,asha,,v1.1.0,healthy,\n", "line 2: version, predicted, predicted_at belong together"),
        (HEADER + "r-1,rust,asha,,1.1,healthy,2026-02-18T09:00:00Z\n", "line 2: '1.1' is not a model version"),
        (HEADER + WHOLE.replace("02-18", "02-28"), "line 2: predicted_at lies after received_at"),
        (HEADER + WHOLE + WHOLE, "line 3: asha has labelled r-1 in line 2 already"),
        ('request_id,label,source\nr-1,"ru"st,asha\n', "cannot be read as CSV"),
    ],
)
def test_a_bad_line_refuses_the_file_and_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"(?i)nothing was imported") as caught:
        read_labels(write(tmp_path, text), NOW)
    assert problem in str(caught.value)


def test_every_bad_line_is_named_up_to_a_screenful(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_labels(write(tmp_path, HEADER + "r-1,,asha,,,,\n" * 30), NOW)
    lines = str(caught.value).splitlines()
    assert lines[1].strip().startswith("line 2: ")
    assert lines[-1].strip() == "and 10 more"
    assert len(lines) == 22


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_labels(tmp_path / "nothing.csv", NOW)
