"""The verdict explained: what each gate says, and the picture of its evidence up to the decision."""

from __future__ import annotations

import io
import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.report import evidence, pictures, tables, words
from tasks.report.evidence import Course, course, evidence_chart, spread
from tasks.report.model import CanaryLook, GateRow, VersionCounters
from tasks.report.render import render_html
from tasks.report.views import evidence_by_gate, traffic_view
from tasks.rollout.verdict import Decision, GateReading, Verdict
from tests.support import report_example as example
from tests.support.html_page import Page

THRESHOLD = math.log(200)
# Every number that stands in a coordinate.
_COORDINATES = re.compile(r'(?:\sd|x1?|x2|y1?|y2|cx|cy|r)="([^"]*)"')


def row(gate: str = "Errors", **changes: Any) -> GateRow:
    values: dict[str, Any] = {
        "gate": gate, "value": 0.04, "limit": 0.005, "ok": True, "samples": 100, "bound": "at_most", "unit": "share",
        "log_evidence": 1.0, "log_threshold": THRESHOLD,
    }  # fmt: skip
    return GateRow(**(values | changes))


def look(requests: int, logs: dict[str, float | None], decision: str = "continue", step: str = "5 %") -> CanaryLook:
    return CanaryLook(
        at=example.BEGAN, step=step, weight=0.05, challenger=VersionCounters(version="v1.3.0", requests=requests),
        decision=decision, evidence=logs, log_threshold=THRESHOLD,
    )  # fmt: skip


def seen(*looks: CanaryLook, rows: tuple[GateRow, ...] = (row(),)) -> Course:
    found = course(looks, rows)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("changes", "says", "mood"),
    [
        ({"ok": True}, "✓ no harm shown", "good"),
        ({"ok": False}, "✕ harm", "bad"),
        ({"ok": None}, "– too few samples", "calm"),
        ({"ok": False, "critical": False}, "! harm, not critical", "warn"),
        ({"ok": True, "dry_run": True}, "– only reported", "calm"),
        ({"ok": False, "dry_run": True}, "– only reported: harm", "calm"),
        ({"ok": True, "log_threshold": None}, "✓ passed", "good"),
        ({"ok": False, "log_threshold": None}, "✕ broken", "bad"),
    ],
)
def test_a_gate_says_what_it_knows_and_no_more(changes: dict[str, Any], says: str, mood: str) -> None:
    assert words.gate_state(row(**changes)) == (says, mood)


@pytest.mark.parametrize(
    ("log", "says"),
    [
        (math.log(412), "412:1"), (math.log(3.56), "3.6:1"), (0.0, "1:1"), (-0.7, "below 1:1"), (None, "below 1:1"),
        (-math.inf, "below 1:1"), (math.nan, "below 1:1"), (60.0, "over 1,000,000:1"), (math.inf, "over 1,000,000:1"),
    ],
)  # fmt: skip
def test_evidence_is_said_as_odds(log: float | None, says: str) -> None:
    assert words.odds(log) == says


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.interval(0.028, 0.057, "share"), "2.8 to 5.7 %"),
        (words.interval(-0.1, 0.05, "share"), "−10.0 to 5.0 %"),
        (words.interval(100.0, None, "ms"), "from 100 ms"),
        (words.interval(None, None, "share"), "–"),
        (words.difference_allowed(0.011, 0.01, "share"), "+0.1 pts"),
        (words.difference_allowed(250.0, 25.0, "ms"), "10.0 ×"),
        (words.difference_allowed(0.35, None, "share"), ""),
        (words.gate_evidence(row(samples=0)), "–"),
    ],
)
def test_what_a_gate_allows_and_knows_reads_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_table_of_a_verdict_has_both_sides_evidence_and_interval() -> None:
    _, verdict = example.rollout(bad="failing")
    rows = tables.gate_rows(traffic_view(verdict).gates)
    errors = next(r for r in rows if r["gate"] == "Errors")
    assert list(errors) == [
        "gate", "result", "value", "champion", "limit", "samples", "evidence", "threshold", "interval",
    ]  # fmt: skip
    assert errors["result"] == "✕ harm"
    assert errors["threshold"] == "200:1"
    assert float(errors["value"].split()[0]) > float(errors["champion"].split()[0])


def test_the_page_says_the_verdict_in_its_sentence_table_and_picture() -> None:
    page = Page.read(render_html(example.rolled_back("failing")))
    assert re.search(r"answered [\d.]+\s% of \d+ requests with an error, the baseline [\d.]+\s%; evidence", page.text)
    assert "✕ harm" in page.text
    assert "harm is called at 200:1" in page.text
    assert "rollback after" in page.text
    assert "evidence" in page.ids


def test_only_the_gate_that_decided_is_coloured() -> None:
    looks, verdict = example.rollout(bad="failing")
    found = seen(*looks, rows=traffic_view(verdict).gates)
    assert [trace.gate for trace in found.traces if trace.decided] == ["Errors"]
    drawn = evidence_chart(found, looks, 1040)
    assert drawn.count('class="gate hot bad"') == 1
    assert drawn.count("<circle") == 1
    assert "Class mix" in found.silent


