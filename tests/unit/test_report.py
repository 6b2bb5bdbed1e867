"""The release report: one page that stands alone, in every state a release can end in."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from ml.results import Epoch
from tasks.report import story
from tasks.report.model import ReleaseReport
from tasks.report.render import render_html
from tests.support import report_example as example
from tests.support.html_page import Page

EXAMPLES = example.examples()
PAGES = {name: render_html(report, shots) for name, (report, shots) in EXAMPLES.items()}
everywhere = pytest.mark.parametrize("name", PAGES)
CSS = (Path(story.__file__).parent / "report.css").read_text(encoding="utf-8")


@everywhere
def test_a_page_fetches_nothing_and_runs_nothing(name: str) -> None:
    page = Page.read(PAGES[name])
    assert page.external == []
    assert "script" not in page.tags
    assert page.handlers == []
    assert "default-src 'none'" in PAGES[name]


@everywhere
def test_a_page_is_well_formed_and_accessible(name: str) -> None:
    page = Page.read(PAGES[name])
    assert page.problems == []
    assert page.images_without_alt == 0
    assert page.charts_without_label == 0
    assert page.tags.count("h1") == 1
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids


@everywhere
def test_a_missing_number_is_a_dash(name: str) -> None:
    words = Page.read(PAGES[name]).text
    assert not re.search(r"\b(nan|None|inf|NaN %)\b", words.replace("loss became NaN", ""))


@everywhere
def test_drawings_hold_no_broken_coordinates(name: str) -> None:
    drawings = re.findall(r'(?:\sd|x1?|x2|y1?|y2|cx|cy|width)="([^"]*)"', PAGES[name])
    assert drawings
    assert not [d for d in drawings if "nan" in d or "inf" in d or "None" in d]


def test_hostile_text_stays_text() -> None:
    page = PAGES["many-classes"]
    assert "<script" not in page
    assert "<b>bold</b>" not in page
    assert "<img src=x" not in page
    assert "<script>alert(1)</script>" in Page.read(page).text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("promoted", "v1.3.0 is in production and answers all traffic."),
        ("first", "It is the first version in production."),
        ("gated", "The challenger was stopped by the gate, before it saw any traffic."),
        ("rolled-back", "v1.3.0 was rolled back at 25 % of the traffic."),
        ("failed", "The release failed at the stage “train”."),
        ("dry-run", "This was a rehearsal: nothing was changed."),
    ],
)
def test_the_headline_says_what_happened(name: str, says: str) -> None:
    assert says in Page.read(PAGES[name]).text


def test_a_bad_canary_is_told_with_its_reason() -> None:
    assert "took over 250" in Page.read(PAGES["rolled-back"]).text
    assert "with an error" in Page.read(PAGES["failing"]).text
    assert "was wrong on" in Page.read(PAGES["wrong"]).text


def test_a_failure_under_traffic_does_not_claim_that_nobody_noticed() -> None:
    report = example.rolled_back().model_copy(update={"outcome": "failed"})
    assert "khet status" in story.lead(report)
    assert "no user" not in story.lead(report)
    assert "no user saw the challenger" in story.lead(example.failed_in_training())


@pytest.mark.parametrize(
    ("report", "command"),
    [
        (example.promoted(), "khet rollback --to v1.2.0"),
        (example.rolled_back(), "khet show v1.3.0"),
        (example.gated(), "khet show v1.2.0"),
        (example.failed_in_training(), "khet release --resume r-20261120-061204-7c1e"),
        (example.dry_run(), "khet release"),
    ],
)
def test_the_next_commands_fit_the_outcome(report: ReleaseReport, command: str) -> None:
    assert command in [step.command for step in story.next_steps(report)]


def test_a_first_release_offers_no_rollback() -> None:
    assert not [s for s in story.next_steps(example.first_release()) if "rollback" in s.command]


def test_a_command_quotes_a_name_with_spaces() -> None:
    report = example.gated()
    assert report.evaluation is not None
    odd = report.model_copy(update={"evaluation": report.evaluation.model_copy(update={"dataset": "my leaves; ls"})})
    assert "khet release --data 'my leaves; ls'" in [step.command for step in story.next_steps(odd)]


def test_a_champion_from_another_holdout_is_not_compared() -> None:
    report = example.promoted()
    assert report.champion_evaluation is not None
    other = report.champion_evaluation.model_copy(update={"holdout_hash": "another"})
    changed = report.model_copy(update={"champion_evaluation": other, "looks": ()})
    assert all(number.champion is None for number in story.key_numbers(changed))
    assert "was measured on another holdout" in Page.read(render_html(changed)).text


def test_a_difference_within_the_interval_is_not_called_better() -> None:
    accuracy = story.key_numbers(example.promoted())[0]
    assert (accuracy.delta, accuracy.mood) == ("+1.2 pts", "calm")
    assert story.key_numbers(example.gated())[0].mood == "bad"


def test_a_typical_page_is_small_and_quick() -> None:
    report, shots = EXAMPLES["promoted"]
    began = time.process_time()
    page = render_html(report, shots)
    assert time.process_time() - began < 1.5
    assert len(page.encode()) < 2_000_000
    assert page.count("data:image/") == 13  # twelve mistakes and the reliability diagram


def test_a_report_without_anything_still_renders() -> None:
    bare = ReleaseReport(
        release_id="r-1", title="Bare", version=None, champion_version=None, outcome="failed",
        started_at=example.BEGAN, finished_at=example.BEGAN, requested_by="cron",
    )  # fmt: skip
    page = Page.read(render_html(bare))
    assert page.problems == []
    assert "No reason was recorded." in page.text


@pytest.mark.parametrize("epochs", [0, 1, 2])
@pytest.mark.parametrize("loss", [0.5, 0.0, float("nan")])
def test_curves_of_a_run_that_hardly_began(epochs: int, loss: float) -> None:
    history = tuple(
        Epoch(
            epoch=i, step=i, elapsed_s=float(i), train_loss=loss, val_loss=loss, val_accuracy=loss,
            learning_rate=0.1, images_per_s=loss,
        )
        for i in range(epochs)
    )  # fmt: skip
    report = example.failed_in_training().model_copy(update={"train": example.training(history=history)})
    page = render_html(report)
    assert Page.read(page).problems == []
    assert "nan" not in "".join(re.findall(r'd="([^"]*)"', page))


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = example.promoted()
    assert ReleaseReport.read(report.write(tmp_path / "report.json")) == report


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]))
    for name in ("ink", "muted", "challenger", "champion", "good", "bad", "warn", "calm"):
        assert _contrast(colours[name], colours["card"]) >= 4.5, name
    for mood in ("good", "bad", "warn", "calm"):
        assert _contrast(colours[mood], colours[f"{mood}-soft"]) >= 4.5, mood
        assert _contrast(colours["muted"], colours[f"{mood}-soft"]) >= 4.5, mood


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
