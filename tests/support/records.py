"""Small, complete examples of the records that training, evaluation and export hand on."""

from __future__ import annotations

from pathlib import Path

from ml.bundle import Lineage
from ml.results import (
    ClassScore,
    Epoch,
    Evaluation,
    ExportResult,
    Mistake,
    ModelMetadata,
    SeverityScore,
    TrainResult,
)
from ml.version import Version

HASH = "5f" * 32


def a_lineage(**changes: object) -> Lineage:
    """A lineage with a parent and a release."""
    lineage = Lineage(
        git_commit="41aa" * 10,
        git_dirty=False,
        config={"net": "convnet", "seed": 7},
        seed=7,
        lock_sha256=HASH,
        hardware={"cpu": "a processor", "cores": "2"},
        dataset="leaves",
        dataset_hash=HASH,
        parent=Version(1, 2, 0),
        release_id="release-1",
        packages={"python": "3.11.9", "torch": "2.13.0"},
    )
    return lineage.model_copy(update=changes)


def an_evaluation(**changes: object) -> Evaluation:
    """Three classes, one of them weak."""
    scores = [
        ClassScore(
            name=name, support=n, recall=r, recall_low=r - 0.05, recall_high=min(1, r + 0.03), precision=0.9, f1=0.91
        )
        for name, n, r in (("healthy", 100, 0.98), ("early_blight", 100, 0.88), ("mosaic", 50, 0.96))
    ]
    evaluation = Evaluation(
        dataset="leaves",
        dataset_hash=HASH,
        split="test",
        holdout_hash=HASH,
        images=250,
        accuracy=0.936,
        accuracy_low=0.899,
        accuracy_high=0.960,
        macro_f1=0.931,
        missed_disease_rate=0.067,
        classes=tuple(scores),
        by_severity=(SeverityScore(low=0.0, high=0.25, images=60, accuracy=0.81),),
        confusion=((98, 2, 0), (9, 88, 3), (1, 1, 48)),
        ece_before=0.06,
        ece_after=0.007,
        temperature=0.71,
        ood_threshold=-2.4,
        ood_flagged_share=0.05,
        latency_p50_ms=0.34,
        mistakes=(
            Mistake(
                path="early_blight/0001.jpg",
                label="early_blight",
                predicted="healthy",
                probability=0.97,
                picture="mistakes/00.png",
            ),
        ),
        pictures=("confusion.png",),
    )
    return evaluation.model_copy(update=changes)


def a_training(**changes: object) -> TrainResult:
    """One epoch."""
    epoch = Epoch(
        epoch=0,
        step=100,
        elapsed_s=12.0,
        train_loss=0.5,
        val_loss=0.4,
        val_accuracy=0.94,
        learning_rate=4e-3,
        images_per_s=1900,
    )
    result = TrainResult(
        checkpoint=Path("checkpoint.ckpt"),
        net="convnet",
        px=64,
        seed=7,
        epochs=1,
        steps=100,
        elapsed_s=61.4,
        images_per_s=1900,
        best_val_accuracy=0.944,
        dataset="leaves",
        dataset_hash=HASH,
        hardware={"cpu": "a processor", "cores": "2"},
        resumed_from_step=None,
        history=(epoch,),
    )
    return result.model_copy(update=changes)


def an_export(**changes: object) -> ExportResult:
    """A model that passed its checks."""
    result = ExportResult(
        onnx=Path("model.onnx"),
        sha256=HASH,
        size_bytes=428_000,
        opset=20,
        parity_images=250,
        parity_max_abs_diff=1.2e-7,
        parity_argmax_equal=True,
        latency_p50_ms=0.31,
        latency_p99_ms=0.52,
        torch_latency_p50_ms=0.84,
        int8_considered=False,
        int8_taken=False,
        int8_reason="not asked for",
    )
    return result.model_copy(update=changes)


def a_metadata(**changes: object) -> ModelMetadata:
    """Belongs to `an_evaluation`."""
    metadata = ModelMetadata(
        net="convnet",
        classes=("healthy", "early_blight", "mosaic"),
        healthy_classes=("healthy",),
        px=64,
        decode_contract="khet-decode/1",
        temperature=0.71,
        ood_method="energy",
        ood_threshold=-2.4,
        embedding_size=128,
        dataset="leaves",
        dataset_hash=HASH,
        seed=7,
        created_at="2026-05-04T08:00:00+00:00",
    )
    return metadata.model_copy(update=changes)
