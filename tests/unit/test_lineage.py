"""What is known about the code, the packages and the machine, and what is said when it is not."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from ml.lineage import _gpus, code_state, collect_lineage, machine, packages
from ml.version import Version
from tasks.registry.steps import Publication, lineage_of
from tests.support.records import a_lineage, a_training, an_evaluation, an_export
from tests.support.training import config


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements.lock").write_text("torch==2.13.0\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert code_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("name", ["pyproject.toml", "new_file.py"], ids=["changed file", "new file"])
def test_differences_from_the_commit_are_admitted(checkout: Path, name: str) -> None:
    (checkout / name).write_text("changed")
    assert code_state(checkout) == (git(checkout, "rev-parse", "HEAD"), True)


def test_no_repository_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    assert code_state(tmp_path) == (None, None)
    assert code_state(tmp_path / "none") == (None, None)


@pytest.mark.parametrize(
    ("said", "understood"),
    [("a" * 40, ("a" * 40, False)), ("a" * 40 + "-dirty", ("a" * 40, True)), ("unknown", (None, None))],
)
def test_an_image_says_which_commit_it_was_built_from(
    tmp_path: Path, said: str, understood: tuple[str | None, bool | None]
) -> None:
    (tmp_path / "REVISION").write_text(said + "\n")
    assert code_state(tmp_path) == understood


def test_the_commit_of_somebody_elses_repository_is_not_taken(checkout: Path) -> None:
    inside = checkout / "venv" / "site-packages"
    inside.mkdir(parents=True)
    (inside / "pyproject.toml").write_text("")
    assert code_state(inside) == (None, None)


def test_no_git_is_not_an_error(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout / "nothing"))
    assert code_state(checkout) == (None, None)


def test_the_lineage_holds_everything_that_made_the_model(checkout: Path) -> None:
    lineage = collect_lineage(
        config={"net": "convnet"},
        seed=7,
        dataset="leaves",
        dataset_hash="ab",
        parent=Version(1, 0, 0),
        release_id="release-1",
        root=checkout,
    )
    assert lineage.git_commit == git(checkout, "rev-parse", "HEAD")
    assert lineage.git_dirty is False
    assert lineage.lock_sha256 == hashlib.sha256(b"torch==2.13.0\n").hexdigest()
    assert (lineage.seed, lineage.dataset, lineage.dataset_hash) == (7, "leaves", "ab")
    assert lineage.parent == Version(1, 0, 0)
    assert lineage.hardware.keys() >= {"cpu", "cores", "memory_gib"}
    assert lineage.packages.keys() >= {"python", "torch", "onnxruntime"}
    remote = collect_lineage(config={}, seed=0, dataset="d", dataset_hash="h", trained_on={"gpu": "x"}, root=checkout)
    assert remote.hardware == {"gpu": "x"}


def test_gpus_are_named_as_their_driver_lists_them(tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"0000:0{n}:00.0").mkdir()
        (tmp_path / f"0000:0{n}:00.0" / "information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    assert _gpus(tmp_path) == ["NVIDIA H100", "NVIDIA H100"]
    assert _gpus(tmp_path / "none") == []


def test_the_machine_is_described_without_torch() -> None:
    from tests.support.processes import run_python

    assert int(machine()["cores"]) >= 1
    assert packages()["python"].startswith("3.")
    code = "import sys; from ml.lineage import machine, packages; machine(); packages(); print('torch' in sys.modules)"
    assert run_python([code]) == ["False"]


def test_a_model_that_was_trained_elsewhere_keeps_what_made_it(tmp_path: Path) -> None:
    there = a_lineage(packages={"torch": "2.13.0+cu130"}, hardware={"accelerator": "NVIDIA H100"}, parent=None)
    (tmp_path / "train").mkdir()
    there.write(tmp_path / "train" / "lineage.json")
    publication = Publication(
        tmp_path, config(), a_training(), an_export(), an_evaluation(), parent=Version(1, 2, 0), created_by="t"
    )
    made = lineage_of("release-1", publication)
    assert (made.packages, made.hardware) == (there.packages, there.hardware)
    assert (made.parent, made.release_id) == (Version(1, 2, 0), "release-1")
    (tmp_path / "train" / "lineage.json").unlink()
    assert lineage_of("release-1", publication).packages["torch"] == packages()["torch"]
