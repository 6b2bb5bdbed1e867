"""Judge an exported model: `python -m ml.evaluate --model exported_models/model.onnx --out exported_models/evaluation`.

Runs on the ONNX file as replicas run it, without torch. The folder gets evaluation.json, predictions.parquet (for
paired comparisons of two models on the same holdout) and pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import ConfigError, IntegrityError, KhetError
from ml import calibration, pictures, scores
from ml.dataset import Dataset, Split, SplitName
from ml.export import latencies_ms, outputs
from ml.images import DECODE_CONTRACT
from ml.occlusion import occlusion
from ml.predictions import PREDICTIONS
from ml.predictor import Outputs, Predictor, energy
from ml.results import Evaluation, Mistake

RESULT = "evaluation.json"
_WORST = 12
_LATENCY_RUNS = 100


@dataclass(frozen=True)
class _Seen:
    """The model's answers on a split."""

    predictor: Predictor
    split: Split
    answers: Outputs
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]
    ood: npt.NDArray[np.float32]


def evaluate(onnx: Path, dataset_root: Path, out: Path, *, split: SplitName = "test") -> Evaluation:
    """Score `onnx` on one split and write evaluation.json, predictions.parquet and pictures to `out`.

    Raises:
        ConfigError: the dataset has other classes than the model, or an empty split.
        IntegrityError: the model file is damaged or was made for another decoder; the dataset is damaged.
    """
    data, predictor = Dataset.open(dataset_root), Predictor(onnx)
    _check(predictor, data, onnx)
    seen = _look(predictor, data.split(split, predictor.metadata.px), data.name, split)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).unlink(missing_ok=True)
    _write_predictions(seen, data.classes, out / PREDICTIONS)
    result = _score(seen, data, split, out)
    result.write(out / RESULT)
    return result


def _check(predictor: Predictor, data: Dataset, onnx: Path) -> None:
    m = predictor.metadata
    if m.classes != data.classes:
        raise ConfigError(
            f"{onnx} knows the classes {', '.join(m.classes)}; dataset {data.name} has {', '.join(data.classes)}. "
            "Nothing was written. Next: evaluate on a dataset with the same classes."
        )
    if m.decode_contract != DECODE_CONTRACT:
        raise IntegrityError(
            f"{onnx} was trained on images decoded by {m.decode_contract}; this code decodes by {DECODE_CONTRACT}. "
            "Nothing was written. Next: train again, or use the code of that time."
        )


def _look(predictor: Predictor, split: Split, dataset: str, name: str) -> _Seen:
    if len(split.labels) == 0:
        raise ConfigError(f"Dataset {dataset} has no images in its {name} split. Nothing was written.")
    answers = outputs(predictor, split.images)
    predicted = answers.probs.argmax(axis=1)
    confidence = answers.probs.max(axis=1)
    return _Seen(predictor, split, answers, predicted, confidence, predicted == split.labels, energy(answers.logits))


def _score(seen: _Seen, data: Dataset, split: SplitName, out: Path) -> Evaluation:
    labels, answers, m = seen.split.labels, seen.answers, seen.predictor.metadata
    matrix = scores.confusion(labels, seen.predicted, len(data.classes))
    classes = scores.per_class(matrix, data.classes)
    hits, total = int(seen.correct.sum()), len(labels)
    low, high = scores.wilson(hits, total)
    missed = scores.missed_disease(matrix, data.classes, data.healthy_classes)
    uncalibrated = calibration.softmax(answers.logits)
    eces = tuple(calibration.expected_calibration_error(p, labels) for p in (uncalibrated, answers.probs))
    drawn = _draw(seen, matrix, data, out)
    image = np.ascontiguousarray(seen.split.images[:1])
    return Evaluation(
        dataset=data.name, dataset_hash=data.manifest_hash, split=split, holdout_hash=data.holdout_hash(split),
        images=total, accuracy=hits / total, accuracy_low=low, accuracy_high=high, macro_f1=scores.macro_f1(classes),
        missed_disease_rate=missed[0] / missed[1] if missed else None, classes=classes,
        by_severity=scores.by_severity(_severity(seen.split), seen.correct),
        confusion=tuple(tuple(int(v) for v in row) for row in matrix), ece_before=eces[0], ece_after=eces[1],
        temperature=m.temperature, ood_threshold=m.ood_threshold,
        ood_flagged_share=float((seen.ood > m.ood_threshold).mean()),
        latency_p50_ms=float(np.median(latencies_ms(seen.predictor.run, image, _LATENCY_RUNS))),
        mistakes=_mistakes(seen, data.classes, out), pictures=drawn,
        by_source=scores.by_source(seen.split.rows["source"].to_pylist(), seen.correct),
    )  # fmt: skip