def test_a_promotion_colours_no_gate_and_names_its_decision() -> None:
    looks, verdict = example.rollout()
    found = seen(*looks, rows=traffic_view(verdict).gates)
    drawn = evidence_chart(found, looks, 1040)
    assert "hot" not in drawn
    assert f"promote after {found.requests:,} requests" in drawn


def test_a_hard_guard_decides_without_any_gate() -> None:
    found = seen(look(10, {"Errors": 0.1}), look(20, {"Errors": 0.3}, "rollback"), rows=(row(ok=None),))
    assert not [trace for trace in found.traces if trace.decided]
    assert found.threshold == THRESHOLD


def test_gates_that_only_decide_together_are_drawn_as_one_with_its_own_threshold() -> None:
    """Ten gates at 60:1 each: none reaches 200:1, their mean is beyond 20:1."""
    names = [f"Gate {i}" for i in range(10)]
    logs: dict[str, float | None] = dict.fromkeys(names, math.log(60))
    found = seen(look(10, dict.fromkeys(names, 0.0)), look(50, logs, "rollback"), rows=tuple(row(n) for n in names))
    assert found.threshold == pytest.approx(math.log(20))
    assert [(t.gate, t.label) for t in found.traces if t.decided] == [
        (evidence.TOGETHER, f"{evidence.TOGETHER} 60:1"),
    ]


def test_a_gate_that_is_only_reported_decides_nothing_and_is_dashed() -> None:
    rows = (row("Errors", ok=False, dry_run=True), row("Slow answers", ok=False))
    looks = (look(10, {}), look(40, {"Errors": 9.0, "Slow answers": 6.0}, "rollback"))
    found = seen(*looks, rows=rows)
    assert [trace.gate for trace in found.traces if trace.decided] == ["Slow answers"]
    assert 'class="gate dashed"' in evidence_chart(found, looks, 1040)


@pytest.mark.parametrize("log", [None, -math.inf, math.nan, 0.0, 5.0, 1e9, math.inf])
@pytest.mark.parametrize("requests", [0, 1, 40])
@pytest.mark.parametrize("decision", ["continue", "rollback", "inconclusive", "promote"])
def test_one_look_is_drawn_whatever_it_holds(log: float | None, requests: int, decision: str) -> None:
    one = look(requests, {"Errors": log}, decision)
    found = seen(one, rows=(row(ok=False),))
    for width in (440, 1040):
        drawn = evidence_chart(found, (one,), width)
        assert not [c for c in _COORDINATES.findall(drawn) if "nan" in c or "inf" in c]


def test_extreme_evidence_becomes_a_png() -> None:
    found = seen(look(0, {"Errors": None}), look(40, {"Errors": math.inf, "Class mix": 2.0}, "rollback"))
    with Image.open(io.BytesIO(pictures.evidence_png(found))) as image:
        assert image.width >= 800


def test_no_look_and_looks_of_older_records_have_no_picture() -> None:
    assert course((), ()) is None
    old = CanaryLook(at=example.BEGAN, step="5 %", weight=0.05, challenger=VersionCounters(version="v1.0.0"))
    assert course((old,), ()) is None
    page = render_html(example.promoted(looks=(old,)))
    assert "evidence" not in Page.read(page).ids


def test_an_older_reading_without_evidence_still_has_its_row() -> None:
    reading = GateReading("latency", 0.02, 0.1, 40, True, "2.0% were slow")
    report = example.promoted(canary=traffic_view(Verdict(Decision.promote, ("no limit was broken",), (reading,), {})))
    assert tables.gate_table(report)[-1]["result"] == "✓ passed"
    assert "Slow answers" in Page.read(render_html(report)).text


def test_evidence_without_end_survives_as_large() -> None:
    told = evidence_by_gate({"errors": math.inf, "slow": -math.inf, "ood": math.nan, "unheard of": 1.0})
    assert told == {"Errors": 700.0, "Slow answers": None, "Not a leaf": None, "unheard of": 1.0}


def test_names_beside_crowded_lines_stay_apart() -> None:
    names = [f"Gate {i}" for i in range(10)]
    looks = (look(10, {}), look(40, dict.fromkeys(names, 1.0)))
    drawn = evidence_chart(seen(*looks, rows=tuple(row(n) for n in names)), looks, 1040)
    at = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>Gate', drawn))
    assert len(at) == 10
    assert min(b - a for a, b in itertools.pairwise(at)) >= 13.9


@settings(max_examples=60)
@given(st.lists(st.floats(0, 300), min_size=1, max_size=10))
def test_places_are_spread_inside_their_bounds(wanted: list[float]) -> None:
    places = spread(sorted(wanted), 14, 0, 300)
    assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 300 + 1e-9


@given(top=st.floats(math.log(10), math.log(words.MOST_ODDS)))
def test_odds_on_the_axis_are_powers_of_ten_and_few(top: float) -> None:
    ticks = evidence.odds_ticks(top)
    assert 2 <= len(ticks) <= 5
    assert ticks[-1] <= top + 1e-6
    assert all(math.exp(tick) == pytest.approx(10 ** round(tick / math.log(10))) for tick in ticks)
