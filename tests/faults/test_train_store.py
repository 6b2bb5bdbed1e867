"""A training that keeps its states in an object store outlives its machine, and the store's absence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.areas import ObjectStoreSettings
from configs.errors import ExternalError
from configs.settings import PROJECT_ROOT
from ml import progress
from ml.checkpoint_store import RESULT, Checkpoint, TrainingStore, fingerprint
from ml.dataset import Dataset
from ml.objects import ObjectStore
from ml.results import TrainResult
from ml.train import load_config
from tests.faults.test_train_resume import command, state, untimed
from tests.support.local_stack import wait_until
from tests.support.s3 import as_environment, unique
from tests.support.stack import object_store, start_object_store, stop_parts
from tests.support.training import CONFIGS, dataset

# So many that a training is far from its end when the test, on a busy machine too, has seen its first states.
EPOCHS = 60
BUDGET = f"budget={{epochs: {EPOCHS}}}"
DEADLINE_S = 120.0


class Training:
    """`python -m ml.train --store ...` in a folder of its own, as a pod runs it."""

    def __init__(self, store: ObjectStoreSettings, tmp: Path, **connection: object) -> None:
        self.prefix, self.out, self.log = unique("training"), tmp / "out", tmp / "train.log"
        self._store = store
        self._environment = {
            **os.environ,
            **as_environment(store, **connection),
            "KHET_TRAINING__CHECKPOINT_EVERY_S": "0",
        }

    def start(self) -> subprocess.Popen[bytes]:
        argv = [*command(self.out, BUDGET), "--store", f"s3://{self._store.models_bucket}/{self.prefix}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(argv, cwd=PROJECT_ROOT, env=self._environment, stdout=log, stderr=log)

    def run(self) -> TrainResult:
        assert self.start().wait(DEADLINE_S) == 0, self.said()
        return TrainResult.read(self.out / RESULT)

    def said(self) -> str:
        return self.log.read_text()

    def stored(self) -> TrainingStore:
        overrides = [part for part in command(self.out, BUDGET) if "=" in part]
        run = fingerprint(load_config(CONFIGS / "smoke.yaml", overrides), Dataset.open(dataset()).manifest_hash)
        return TrainingStore(ObjectStore(self._store), self._store.models_bucket, self.prefix, run)

    def stop_in_an_epoch(self, process: subprocess.Popen[bytes], number: int) -> Checkpoint:
        """Send a signal when two states are stored and another epoch has begun; returns the newest state then."""
        stored = self.stored()
        try:
            wait_until(
                "a state of the third epoch", lambda: (found := stored.newest()) and found.epoch >= 2, DEADLINE_S
            )
            process.send_signal(number)
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()
        assert not (self.out / RESULT).exists(), "it ended before it was stopped"
        found = stored.newest()
        assert found is not None
        return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(out, BUDGET), cwd=PROJECT_ROOT, timeout=DEADLINE_S, check=True, capture_output=True)
    return out, TrainResult.read(out / RESULT)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["killed", "evicted"]
)
def test_a_training_goes_on_in_an_empty_folder_and_ends_with_the_very_same_weights(
    store: ObjectStoreSettings, undisturbed: tuple[Path, TrainResult], tmp_path: Path, number: int
) -> None:
    training, (theirs, expected) = Training(store, tmp_path), undisturbed
    found = training.stop_in_an_epoch(training.start(), number)
    shutil.rmtree(training.out)
    resumed = training.run()
    assert resumed.resumed_from_step == found.step > 0
    assert (resumed.epochs, resumed.steps) == (EPOCHS, expected.steps)
    assert untimed(resumed.history) == untimed(expected.history)
    assert all(torch.equal(value, state(theirs)[name]) for name, value in state(training.out).items())
    assert f"Going on from step {found.step}" in training.said()

    best = (training.out / "best.ckpt").read_bytes()
    shutil.rmtree(training.out)
    again = training.run()
    assert again == resumed, "asked again it answers with what is stored"
    assert (training.out / "best.ckpt").read_bytes() == best
    assert not (training.out / "last.ckpt").exists()


@pytest.mark.slow
def test_a_truncated_state_is_passed_over(store: ObjectStoreSettings, tmp_path: Path) -> None:
    training = Training(store, tmp_path)
    newest = training.stop_in_an_epoch(training.start(), signal.SIGKILL)
    objects, [key] = (
        ObjectStore(store),
        [
            found.key
            for found in ObjectStore(store).list(store.models_bucket, training.prefix)
            if newest.files["last.ckpt"].sha256 in found.key
        ],
    )
    objects.put(store.models_bucket, key, objects.get(store.models_bucket, key)[:-1000])
    shutil.rmtree(training.out)
    resumed = training.run()
    assert resumed.resumed_from_step is not None and 0 < resumed.resumed_from_step < newest.step
    assert [epoch.epoch for epoch in resumed.history] == list(range(EPOCHS))
    assert f"The checkpoint of step {newest.step} is damaged; taking the one before" in training.said()


def test_an_outage_of_the_store_stops_no_training_but_its_result_has_to_be_stored(tmp_path: Path) -> None:
    home = tmp_path / "s3"
    training = Training(start_object_store(home), tmp_path, patience_s=1, max_attempts=1, connect_timeout_s=1)
    stored = training.stored()
    process = training.start()
    try:
        wait_until("a first state", stored.newest, DEADLINE_S)
        process.send_signal(signal.SIGSTOP)
        stop_parts(home, signal.SIGKILL)
        assert len(progress.read(training.out / progress.FILE)[0]) < EPOCHS, "it ended before the store did"
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(DEADLINE_S) == ExternalError.exit_code, training.said()
    assert len(progress.read(training.out / progress.FILE)[0]) == EPOCHS
    assert training.said().count("Checkpoints are not being stored; training goes on.") == 1
    start_object_store(home)
    assert stored.finished() is None
    training.run()
    found = stored.finished()
    assert found is not None and found.result.epochs == EPOCHS
    assert found.lineage.packages["torch"] and found.lineage.dataset_hash == Dataset.open(dataset()).manifest_hash
    stop_parts(home)
