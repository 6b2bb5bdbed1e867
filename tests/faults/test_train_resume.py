"""A training that is killed, or asked to stop, goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.settings import PROJECT_ROOT
from ml import progress
from ml.results import Epoch, TrainResult
from tests.support.training import CONFIGS, dataset

EPOCHS = 8
DEADLINE_S = 120.0


def command(out: Path, *overrides: str) -> list[str]:
    values = ("tracking=false", "accelerator=cpu", "threads=1", *overrides)
    sets = [part for value in values for part in ("--set", value)]
    files = ["--config", str(CONFIGS / "smoke.yaml"), "--data", str(dataset()), "--out", str(out)]
    return [sys.executable, "-m", "ml.train", *files, *sets]


def run(out: Path, *overrides: str) -> TrainResult:
    done = subprocess.run(
        command(out, *overrides), cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return TrainResult.read(out / "train.json")


def stop(out: Path, number: int, epochs: int, *overrides: str) -> int:
    """Start the command, send it a signal after `epochs` epochs, and return its exit code."""
    process = subprocess.Popen(command(out, *overrides), cwd=PROJECT_ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while len(progress.read(out / progress.FILE)[0]) < epochs or not (out / "last.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            os.sched_yield()
        process.send_signal(number)
        return process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()


def state(out: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer moments at the end of a run."""
    saved = torch.load(out / "last.ckpt", weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    flat = {f"{i}.{name}": value for i, values in moments.items() for name, value in values.items()}
    average = {f"average.{name}": value for name, value in saved["khet"]["average"].items()}
    return {**saved["state_dict"], **average, **flat}


def untimed(history: tuple[Epoch, ...]) -> list[dict[str, Any]]:
    return [e.model_dump(exclude={"elapsed_s", "images_per_s"}) for e in history]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("undisturbed")
    return out, run(out, f"budget={{epochs: {EPOCHS}}}")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)], ids=["killed", "asked to stop"]
)
def test_a_stopped_run_ends_with_the_very_same_weights(
    undisturbed: tuple[Path, TrainResult], tmp_path: Path, number: int, code: int
) -> None:
    out, expected = undisturbed
    budget = f"budget={{epochs: {EPOCHS}}}"
    assert stop(tmp_path, number, 2, budget) == code
    assert not (tmp_path / "train.json").exists()
    resumed = run(tmp_path, budget)
    assert resumed.resumed_from_step is not None and resumed.resumed_from_step > 0
    assert (resumed.steps, resumed.epochs) == (expected.steps, EPOCHS)
    assert untimed(resumed.history) == untimed(expected.history)
    ours, theirs = state(tmp_path), state(out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_seconds_that_a_killed_run_spent_are_spent(tmp_path: Path) -> None:
    budget = "budget={seconds: 4}"
    assert stop(tmp_path, signal.SIGKILL, 2, budget) == -9
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)["khet"]["elapsed_s"]
    history = progress.read(tmp_path / progress.FILE)[0]
    resumed = run(tmp_path, budget)
    assert 0 < before <= resumed.history[-1].elapsed_s
    assert resumed.resumed_from_step is not None
    assert list(resumed.history[: len(history) - 1]) == history[:-1]
    times = [e.elapsed_s for e in resumed.history]
    assert times == sorted(times) and 4.0 <= times[-1] < 4.0 + DEADLINE_S


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    result = run(tmp_path, "budget={epochs: 4}", "devices=2", "strategy=ddp")
    assert result.epochs == 4 and len(result.history) == 4
    assert result.history[-1].train_loss < result.history[0].train_loss


@pytest.mark.slow
def test_two_processes_stop_and_resume_together(tmp_path: Path) -> None:
    settings = ("budget={epochs: 30}", "devices=2", "strategy=ddp")
    assert stop(tmp_path, signal.SIGTERM, 2, *settings) == 143
    result = run(tmp_path, *settings)
    assert result.resumed_from_step is not None
    assert [e.epoch for e in result.history] == list(range(30))
