"""One model trained by several pods: two torchrun agents stand for them, each with a CPU process (gloo).

Each has a folder of its own, as pods have; what they share is the object store.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError
from configs.settings import PROJECT_ROOT
from ml.checkpoint_store import Checkpoint, TrainingStore, fingerprint
from ml.dataset import Dataset
from ml.objects import ObjectStore
from ml.results import TrainResult
from ml.train import load_config, train
from tests.support.local_stack import wait_until
from tests.support.s3 import as_environment
from tests.support.stack import object_store
from tests.support.training import CONFIGS, config, dataset

EPOCHS = 30
DEADLINE_S = 240.0


OVERRIDES = (
    "tracking=false",
    "accelerator=cpu",
    "threads=1",
    "strategy=ddp",
    "nodes=2",
    f"budget={{epochs: {EPOCHS}}}",
)


def pods(tmp: Path, store: ObjectStoreSettings) -> list[subprocess.Popen[bytes]]:
    """What deployments/kubernetes/training/torchrun starts, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sets = [part for value in OVERRIDES for part in ("--set", value)]
    asked = ["--config", str(CONFIGS / "smoke.yaml"), "--data", str(dataset()), "--store", "training/pods"]
    module = ["--module", "ml.train", *asked]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    meet = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=khet-train", "--local-addr=127.0.0.1"]
    environment = {**os.environ, **as_environment(store), "KHET_TRAINING__CHECKPOINT_EVERY_S": "0"}
    return [
        subprocess.Popen(
            [*agent, *meet, f"--node-rank={rank}", *module, *sets, "--out", str(folder(tmp, rank))],
            cwd=PROJECT_ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip


def folder(tmp: Path, rank: int) -> Path:
    return tmp / f"pod-{rank}"


def stored(store: ObjectStoreSettings) -> TrainingStore:
    run = fingerprint(load_config(CONFIGS / "smoke.yaml", OVERRIDES), Dataset.open(dataset()).manifest_hash)
    return TrainingStore(ObjectStore(store), store.models_bucket, "training/pods", run)


def wait(running: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [process.wait(DEADLINE_S) for process in running]


@pytest.mark.slow
def test_evicted_pods_train_on_from_the_object_store(tmp_path: Path) -> None:
    with object_store(tmp_path / "s3") as store:
        kept = stored(store)
        running = pods(tmp_path, store)

        def begun() -> Checkpoint | None:
            assert all(process.poll() is None for process in running)
            return found if (found := kept.newest()) is not None and found.epoch >= 2 else None

        try:
            wait_until("states are stored", begun, DEADLINE_S)
            for process in running:
                process.send_signal(signal.SIGTERM)
            assert all(code != 0 for code in wait(running))
            newest = kept.newest()
            assert newest is not None and kept.finished() is None
            # One pod goes to another node, the other starts again where it was, with what it has there.
            shutil.rmtree(folder(tmp_path, 1))
            running = pods(tmp_path, store)
            assert wait(running) == [0, 0]
        finally:
            for process in running:
                process.kill()
        found = kept.finished()
    result = TrainResult.read(folder(tmp_path, 0) / "train.json")
    assert found is not None and found.result.history == result.history
    assert result.resumed_from_step == newest.step > 0
    assert [epoch.epoch for epoch in result.history] == list(range(EPOCHS))
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert not (folder(tmp_path, 1) / "train.json").exists(), "the first pod stores the result, for all"


def test_several_machines_without_their_launcher_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torchrun --nnodes=2"):
        train(config(nodes=2), dataset(), tmp_path)
