"""What training, export and evaluation hand on: frozen records, written as JSON beside the files they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from configs.errors import IntegrityError


class Record(BaseModel):
    """A frozen value with a JSON file form."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def write(self, path: Path) -> Path:
        """Write as JSON, atomically: a reader sees the old file or the whole new one."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            IntegrityError: the file is missing, cut or holds something else.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise IntegrityError(f"{path} is not a readable {cls.__name__}: {error}") from error


class Epoch(Record):
    """One line of the training curve. Losses are mean cross-entropy in nats."""

    epoch: int
    step: int
    elapsed_s: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    images_per_s: float


class TrainResult(Record):
    """What a training run produced. `checkpoint` is the best by validation accuracy, with EMA weights."""

    checkpoint: Path
    net: str
    px: int
    seed: int
    epochs: int
    steps: int
    elapsed_s: float
    images_per_s: float
    best_val_accuracy: float
    dataset: str
    dataset_hash: str
    hardware: dict[str, str]
    resumed_from_step: int | None
    history: tuple[Epoch, ...]


class ExportResult(Record):
    """The exported file and the checks it passed. Latencies in milliseconds for one image, one thread."""

    onnx: Path
    sha256: str
    size_bytes: int
    opset: int
    parity_images: int
    parity_max_abs_diff: float
    parity_argmax_equal: bool
    latency_p50_ms: float
    latency_p99_ms: float
    torch_latency_p50_ms: float
    int8_considered: bool
    int8_taken: bool
    int8_reason: str


class ClassScore(Record):
    """Scores of one class; recall and precision with their 95 % Wilson intervals."""

    name: str
    support: int
    recall: float
    recall_low: float
    recall_high: float
    precision: float
    f1: float
    precision_low: float = 0.0
    precision_high: float = 1.0


class SeverityScore(Record):
    """Accuracy of the diseased images whose severity lies in [low, high)."""

    low: float
    high: float
    images: int
    accuracy: float


class SourceScore(Record):
    """Accuracy of the images of one source: a folder below the class folders, such as a camera, a farm or a season."""

    name: str
    images: int
    accuracy: float


class Mistake(Record):
    """One of the most confident errors. `picture` shows photo and occlusion map side by side."""

    path: str
    label: str
    predicted: str
    probability: float
    picture: str


class Evaluation(Record):
    """How a model does on one split. Shares are in [0, 1]; `confusion[i][j]`: class i taken for class j."""

    dataset: str
    dataset_hash: str
    split: str
    holdout_hash: str
    images: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macro_f1: float
    missed_disease_rate: float | None
    classes: tuple[ClassScore, ...]
    by_severity: tuple[SeverityScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    ece_before: float
    ece_after: float
    temperature: float
    ood_threshold: float
    ood_flagged_share: float
    latency_p50_ms: float
    mistakes: tuple[Mistake, ...]
    pictures: tuple[str, ...]
    by_source: tuple[SourceScore, ...] = ()


class ModelMetadata(Record):
    """What a model file says about itself; stored in the ONNX metadata under `METADATA_KEY` and as metadata.json.

    `decode_contract` names the decode-and-resize function the model was trained with (`ml.images.DECODE_CONTRACT`): a
    process with another one refuses the model. `ood_threshold`: an image whose score exceeds it is flagged.
    """

    format: int = 1
    net: str
    classes: tuple[str, ...]
    healthy_classes: tuple[str, ...]
    px: int
    decode_contract: str
    temperature: float
    ood_method: str
    ood_threshold: float
    embedding_size: int
    dataset: str
    dataset_hash: str
    seed: int
    created_at: str


METADATA_KEY = "khet"
