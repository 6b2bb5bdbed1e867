"""From data to a published version: the part of a release that touches no traffic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import Task, get_run_logger

from configs.errors import IntegrityError, KhetError, SafetyError
from configs.training import TrainingConfig
from flows.planning import foreseen
from flows.session import ReleaseSession, baseline_wanted
from flows.systems import requester, systems, work_folder
from ml.dataset import Dataset
from ml.predictions import PREDICTIONS
from ml.results import Evaluation, ExportResult, ModelMetadata, TrainResult
from ml.version import Version
from tasks.datasets.steps import check_data
from tasks.progress import report
from tasks.registry.steps import Publication, fetch_version, publish
from tasks.rollout.gate import comparable
from tasks.rollout.holdout import Ledger, Scored
from tasks.rollout.journal import ReleaseRecord, utc_now
from tasks.rollout.procedure import plan_rollout
from tasks.rollout.replay import Probe
from tasks.rollout.steps import gate
from tasks.rollout.verdict import Decision, Verdict
from tasks.training.elsewhere import Order, cancel_trainings, ensure_deployment, train_elsewhere
from tasks.training.steps import evaluate, evaluate_champion, export, train


@dataclass(frozen=True, slots=True)
class Candidate:
    """A challenger and what is known of it. `version` is None until it passed the gate and was published."""

    version: Version | None
    config: TrainingConfig
    dataset: Dataset
    folder: Path
    trained: TrainResult | None
    exported: ExportResult
    evaluation: Evaluation
    champion_evaluation: Evaluation | None
    gate: Verdict

    @property
    def comparable(self) -> bool:
        """Whether its answers can be compared with the champion's."""
        return self.champion_evaluation is not None and comparable(self.evaluation, self.champion_evaluation)

    def probes(self, limit: int) -> Sequence[Probe]:
        """Holdout photos with their labels, evenly over the classes."""
        return holdout_probes(self.dataset, limit)


@dataclass(frozen=True, slots=True)
class _Model:
    """Where the challenger's files are, and which published version they are, if any."""

    folder: Path
    trained: TrainResult | None
    exported: ExportResult
    version: Version | None


def build_candidate(session: ReleaseSession, config: TrainingConfig, version: str | None) -> Candidate:
    """Train (or fetch) a model, score it, hold it against the champion, and publish it when it passes.

    A resumed release finds what was done before in Prefect's cache or on disk, and goes on after it.
    """
    dataset = Dataset.open(session.run("check data", check_data, session.id, _dataset_name(session, config, version)))
    model = _published(session, version) if version else _trained(session, config, dataset)
    work = work_folder(session.id)
    onnx = model.folder / "model.onnx"
    scored = _scores(session, "evaluate", evaluate, onnx, dataset, work / "evaluation")
    champion = _champion_scores(session, dataset, work)
    name = str(model.version) if model.version else None
    verdict = session.run("gate", gate, session.id, scored, model.exported, champion, dataset.healthy_classes, name)
    session.note(verdict)
    candidate = Candidate(
        model.version,
        config,
        dataset,
        model.folder,
        model.trained,
        model.exported,
        scored.evaluation,
        champion.evaluation if champion else None,
        verdict,
    )
    if verdict.decision is Decision.rollback:
        return candidate
    return _publish(session, candidate)


def _dataset_name(session: ReleaseSession, config: TrainingConfig, version: str | None) -> str:
    """A published version is tried on the data it was made from, unless another set was asked for."""
    if version and session.record.parameters.get("data") is None:
        return session.systems.registry.manifest(Version.parse(version)).lineage.dataset
    return config.dataset


def _trained(session: ReleaseSession, config: TrainingConfig, dataset: Dataset) -> _Model:
    work = work_folder(session.id)
    gone = not (work / "train" / "train.json").exists()  # a cached result is worth nothing without its files
    if session.systems.settings.training.where == "deployment":
        trained = _trained_elsewhere(session, Order(session.id, config, dataset.manifest_hash), work / "train", gone)
    else:
        step = train.with_options(refresh_cache=gone)
        trained = session.run("train", step, session.id, config, dataset.root, work / "train")
    gone = not (work / "export" / "export.json").exists()
    exported = session.run(
        "export", export.with_options(refresh_cache=gone), session.id, trained, dataset.root, work / "export"
    )
    return _Model(work / "export", trained, exported, None)


def _trained_elsewhere(session: ReleaseSession, order: Order, folder: Path, gone: bool) -> TrainResult:
    """Have the deployment train. It goes on when this process dies, and ends when this release is ended."""
    step = train_elsewhere.with_options(refresh_cache=gone)
    try:
        return session.run("train", step, session.id, order, folder, session.guard)
    except (KeyboardInterrupt, SafetyError) as error:
        # A release that was resumed elsewhere took the lease, and follows the same training.
        if isinstance(error, KeyboardInterrupt) or session.taken_over():
            _end_training(session.id)
        raise


def _end_training(release_id: str) -> None:
    """Cancel what the deployment trains for a release. The error that ended the release is the one to report."""
    try:
        ended = cancel_trainings(release_id)
    except KhetError as error:
        sentence = f"the training could not be cancelled: {error}"
    else:
        sentence = f"cancelled training run {', '.join(ended)}" if ended else "no training was going on"
    get_run_logger().warning(sentence)
    report("train", "note", sentence)


