"""The model card says what a person needs to know, whatever the records hold."""

from __future__ import annotations

import re

from ml.version import Version
from tasks.registry.card import confusions, render_card, weakest_class
from tests.support.records import HASH, a_lineage, a_metadata, a_training, an_evaluation, an_export

V = Version(1, 3, 0)


def card(**changes: object) -> str:
    parts = {
        "evaluation": an_evaluation(),
        "trained": a_training(),
        "exported": an_export(),
        "metadata": a_metadata(),
        "lineage": a_lineage(),
    }
    return render_card(V, **(parts | changes))  # type: ignore[arg-type]


def test_the_card_answers_the_questions_of_a_reader() -> None:
    text = card()
    for heading in (
        "# Khet Guard leaf model v1.3.0",
        "## Intended use and limits",
        "## Data",
        "## How it was trained",
        "## Results per class",
        "## By severity",
        "## Calibration",
        "## Where it fails",
        "## Not a leaf",
        "## Export checks",
        "## Where it comes from",
        "## Check it, use it, take it back",
    ):
        assert f"{heading}\n" in text
    assert "**93.6 %** of cases (95 % interval 89.9 % to 96.0 %)" in text
    assert "The class it misses most often is **early_blight** (recall 88.0 %" in text
    assert "- early_blight taken for healthy: 9 of 100" in text
    assert "| 0.00 to 0.25 | 60 | 81.0 % |" in text
    assert "[look](mistakes/00.png)" in text
    assert "| Replaces | v1.2.0 |" in text
    assert "khet rollback --to v1.3.0" in text
    assert f'echo "{HASH}  model.onnx" | sha256sum --check' in text


def test_every_table_row_has_the_columns_of_its_head() -> None:
    blocks = re.findall(r"(?:^\|.*\|\n)+", card(), re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}) == 1, block


def test_what_is_not_known_is_said() -> None:
    text = card(
        evaluation=an_evaluation(by_severity=(), mistakes=(), missed_disease_rate=None, confusion=((1, 0), (0, 1))),
        lineage=a_lineage(git_commit=None, git_dirty=None, lock_sha256=None, parent=None, release_id=None),
        trained=a_training(resumed_from_step=1234, elapsed_s=9000),
    )
    assert "does not say how severe" in text
    assert "There were no errors on this split." in text
    assert "No photo of the split was misclassified." in text
    assert "Missed disease" not in text
    assert "| Code | `unknown` |" in text
    assert "nothing: it is the first version" in text
    assert "resumed from step 1,234" in text
    assert "2 h 30 min" in text


def test_uncommitted_changes_are_admitted() -> None:
    assert "with uncommitted changes" in card(lineage=a_lineage(git_dirty=True))


def test_names_cannot_break_the_page() -> None:
    text = card(metadata=a_metadata(classes=("<script>alert(1)</script>", "a|b", "c\n# d")))
    assert "<script>" not in text
    assert "a\\|b" in text
    assert "\n# d" not in text


def test_the_weakest_class_has_photos() -> None:
    evaluation = an_evaluation()
    empty = evaluation.classes[0].model_copy(update={"support": 0, "recall": 0.0})
    weakest = weakest_class(evaluation.model_copy(update={"classes": (empty, *evaluation.classes[1:])}))
    assert weakest is not None
    assert weakest.name == "early_blight"


def test_confusions_come_most_frequent_first() -> None:
    found = confusions(an_evaluation())
    assert [pair.count for pair in found] == [9, 3, 2, 1, 1]
    assert (found[0].label, found[0].predicted, found[0].support) == ("early_blight", "healthy", 100)
