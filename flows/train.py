"""Train a model and store it, without releasing it: a release's training step as a deployment of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, runtime
from pydantic import Field

from configs.base import validate
from configs.errors import IntegrityError, KhetError
from configs.settings import settings
from configs.training import TrainingConfig
from flows.release import DEFAULT_CONFIG, load_config
from flows.session import run_tail
from flows.systems import requester, work_folder
from ml.checkpoint_store import BEST, Finished, TrainingStore, fingerprint
from ml.dataset import Dataset
from ml.results import Record
from tasks import audit
from tasks.datasets import dataset_info
from tasks.datasets.steps import check_data
from tasks.prefect_support import show_markdown
from tasks.progress import report
from tasks.rollout import journal
from tasks.training.steps import train_and_store, training_address


class Training(Record):
    """A training that is stored, or (`dry_run`) what it would be. `folder`: where its files are on this machine."""

    training_id: str
    outcome: Literal["trained", "dry_run"]
    address: str
    folder: Path
    steps: tuple[str, ...] = ()
    val_accuracy: float | None = None
    epochs: int | None = None
    finished_at: datetime | None = None
    files: dict[str, str] = Field(default={}, description="SHA-256 by name.")


def run_name() -> str:
    """The flow run's name, by which people find it."""
    return f"train-{training_id(runtime.flow_run.get_parameters().get('resume'))}"


@flow(name="train", flow_run_name=run_name, validate_parameters=True)
def train(
    config: str = DEFAULT_CONFIG,
    data: str | None = None,
    resume: str | None = None,
    values: dict[str, Any] | None = None,
    dataset_hash: str | None = None,
    dry_run: bool = False,
) -> Training:
    """Train, and store the result in the object store; a run that was evicted is gone on with from its checkpoint.

    Args:
        config: Training configuration, a YAML file of the project.
        data: Name of an imported dataset. Empty: the configuration's.
        resume: Id of a training to go on with, or to fetch when it is done. A release gives its own.
        values: The configuration itself instead of its file, as a release read it.
        dataset_hash: Refuse a dataset whose manifest has another hash.
        dry_run: Show what would be done, change nothing.

    Raises:
        ConfigError: the configuration or the dataset is wrong; nothing was trained.
        IntegrityError: the dataset is another than the one that was asked for.
        KhetError: the training failed; its checkpoints are kept.
    """
    training = training_id(resume)
    chosen = validate(TrainingConfig, values, source="values") if values is not None else load_config(config, data)
    if dry_run:
        return show_plan(training, chosen)
    dataset = Dataset.open(check_data(training, chosen.dataset))
    refuse_other_data(dataset, dataset_hash)
    folder = work_folder(training) / "training"
    with recorded(training, chosen):
        found = train_and_store(training, chosen, dataset.root, folder)
    return trained(training, found, folder)


def training_id(given: str | None) -> str:
    """The id of this training: the one that was given, else that of the flow run.

    Raises:
        ConfigError: what was given cannot be one.
    """
    if given is None:
        return run_tail(runtime.flow_run.get_id())
    journal.key(given)
    return given


def refuse_other_data(dataset: Dataset, expected: str | None) -> None:
    """Raise IntegrityError when the dataset is not the one whose hash was given."""
    if expected is not None and dataset.manifest_hash != expected:
        raise IntegrityError(
            f"Dataset {dataset.name} has the manifest {dataset.manifest_hash[:12]}, and {expected[:12]} was asked for: "
            "it was imported anew since. Nothing was trained.\nNext: start a new release."
        )


@contextlib.contextmanager
def recorded(training: str, config: TrainingConfig) -> Iterator[None]:
    """Leave records of what is about to be stored, by whom, and how it ended."""
    log = audit.audit(settings())
    plan = {"config": config.model_dump(mode="json"), "address": training_address(settings(), training)}

    def note(outcome: audit.Outcome, detail: str = "") -> None:
        log.record(requester(), "train", training, plan, outcome, detail, training)

    note("intended")
    try:
        yield
    except KhetError as error:
        note("failed", str(error).partition("\n")[0])
        raise
    note("done")


def trained(training: str, found: Finished, folder: Path) -> Training:
    """What the flow answers with."""
    return Training(
        training_id=training,
        outcome="trained",
        address=training_address(settings(), training),
        folder=folder,
        val_accuracy=found.result.best_val_accuracy,
        epochs=found.result.epochs,
        finished_at=found.finished_at,
        files={name: entry.sha256 for name, entry in found.files.items()},
    )


def show_plan(training: str, config: TrainingConfig) -> Training:
    """What would be done, in sentences; nothing is changed.

    Raises:
        ConfigError: there is no such dataset.
    """
    current, address = settings(), training_address(settings(), training)
    info = dataset_info(config.dataset, current)
    run = fingerprint(config, info.manifest_hash)
    kept = TrainingStore.at(address, run, current.object_store)
    sentences = plan(config, kept)
    for sentence in sentences:
        get_run_logger().info("would: %s", sentence)
        report("plan", "note", f"would: {sentence}")
    numbered = [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)]
    show_markdown(f"plan-{training}", "\n".join(["# What a training would do", "", *numbered]), "Dry run")
    folder = work_folder(training) / "training"
    return Training(training_id=training, outcome="dry_run", address=address, folder=folder, steps=sentences)


def plan(config: TrainingConfig, kept: TrainingStore) -> tuple[str, ...]:
    """A training in sentences, by what is stored of it."""
    if (found := kept.finished()) is not None:
        return (f"bring what was trained on {found.finished_at:%Y-%m-%d %H:%M} UTC and is stored in {kept.address}",)
    state = kept.newest()
    begin = f"go on from step {state.step}, stored on {state.written_at:%Y-%m-%d %H:%M} UTC" if state else "begin anew"
    budget = f"{config.budget.seconds:.0f} s" if config.budget.seconds else f"{config.budget.epochs} epochs"
    return (
        f"check dataset {config.dataset}",
        f"train {config.net} at {config.px} px for {budget}: {begin}",
        f"keep checkpoints, and then {BEST} with its configuration and lineage, in {kept.address}",
    )