def _published(session: ReleaseSession, version: str) -> _Model:
    wanted = Version.parse(version)
    folder = session.run("fetch", fetch_version, session.id, wanted, work_folder(session.id) / "fetched")
    trained = TrainResult.read(folder / "train.json") if (folder / "train.json").exists() else None
    return _Model(folder, trained, ExportResult.read(folder / "export.json"), wanted)


def _scores(
    session: ReleaseSession, stage: str, step: Task[..., Evaluation], onnx: Path, dataset: Dataset, folder: Path
) -> Scored:
    """A model's scores on the holdout. Cached ones count only with their single answers beside them."""
    gone = not (folder / PREDICTIONS).exists()
    evaluation = session.run(stage, step.with_options(refresh_cache=gone), session.id, onnx, dataset.root, folder)
    return Scored(evaluation, folder / PREDICTIONS)


def _champion_scores(session: ReleaseSession, dataset: Dataset, work: Path) -> Scored | None:
    """The champion on the same holdout; None without a champion, or when it knows other classes."""
    champion = session.champion
    if champion is None:
        return None
    folder = work / "champion"
    bundle = session.systems.registry.fetch(champion, folder, only=("model.onnx", "metadata.json"))
    metadata = ModelMetadata.read(bundle.path("metadata.json"))
    if metadata.classes != dataset.classes:
        session.say(f"the champion {champion} knows other classes than this data: their answers are not compared")
        return None
    onnx, folder = bundle.path("model.onnx"), work / "champion-evaluation"
    return _scores(session, "evaluate champion", evaluate_champion, onnx, dataset, folder)


def _publish(session: ReleaseSession, candidate: Candidate) -> Candidate:
    if candidate.version is not None or candidate.trained is None:
        session.change(version=str(candidate.version))
        return candidate
    publication = Publication(
        folder=work_folder(session.id),
        config=candidate.config,
        trained=candidate.trained,
        exported=candidate.exported,
        evaluation=candidate.evaluation,
        parent=session.champion,
        created_by=session.record.requested_by,
    )
    version = session.run("publish", publish, session.id, publication)
    session.change(version=str(version))
    session.audit("publish", str(version), "done")
    ledger = Ledger(session.systems.store, session.systems.bucket)
    ledger.name_version(candidate.evaluation.holdout_hash, session.id, str(version))
    return dataclasses.replace(candidate, version=version)


def holdout_probes(dataset: Dataset, limit: int) -> Sequence[Probe]:
    """Up to `limit` photos of the test split, taken in turn from each class.

    Raises:
        IntegrityError: the split is empty, or a photo is not what the manifest says.
    """
    by_class: dict[str, list[tuple[str, str]]] = {}
    for row in dataset.rows_of("test").select(["label", "path", "sha256"]).to_pylist():
        by_class.setdefault(row["label"], []).append((row["path"], row["sha256"]))
    longest = max(map(len, by_class.values()), default=0)
    turns = [(label, files[i]) for i in range(longest) for label, files in by_class.items() if i < len(files)]
    if not turns:
        raise IntegrityError(f"The test split of {dataset.name} is empty: there is nothing to try a canary on.")
    return [Probe(dataset.read(path, sha256), label) for label, (path, sha256) in turns[:limit]]


def plan_candidate(run_id: str, config: TrainingConfig, version: Version | None) -> tuple[ReleaseRecord, list[str]]:
    """What a release would do now, in sentences, with what would stop it at once."""
    connected = systems()
    production = connected.registry.alias("production")
    champion = production.version if production else None
    next_version = version or connected.registry.next_version()
    plan = plan_rollout(
        next_version,
        champion,
        connected.settings.canary,
        replicas=connected.settings.cluster.replicas,
        canary=connected.settings.cluster.canary_replicas,
        baseline=champion is not None and baseline_wanted(connected),
    )
    record = ReleaseRecord(
        release_id=run_id,
        outcome="dry_run",
        started_at=utc_now(),
        finished_at=utc_now(),
        requested_by=requester(),
        parameters={"config": json.loads(config.model_dump_json())},
        version=str(next_version),
        champion=str(champion) if champion else None,
    )
    pool = None
    if version is None and connected.settings.training.where == "deployment":
        pool = ensure_deployment(connected.settings)
    sentences = [*_build_sentences(config, version, champion, pool), *plan.describe()]
    return record, [*sentences, *foreseen(connected, plan)]


def _build_sentences(
    config: TrainingConfig, version: Version | None, champion: Version | None, pool: str | None
) -> list[str]:
    against = f"the floors and {champion} on the same holdout" if champion else "the floors (there is no champion yet)"
    if version is not None:
        return [f"fetch and verify {version}, score it, hold it against {against}"]
    budget = f"{config.budget.seconds:.0f} s" if config.budget.seconds else f"{config.budget.epochs} epochs"
    where = f" in work pool {pool}" if pool else ""
    return [
        f"check dataset {config.dataset}",
        f"train {config.net} at {config.px} px for {budget}{where}, export it to ONNX, score it on the test split",
        f"hold it against {against}",
        "publish it, signed, as the next version",
    ]
