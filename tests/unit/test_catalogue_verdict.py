"""What `khet show` and `khet releases` say of a rollout, from the record it left."""

from __future__ import annotations

from typing import Any

import pytest

from flows.commands import catalogue
from tasks.rollout.journal import Outcome, ReleaseRecord
from tasks.rollout.looks import to_json, with_look
from tasks.rollout.procedure import Look
from tasks.rollout.verdict import Evidence
from tests.support import report_example as example


def record(*looks: dict[str, Any], outcome: Outcome = "rolled_back", reasons: tuple[str, ...] = ()) -> ReleaseRecord:
    return ReleaseRecord(
        release_id="r-1234", started_at=example.BEGAN, requested_by="priya", parameters={}, version="v1.3.0",
        outcome=outcome, reasons=reasons, looks=looks,
    )  # fmt: skip


def failing() -> ReleaseRecord:
    _, verdict = example.rollout(bad="failing")
    look = Look(example.BEGAN, "25%", 0.25, Evidence(), Evidence(), verdict)
    return record(*with_look((), to_json(look)))


@pytest.mark.parametrize(("width", "shown"), [(80, False), (140, True)])
def test_the_verdict_is_a_sentence_and_a_table_that_fits(
    width: int, shown: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue.out, "width", width)
    catalogue.show_verdict(failing())
    text = capsys.readouterr().out
    assert "Verdict of release r-1234: rolled back: the canary answered" in text
    errors = next(line for line in text.splitlines() if line.startswith("Errors"))
    assert "✕ harm" in errors
    assert ("interval" in text) is shown
    assert all(len(line) <= width for line in text.splitlines())


def test_an_older_record_has_a_verdict_too(capsys: pytest.CaptureFixture[str]) -> None:
    reading = {"name": "errors", "value": 0.0, "limit": 0.05, "samples": 40, "ok": True, "sentence": "no error in 40"}
    old = {"decision": "promote", "reasons": ["no limit was broken in 40 requests"], "readings": [reading]}
    catalogue.show_verdict(record(old, outcome="promoted"))
    text = capsys.readouterr().out
    assert "promoted: no limit was broken in 40 requests" in text
    assert "✓ passed" in text


def test_the_reason_in_the_list_is_the_judges_sentence() -> None:
    assert catalogue.why(failing()).startswith("rolled back: the canary answered")


def test_a_release_that_met_no_traffic_says_its_own_reason_and_briefly() -> None:
    gated = record(outcome="gated", reasons=("accuracy is 60.0%", "at least 80.0% is asked for " * 20))
    assert catalogue.why(gated).startswith("accuracy is 60.0%; at least")
    assert catalogue.why(gated).endswith(" …")
    assert len(catalogue.why(gated)) <= 120
