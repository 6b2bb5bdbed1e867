"""Labels from the field, from a photo's answer to the review of its version, through the terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.local_stack import LocalStack, wait_until

pytestmark = pytest.mark.timeout(600)


def predict(stack: LocalStack, request_id: str) -> None:
    photo = next((stack.home / "datasets" / "leaves").rglob("*.jpg"))
    headers = ["-H", "Content-Type: image/jpeg", "-H", f"X-Request-Id: {request_id}"]
    arguments = ["curl", "-sSf", "-m", "20", *headers, "--data-binary", f"@{photo}", f"{stack.gateway()}/predict"]
    subprocess.run(arguments, check=True, capture_output=True)


def test_a_label_finds_its_prediction_and_the_review_counts_it(served: LocalStack, tmp_path: Path) -> None:
    predict(served, "field-photo-1")
    file = tmp_path / "labels.csv"
    file.write_text("request_id,label,source\nfield-photo-1,Tomato___healthy,asha\n")
    # The replica writes its answers in batches every few seconds.
    add = ("feedback", "add", str(file))
    wait_until("the answer is in the log", lambda: served.khet(*add, code=None).returncode == 0, poll_s=1.0)
    assert served.json("feedback", "add", str(file)) == {"new": 0, "known": 1, "corrected": 0}
    review = served.json("review")
    assert (review["version"], review["decision"], review["action"]) == (served.production(), "continue", "none")
    assert review["verdict"]["evidence"]["current_labels"] == 1
    assert "too few to compare" in review["sentence"]


def test_a_prediction_that_was_never_made_is_named(served: LocalStack, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("request_id,label,source\nfield-photo-0,Tomato___healthy,asha\n")
    done = served.khet("feedback", "add", str(file), code=2)
    assert "line 2: field-photo-0 is not in the inference log" in " ".join(done.stderr.split())
