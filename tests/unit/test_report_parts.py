"""The pieces of a report: tables and cards for Prefect, pictures, axes and the words for numbers."""

from __future__ import annotations

import base64
import io
import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks.report import charts, pictures, svg, tables, words
from tasks.report.model import CanaryLook, TimelineEvent, VersionCounters
from tasks.report.render import render_html
from tasks.report.views import traffic_view
from tasks.rollout.verdict import Decision, GateReading, Verdict
from tests.support import report_example as example

EXAMPLES = example.examples()


def _noise(width: int, height: int, mode: str = "RGB") -> bytes:
    image = Image.effect_noise((width, height), 90).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_table_has_the_same_columns_in_every_row(name: str) -> None:
    report = EXAMPLES[name][0]
    for rows in (tables.gate_table(report), tables.stage_table(report), tables.looks_table(report)):
        assert len({tuple(row) for row in rows}) <= 1
        assert all(isinstance(value, str) for row in rows for value in row.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_card_is_markdown_whose_tables_line_up(name: str) -> None:
    card = tables.render_markdown_card(EXAMPLES[name][0])
    assert card.startswith("# ")
    blocks = [block.splitlines() for block in card.split("\n\n") if block.startswith("|")]
    for lines in blocks:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "<script" not in card


def test_the_gate_table_says_which_gate_broke() -> None:
    broken = [row for row in tables.gate_table(example.rolled_back("failing")) if row["result"] == "✕ harm"]
    assert [(row["where"], row["gate"], row["threshold"]) for row in broken] == [("canary", "Errors", "200:1")]
    assert broken[0]["evidence"].endswith(":1")
    assert " to " in broken[0]["interval"]


def test_the_champion_has_a_column_where_a_gate_knows_its_value() -> None:
    report = example.promoted()
    assert report.gate is not None
    rows = tuple(row.model_copy(update={"champion": 0.93}) for row in report.gate.gates[:1])
    shown = report.model_copy(update={"gate": report.gate.model_copy(update={"gates": rows}), "canary": None})
    assert tables.gate_table(shown)[0]["champion"] == "93.0 %"
    alone = rows[0].model_copy(update={"champion": None})
    assert "champion" not in tables.gate_rows([alone])[0]
    assert "93.0 %" in render_html(shown)


def test_a_gate_with_too_few_samples_is_neither_passed_nor_broken() -> None:
    reading = GateReading("accuracy", 0.0, 0.1, 0, None, "no probe was answered yet")
    view = traffic_view(Verdict(Decision.wait, ("more requests are needed",), (reading,), {}))
    report = example.promoted(canary=view)
    assert tables.gate_table(report)[-1]["result"] == "– too few samples"
    assert view.gates[0].unit == "share"


def test_a_look_shows_both_versions() -> None:
    row = tables.looks_table(example.promoted())[0]
    assert row["requests"] == "1,152 / 4,608"
    assert " / " not in tables.looks_table(example.first_release())[0]["requests"]


def test_png_pictures_are_drawn_from_little_and_from_much() -> None:
    looks = example.looks(per_step=50)
    for drawn in (
        pictures.curves_png(example.epochs()),
        pictures.curves_png(example.epochs(1)),
        pictures.timeline_png(looks),
        pictures.timeline_png(looks[:1]),
        pictures.timeline_png(example.looks(first=True)),
    ):
        with Image.open(io.BytesIO(drawn)) as image:
            assert image.format == "PNG"
            assert image.width >= 800
        assert len(drawn) < 150_000


def test_a_large_picture_is_shrunk_and_a_small_one_kept() -> None:
    small, large = _noise(64, 32), _noise(1600, 800, "RGBA")
    assert pictures.data_uri(small) == "data:image/png;base64," + base64.b64encode(small).decode()
    uri = pictures.data_uri(large)
    assert uri is not None
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < len(large) / 2


@pytest.mark.parametrize("data", [None, b"", b"<svg onload=alert(1)>", b"\x00" * 200])
def test_what_is_no_picture_is_left_out(data: bytes | None) -> None:
    assert pictures.data_uri(data) is None


def test_a_cut_picture_does_not_stop_the_report() -> None:
    cut = _noise(900, 900)[:90_000]
    assert pictures.data_uri(cut) == "data:image/png;base64," + base64.b64encode(cut).decode()


def test_a_picture_is_found_in_any_folder() -> None:
    assert pictures.find({"evaluation/mistake_01.png": b"x"}, "mistake_01.png") == b"x"
    assert pictures.find({"mistake_01.png": b"x"}, "somewhere/mistake_01.png") == b"x"
    assert pictures.find({"mistake_01.png": b"x"}, "") is None


def test_markdown_carries_a_picture_without_an_address() -> None:
    line = tables.markdown_image(b"\x89PNG", "Canary [v1.3.0]")
    assert line == "![Canary \\[v1.3.0\\]](data:image/png;base64,iVBORw==)"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.percent(0.9456), "94.6 %"),
        (words.percent(0.99996), "> 99.9 %"),
        (words.percent(0.0001), "< 0.1 %"),
        (words.percent(1.0), "100.0 %"),
        (words.percent(math.nan), "–"),
        (words.points(-0.013), "−1.3 pts"),
        (words.points(0.0001), "±0.0 pts"),
        (words.millis(0.312), "0.31 ms"),
        (words.millis(341.4), "341 ms"),
        (words.millis(12_500), "12.5 s"),
        (words.size(431_220), "421 KiB"),
        (words.size(0), "0 B"),
        (words.duration(9.96), "10.0 s"),
        (words.duration(59.7), "1 min 00 s"),
        (words.duration(7625), "2 h 07 min"),
        (words.limit(0.02, "at_most", "share"), "≤ 2.0 %"),
        (words.limit(None, "at_least", "share"), "–"),
        (words.count(1, "request"), "1 request"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_nested_values_become_dotted_rows() -> None:
    nested = {"a": {"b": {"c": 1}, "d": []}, "e": None, "f": True, "g": [1, 2.5]}
    assert words.flat(nested) == [("a.b.c", "1"), ("a.d", "–"), ("e", "–"), ("f", "yes"), ("g", "1, 2.5")]


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), wanted=st.integers(1, 12))
def test_ticks_cover_the_values_with_round_numbers(low: float, span: float, wanted: int) -> None:
    high = low + span
    ticks = svg.nice_ticks(low, high, wanted)
    if high > low:
        assert len(ticks) <= wanted + 3
        slack = (ticks[-1] - ticks[0]) * 1e-6 + 1e-9
        assert ticks[0] <= low + slack
        assert ticks[-1] >= high - slack