def _severity(split: Split) -> npt.NDArray[np.float64]:
    """Severities as floats, NaN where unknown."""
    values = split.rows["severity"].to_pylist() if "severity" in split.rows.column_names else [None] * len(split.labels)
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _write_predictions(seen: _Seen, classes: Sequence[str], path: Path) -> None:
    rows = seen.split.rows
    table = pa.table(
        {
            "path": rows["path"],
            "sha256": rows["sha256"],
            "label": rows["label"],
            "group": rows["group"],
            "predicted": [classes[i] for i in seen.predicted],
            "probability": pa.array(seen.confidence, pa.float32()),
            "correct": seen.correct,
            "severity": pa.array(_severity(seen.split), pa.float32(), from_pandas=True),
            "energy": pa.array(seen.ood, pa.float32()),
            "ood_score": pa.array(seen.ood - seen.predictor.metadata.ood_threshold, pa.float32()),
        }
    )
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)


def _draw(seen: _Seen, matrix: npt.NDArray[np.int64], data: Dataset, out: Path) -> tuple[str, ...]:
    labels, before = seen.split.labels, calibration.softmax(seen.answers.logits)
    after = seen.answers.probs
    bins = calibration.reliability(before, labels), calibration.reliability(after, labels)
    eces = (
        calibration.expected_calibration_error(before, labels),
        calibration.expected_calibration_error(after, labels),
    )
    return tuple(
        path.name
        for path in (
            pictures.confusion(matrix, data.classes, out / "confusion.png"),
            pictures.reliability(*bins, eces, out / "reliability.png"),
            pictures.recall(scores.per_class(matrix, data.classes), out / "recall.png"),
        )
    )


def _mistakes(seen: _Seen, classes: Sequence[str], out: Path) -> tuple[Mistake, ...]:
    """The most confident errors, each with a picture, and all of them on mistakes.png."""
    for old in out.glob("mistake*.png"):
        old.unlink()
    wrong = np.flatnonzero(~seen.correct)
    worst = wrong[np.argsort(-seen.confidence[wrong], kind="stable")][:_WORST]
    short = pictures.short_names(classes)
    found, sheet = [], []
    for rank, i in enumerate(worst, start=1):
        true, taken = int(seen.split.labels[i]), int(seen.predicted[i])
        image = np.ascontiguousarray(seen.split.images[i])
        heat = occlusion(seen.predictor, image, taken)
        lines = (f"{short[taken]} ({seen.confidence[i]:.0%})", f"is {short[true]}")
        picture = pictures.mistake(image, heat, [f"taken for {lines[0]}", lines[1]], out / f"mistake-{rank:02d}.png")
        path = str(seen.split.rows["path"][int(i)].as_py())
        found.append(
            Mistake(
                path=path,
                label=classes[true],
                predicted=classes[taken],
                probability=float(seen.confidence[i]),
                picture=picture.name,
            )
        )
        sheet.append((image, heat, lines))
    if sheet:
        pictures.contact_sheet(sheet, out / "mistakes.png")
    return tuple(found)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ml.evaluate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model.onnx")
    parser.add_argument("--data", help="dataset's name or folder; default: the name the model was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder for evaluation.json and pictures")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 configuration, 4 damaged files."""
    from ml.train import resolve_dataset

    arguments = _arguments(argv)
    try:
        name = arguments.data or Predictor(arguments.model).metadata.dataset
        result = evaluate(arguments.model, resolve_dataset(name), arguments.out, split=arguments.split)
    except KhetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(result.model_dump_json() if arguments.json else _summary(result))
    return 0


def _summary(r: Evaluation) -> str:
    missed = "no healthy class" if r.missed_disease_rate is None else f"{r.missed_disease_rate:.1%}"
    weakest = min(r.classes, key=lambda c: c.recall)
    return (
        f"{r.images} {r.split} images of {r.dataset}: accuracy {r.accuracy:.1%} "
        f"({r.accuracy_low:.1%} to {r.accuracy_high:.1%}), macro F1 {r.macro_f1:.3f}, missed disease {missed}\n"
        f"lowest recall: {weakest.name} {weakest.recall:.1%} ({weakest.recall_low:.1%} to {weakest.recall_high:.1%})\n"
        f"calibration error {r.ece_before:.3f} before, {r.ece_after:.3f} after temperature {r.temperature:.2f}; "
        f"{r.ood_flagged_share:.1%} flagged as unlike the training data; {r.latency_p50_ms:.2f} ms an image"
    )


if __name__ == "__main__":
    sys.exit(main())
