"""Prefect tasks around the model's own commands."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from configs.errors import IntegrityError
from configs.settings import Settings, settings
from configs.training import TrainingConfig
from ml.checkpoint_store import Finished, TrainingStore, fingerprint
from ml.dataset import Dataset
from ml.progress import Tick
from ml.results import Epoch, Evaluation, ExportResult, TrainResult
from tasks.prefect_support import (
    RETRY_DELAYS,
    ProgressArtifact,
    by_release,
    retry_external,
    show_markdown,
)
from tasks.progress import report
from tasks.training.child import run_child

HOURS = 3600.0
# Below the models bucket: one folder a training, which a release names after itself.
TRAININGS = "training/"
# An evicted training saves its state and sends it to the object store before it ends.
_SAVING_S = 60.0


def training_address(current: Settings, training_id: str) -> str:
    """Where a training keeps its states and its result."""
    return f"s3://{current.object_store.models_bucket}/{TRAININGS}{training_id}"


def progress_key(training_id: str) -> str:
    """Key of the progress bar of a training in the Prefect UI."""
    return f"training-{training_id}"


@task(
    name="train",
    task_run_name="train-{release_id}",
    persist_result=True,
    cache_key_fn=by_release,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=48 * HOURS,
)
def train(release_id: str, config: TrainingConfig, dataset_root: Path, folder: Path) -> TrainResult:
    """Train in a process of its own; a killed one goes on from its last epoch.

    Raises:
        KhetError: as `run_child`; production is unchanged.
    """
    _run_training(release_id, config, dataset_root, folder)
    return TrainResult.read(folder / "train.json")


@task(
    name="train-and-store",
    task_run_name="train-{training_id}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=48 * HOURS,
)
def train_and_store(training_id: str, config: TrainingConfig, dataset_root: Path, folder: Path) -> Finished:
    """The same, with states and result in the object store: it goes on from there in an empty folder.

    Raises:
        KhetError: as `run_child`; what was stored of states stays.
        IntegrityError: the trainer ended well, and yet its result is not in the store.
    """
    address = training_address(settings(), training_id)
    _run_training(training_id, config, dataset_root, folder, "--store", address)
    run = fingerprint(config, Dataset.open(dataset_root).manifest_hash)
    found = TrainingStore.at(address, run, settings().object_store).finished()
    if found is None:
        raise IntegrityError(f"The training ended, but its result is not in {address}. Next: run it again.")
    return found


def _run_training(training_id: str, config: TrainingConfig, dataset_root: Path, folder: Path, *more: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "requested.json"  # JSON is YAML too
    config_file.write_text(config.model_dump_json(indent=1), encoding="utf-8")
    watcher = _Watcher(training_id)
    run_child(
        ["ml.train", "--config", str(config_file), "--data", str(dataset_root), "--out", str(folder), *more],
        folder / "train.log",
        progress=folder / "progress.jsonl",
        on_line=watcher.see,
        stop_s=_SAVING_S,
    )
    watcher.finish(folder / "curves.png")


class _Watcher:
    """Turns the trainer's progress lines into one progress artifact, curves, log lines and terminal progress."""

    def __init__(self, training_id: str) -> None:
        self._key = progress_key(training_id)
        self._bar = ProgressArtifact(self._key, f"Training {training_id}")
        self._logger = get_run_logger()

    def see(self, line: dict[str, Any]) -> None:
        """Take one line of progress.jsonl, a validated epoch or a tick within one; or a warning."""
        if "epoch" in line:
            epoch = Epoch.model_validate(line["epoch"])
            self._logger.info(
                "epoch %d: val accuracy %.4f, val loss %.4f, %.0f images/s",
                epoch.epoch,
                epoch.val_accuracy,
                epoch.val_loss,
                epoch.images_per_s,
            )
            report("train", "running", f"epoch {epoch.epoch}: {epoch.val_accuracy:.1%} on validation")
        elif "warning" in line:
            self._logger.warning("%s", line["warning"])
            report("train", "note", line["warning"])
        elif "tick" in line:
            tick = Tick.model_validate(line["tick"])
            self._bar.update(tick.fraction)
            report("train", "running", f"loss {tick.loss:.3f}, {tick.images_per_s:.0f} images/s", tick.fraction)

    def finish(self, curves: Path) -> None:
        """Show the whole curve."""
        self._bar.update(1.0)
        # Inside a markdown card the picture needs no other server; an image artifact would print its whole address.
        encoded = base64.b64encode(curves.read_bytes()).decode("ascii")
        card = f"![Loss and accuracy over time](data:image/png;base64,{encoded})"
        show_markdown(f"{self._key}-curves", card, "Loss and accuracy over time")


@task(
    name="export",
    task_run_name="export-{release_id}",
    persist_result=True,
    cache_key_fn=by_release,
    retries=1,
    retry_condition_fn=retry_external,
    timeout_seconds=1 * HOURS,
)
def export(release_id: str, trained: TrainResult, dataset_root: Path, folder: Path) -> ExportResult:  # noqa: ARG001
    """Write and check model.onnx in a process of its own.

    Raises:
        GateError: parity, checker or int8 budget failed; the release stops here.
    """
    arguments = ["--checkpoint", str(trained.checkpoint), "--output_dir", str(folder), "--data", str(dataset_root)]
    report("export", "running", "tracing, checking parity, measuring latency")
    run_child(["ml.export", *arguments], folder / "export.log", on_line=lambda _: None)
    return ExportResult.read(folder / "export.json")


@task(
    name="evaluate",
    task_run_name="evaluate-{release_id}",
    persist_result=True,
    cache_key_fn=by_release,
    retries=1,
    retry_condition_fn=retry_external,
    timeout_seconds=1 * HOURS,
)
def evaluate(release_id: str, onnx: Path, dataset_root: Path, folder: Path) -> Evaluation:
    """Score an exported file on the holdout, with pictures, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--model", str(onnx), "--data", str(dataset_root), "--out", str(folder)]
    run_child(["ml.evaluate", *arguments], folder / "evaluate.log", on_line=lambda _: None)
    evaluation = Evaluation.read(folder / "evaluation.json")
    show_markdown(f"{folder.name}-{release_id}", _card(evaluation), f"Holdout scores ({folder.name})")
    return evaluation


# A task of its own in the UI and in the cache: the same work on the champion's file.
evaluate_champion = evaluate.with_options(name="evaluate-champion", task_run_name="evaluate-champion-{release_id}")


def _card(evaluation: Evaluation) -> str:
    missed = evaluation.missed_disease_rate
    lines = [
        f"**{evaluation.accuracy:.1%}** accuracy on {evaluation.images} holdout images "
        f"({evaluation.accuracy_low:.1%} to {evaluation.accuracy_high:.1%})",
        "",
        f"- macro F1 {evaluation.macro_f1:.3f}",
        f"- missed diseases {missed:.1%}" if missed is not None else "- no healthy class, so no missed-disease rate",
        f"- calibration error {evaluation.ece_before:.3f} before, {evaluation.ece_after:.3f} after temperature scaling",
        "",
        "| class | images | recall | 95 % interval |",
        "|---|---|---|---|",
        *[
            f"| {c.name} | {c.support} | {c.recall:.1%} | {c.recall_low:.1%} to {c.recall_high:.1%} |"
            for c in evaluation.classes
        ],
    ]
    return "\n".join(lines)