@given(low=st.floats(1e-3, 1e4), factor=st.floats(1, 1e5))
def test_logarithmic_ticks_cover_the_values(low: float, factor: float) -> None:
    ticks = svg.decade_ticks(low, low * factor)
    assert ticks == sorted(set(ticks))
    assert len(ticks) >= 2
    assert ticks[0] <= low * (1 + 1e-9)
    assert ticks[-1] >= low * factor * (1 - 1e-9)


@given(span=st.floats(0, 1e7))
def test_time_ticks_stay_inside_and_few(span: float) -> None:
    ticks = charts.time_ticks(span)
    assert ticks[0] == 0
    assert len(ticks) <= 10


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)), max_size=12))
def test_a_line_breaks_where_a_value_is_missing(values: list[float | None]) -> None:
    scale = svg.Scale(0, 12, 0, 100)
    drawn = svg.path(list(enumerate(values)), scale, svg.Scale(0, 1, 100, 0), "line")
    known = [v is not None and math.isfinite(v) for v in values]
    runs = sum(now and not before for before, now in zip([False, *known], known, strict=False))
    assert drawn.count("M") == runs
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_latencies_far_apart_are_drawn_by_decades() -> None:
    drawn = charts.timeline_chart(example.looks(bad="slow"), (), 0.0, 1040)
    assert "(logarithmic)" in drawn
    assert "(logarithmic)" not in charts.timeline_chart(example.looks(), (), 1.0, 1040)


def test_a_timeline_of_one_silent_look() -> None:
    silent = CanaryLook(at=example.BEGAN, step="shadow", weight=0.0, challenger=VersionCounters(version="v1.0.0"))
    drawn = charts.timeline_chart((silent,), (), None, 440)
    assert drawn.startswith("<svg")
    assert "nan" not in drawn


def test_events_outside_the_canary_are_not_drawn_on_it() -> None:
    looks = example.looks()
    before = TimelineEvent(at=looks[0].at - timedelta(seconds=5), text="earlier")
    during = TimelineEvent(at=looks[3].at, text="now", severity="bad")
    assert charts.timeline_chart(looks, (before, during), 1.0, 1040).count('class="event') == 1


def test_stage_bars_lie_on_one_axis() -> None:
    bars = charts.stage_bars(example.stages("canary", "failed"))
    assert len(bars) == len(example.stages())
    assert 'class="bar bad"' in bars[8]
    assert "rect" not in bars[-1]  # skipped stages have no bar
