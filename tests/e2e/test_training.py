"""A release whose training is a run of the deployment `train`, in the stack's own worker."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from ml.objects import ObjectStore
from ml.results import TrainResult
from tests.support.local_stack import LocalStack, kill, wait_until

pytestmark = pytest.mark.timeout(600)
# Long enough to be interrupted in, short enough to be waited for.
STEADY = "dataset: leaves\nbudget: {seconds: 25}\npx: 32\nbatch_size: 64\noptimizer: {lr: 0.004}\n"


@pytest.fixture(scope="module")
def apart(stack: LocalStack) -> LocalStack:
    """The same stack, for releases that let the deployment train."""
    stack.khet("deploy")
    return LocalStack(stack.home, {**stack.environment, "KHET_TRAINING__WHERE": "deployment"}, stack.faults)


@pytest.fixture
def steady(tmp_path: Path) -> Path:
    (tmp_path / "steady.yaml").write_text(STEADY)
    return tmp_path / "steady.yaml"


def trainings(stack: LocalStack, release_id: str) -> list[dict[str, Any]]:
    """The runs that Prefect knows of a release's training."""
    wanted = {"flow_runs": {"tags": {"all_": [f"release:{release_id}"]}}}
    api = stack.settings()["orchestrator"]["api_url"]
    found: list[dict[str, Any]] = httpx.post(f"{api}/flow_runs/filter", json=wanted, timeout=20).json()
    return found


def stored(stack: LocalStack, release_id: str) -> list[str]:
    store = stack.typed().object_store
    return [found.key for found in ObjectStore(store).list(store.models_bucket, f"training/{release_id}/")]


def test_the_worker_trains_and_the_release_goes_on_with_what_it_stored(apart: LocalStack, bad: Path) -> None:
    done = apart.khet("release", "--config", str(bad), code=3)
    assert "stopped at the gate" in done.stderr
    record = apart.releases()[-1]
    [run] = trainings(apart, record["release_id"])
    assert (run["name"], run["state_type"]) == (f"train-{record['release_id']}", "COMPLETED")
    assert [(s["name"], s["state"]) for s in record["stages"]][:3] == [
        ("check data", "done"), ("train", "done"), ("export", "done"),
    ]  # fmt: skip
    work = apart.home / "work" / record["release_id"]
    result = TrainResult.read(work / "train" / "train.json")
    assert result.checkpoint == work / "train" / "best.ckpt" and result.checkpoint.exists()
    assert not (work / "train" / "train.log").exists(), "nothing was trained in the release's own folder"
    assert [key for key in stored(apart, record["release_id"]) if key.endswith("result.json")]


def begun(stack: LocalStack, config: Path) -> tuple[Any, str, dict[str, Any]]:
    """A release whose training has a checkpoint in the store: its process, its id, the training's run."""
    known = {record["release_id"] for record in stack.releases()}
    process = stack.begin("release", "--config", str(config))

    def training() -> str | None:
        assert process.poll() is None, "the release ended before it trained"
        new = [r["release_id"] for r in stack.releases() if r["release_id"] not in known]
        return new[0] if new and any("/checkpoints/" in key for key in stored(stack, new[0])) else None

    release_id = wait_until("a checkpoint is stored", training, timeout_s=200, poll_s=0.5)
    [run] = trainings(stack, release_id)
    return process, release_id, run


@pytest.mark.slow
def test_a_killed_release_joins_its_training_when_it_is_resumed(apart: LocalStack, steady: Path) -> None:
    process, release_id, run = begun(apart, steady)
    kill(process)
    ended = apart.khet("release", "--resume", release_id, code=None)
    assert ended.returncode in (0, 3), ended.stderr
    [found] = trainings(apart, release_id)
    assert (found["id"], found["state_type"]) == (run["id"], "COMPLETED")


@pytest.mark.slow
def test_an_interrupted_release_ends_its_training(apart: LocalStack, steady: Path) -> None:
    process, release_id, run = begun(apart, steady)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0

    def over() -> bool:
        [found] = trainings(apart, release_id)
        assert found["id"] == run["id"] and found["state_type"] != "COMPLETED"
        return bool(found["state_type"] == "CANCELLED")

    wait_until("the worker has ended the training", over, timeout_s=120, poll_s=0.5)
    assert any("/checkpoints/" in key for key in stored(apart, release_id)), "what it had is kept"
