"""Prefect tasks around the registry."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.settings import settings
from configs.training import TrainingConfig
from ml.bundle import Lineage
from ml.checkpoint_store import LINEAGE
from ml.lineage import collect_lineage
from ml.results import Evaluation, ExportResult, ModelMetadata, TrainResult
from ml.version import Version
from tasks.prefect_support import RETRY_DELAYS, by_release, retry_external, show_markdown
from tasks.progress import report
from tasks.registry import Registry
from tasks.registry.card import render_card


@dataclass(frozen=True, slots=True)
class Publication:
    """What becomes a version. `folder` is the release's work folder with train/, export/ and evaluation/."""

    folder: Path
    config: TrainingConfig
    trained: TrainResult
    exported: ExportResult
    evaluation: Evaluation
    parent: Version | None
    created_by: str


@task(
    name="fetch-version",
    task_run_name="fetch-{version}",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=3600,
)
def fetch_version(release_id: str, version: Version, folder: Path) -> Path:  # noqa: ARG001
    """Bring a published version here, verified; returns its folder."""
    return Registry.from_settings(settings()).fetch(version, folder).folder


@task(
    name="publish",
    task_run_name="publish-{release_id}",
    persist_result=True,
    cache_key_fn=by_release,
    retries=4,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=3600,
)
def publish(release_id: str, publication: Publication) -> Version:
    """Store every file under the next free version and its manifest last; the same release gets the same version."""
    registry = Registry.from_settings(settings())
    version = registry.reserve(owner=release_id)
    folder = assemble(release_id, version, publication)
    registry.publish(
        version,
        folder,
        lineage=lineage_of(release_id, publication),
        metrics=_metrics(publication.evaluation),
        created_by=publication.created_by,
        on_progress=lambda done, total: report("publish", "running", f"{version}", done / max(total, 1)),
    )
    registry.move_alias("candidate", version, by=publication.created_by, reason=f"published by release {release_id}")
    show_markdown(f"model-card-{release_id}", (folder / "model_card.md").read_text(), f"Model card of {version}")
    return version


def assemble(release_id: str, version: Version, publication: Publication) -> Path:
    """Lay out the version's files as they are stored; the same input gives the same bytes."""
    work, target = publication.folder, publication.folder / "bundle"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("model.onnx", "metadata.json"):
        shutil.copy2(work / "export" / name, target / name)
    shutil.copytree(work / "evaluation", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.log", ".*"))
    shutil.copy2(work / "train" / "curves.png", target / "curves.png")
    shutil.copy2(publication.trained.checkpoint, target / "checkpoint.ckpt")
    # Paths of this machine mean nothing to a reader of the version.
    trained = publication.trained.model_copy(update={"checkpoint": Path("checkpoint.ckpt")})
    trained.write(target / "train.json")
    publication.exported.model_copy(update={"onnx": Path("model.onnx")}).write(target / "export.json")
    config = json.loads(publication.config.model_dump_json())
    (target / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (target / "model_card.md").write_text(_card(release_id, version, publication, trained), encoding="utf-8")
    return target


def _card(release_id: str, version: Version, publication: Publication, trained: TrainResult) -> str:
    metadata = ModelMetadata.read(publication.folder / "export" / "metadata.json")
    lineage = lineage_of(release_id, publication)
    return render_card(version, publication.evaluation, trained, publication.exported, metadata, lineage)


def lineage_of(release_id: str, publication: Publication) -> Lineage:
    """Where the version comes from; what trained elsewhere says so itself."""
    made_elsewhere = publication.folder / "train" / LINEAGE
    if made_elsewhere.exists():  # by other packages, maybe, than those of this process
        made = Lineage.read(made_elsewhere)
        return made.model_copy(update={"parent": publication.parent, "release_id": release_id})
    return collect_lineage(
        config=json.loads(publication.config.model_dump_json()),
        seed=publication.trained.seed,
        dataset=publication.trained.dataset,
        dataset_hash=publication.trained.dataset_hash,
        trained_on=publication.trained.hardware,
        parent=publication.parent,
        release_id=release_id,
    )


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    metrics = {"accuracy": evaluation.accuracy, "macro_f1": evaluation.macro_f1, "ece": evaluation.ece_after}
    if evaluation.missed_disease_rate is not None:
        metrics["missed_disease_rate"] = evaluation.missed_disease_rate
    return metrics
