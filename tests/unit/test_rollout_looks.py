"""What the release record keeps of a rollout: little, all that decided, and readable years later."""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from configs.areas import JudgeSettings
from tasks.audit import AuditRecord
from tasks.rollout.looks import MOST_LOOKS, Kept, last_verdict, to_json, with_look
from tasks.rollout.policy import judge
from tasks.rollout.procedure import Look
from tasks.rollout.verdict import Decision, Evidence, GateReading, Paired, Stage, Verdict

BEGAN = datetime(2026, 11, 20, 6, 12, tzinfo=UTC)
BOUNDS = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, math.inf)


def side(requests: int, errors: int = 0) -> Evidence:
    classes = {f"class_{i}": requests // 38 for i in range(38)}
    return Evidence(
        requests=requests, errors=errors, predictions=requests, classes=classes, latency=dict.fromkeys(BOUNDS, requests)
    )


def judged(requests: int, errors: int = 0, needed: int = 10**9) -> Verdict:
    stage = Stage(weight=0.25, needed=needed, last=False, elapsed_s=1, deadline_s=600, classes=38)
    return judge(side(requests, errors), side(requests), Paired(100, 2, 3, 91), stage, JudgeSettings())


def at_second(second: float, verdict: Verdict, requests: int = 100) -> Look:
    return Look(BEGAN + timedelta(seconds=second), "25%", 0.25, side(requests), side(requests), verdict)


WAITING, ADVANCING, HARMFUL = judged(1000), judged(1000, needed=10), judged(1000, errors=200)


def kept(*looks: Look, most: int = MOST_LOOKS) -> Kept:
    record: Kept = ()
    for look in looks:
        record = with_look(record, to_json(look), most)
    return record


def test_the_cases_are_what_they_are_called() -> None:
    assert [v.decision.value for v in (WAITING, ADVANCING, HARMFUL)] == ["continue", "advance", "rollback"]


def test_a_long_rollout_stays_far_below_a_megabyte() -> None:
    """A look every two seconds for a day, cut short: what is kept does not grow any more."""
    steps = [at_second(2.0 * i, ADVANCING if i % 300 == 299 else WAITING) for i in range(1200)]
    record = kept(*steps)
    assert len(record) == MOST_LOOKS
    assert len(json.dumps(record, indent=1)) < 600_000


def test_each_look_that_decided_and_the_last_stay_whole() -> None:
    record = kept(
        *(at_second(i, WAITING) for i in range(9)), at_second(9, ADVANCING), at_second(10, WAITING),
        at_second(11, WAITING), most=6,
    )  # fmt: skip
    whole = [(look["decision"], look["at"]) for look in record if "readings" in look]
    assert [decision for decision, _ in whole] == ["advance", "continue"]
    assert whole[-1][1].endswith("06:12:11+00:00")
    assert record[0]["at"].endswith("06:12:00+00:00")
    assert all(look["evidence"] for look in record)


def test_looks_are_thinned_evenly() -> None:
    record = kept(*(at_second(i, WAITING) for i in range(400)), most=50)
    at = [datetime.fromisoformat(look["at"]).timestamp() for look in record]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert max(gaps[:-2]) <= 4 * (sum(gaps) / len(gaps))


def test_a_look_is_plain_json_and_its_verdict_comes_back() -> None:
    text = json.dumps(kept(at_second(0, HARMFUL)), allow_nan=False)
    verdict = last_verdict(json.loads(text))
    assert verdict is not None
    assert verdict.decision is Decision.rollback
    assert verdict.sentence == HARMFUL.sentence
    errors = next(r for r in verdict.readings if r.name == "errors")
    assert errors.ok is False
    assert errors.log_evidence is not None
    assert errors.log_threshold is not None
    assert errors.log_evidence > errors.log_threshold


def test_probes_are_the_labelled_images_that_both_answered() -> None:
    look = to_json(at_second(0, WAITING))
    assert (look["canary"]["probes"], look["canary"]["probes_correct"]) == (100, 94)
    assert (look["champion"]["probes"], look["champion"]["probes_correct"]) == (100, 93)
    assert "classes" not in look["canary"]


def test_evidence_without_end_is_kept_as_large() -> None:
    endless = GateReading("errors", 1.0, 0.1, 40, False, "all failed", math.inf, 5.3, low=0.5, high=math.inf)
    look = to_json(at_second(0, Verdict(Decision.rollback, ("all failed",), (endless,), {})))
    assert look["evidence"] == {"errors": 700.0}
    assert look["readings"][0]["high"] is None


OLD_LOOK: dict[str, Any] = {
    "at": "2026-11-01T08:00:00+00:00", "step": "5%", "weight": 0.05, "decision": "promote",
    "canary": {"requests": 40, "errors": 0, "probes": 40, "probes_correct": 38},
    "champion": {"requests": 400, "errors": 1}, "reasons": ["no limit was broken in 40 requests"],
    "readings": [
        {"name": "errors", "value": 0.0, "limit": 0.05, "samples": 40, "ok": True, "sentence": "no error in 40"}
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "look", [OLD_LOOK, OLD_LOOK | {"readings": [OLD_LOOK["readings"][0] | {"a field of later days": 1}]}]
)
def test_records_of_other_days_are_read(look: dict[str, Any]) -> None:
    verdict = last_verdict([look])
    assert verdict is not None
    assert verdict.sentence == "promoted: no limit was broken in 40 requests"
    assert verdict.readings[0].log_evidence is None


def test_a_record_without_looks_has_no_verdict() -> None:
    assert last_verdict(()) is None


def test_a_verdict_goes_into_the_audit_log_whole_and_as_strict_json() -> None:
    entry = AuditRecord(
        at=BEGAN, actor="priya", action="judge", subject="v1.3.0", plan=HARMFUL.to_json(), outcome="done"
    )
    kept_plan = json.loads(entry.model_dump_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
        "plan"
    ]
    assert kept_plan["sentence"] == HARMFUL.sentence
    assert {gate["name"] for gate in kept_plan["gates"]} == {reading.name for reading in HARMFUL.readings}
    errors = next(gate for gate in kept_plan["gates"] if gate["name"] == "errors")
    assert errors["log_evidence"] > errors["log_threshold"]
