"""Export a trained model: `python -m ml.export --checkpoint outputs/best.ckpt --output_dir exported_models`.

The file takes uint8 images [N, px, px, 3] named `image` and gives `probs`, `logits` and `embedding`; preprocessing,
temperature and metadata are inside. It appears in the output folder only after it has passed every check.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from configs.errors import GateError, IntegrityError, KhetError
from configs.training import ExportConfig
from ml.calibration import temperature, threshold
from ml.dataset import Dataset
from ml.hardware import quiet_threads
from ml.predictor import Outputs, Predictor, energy
from ml.results import METADATA_KEY, ExportResult, ModelMetadata

if TYPE_CHECKING:
    import torch

    from ml.checkpoint import Trained

_log = logging.getLogger(__name__)
OPSET = 20
MODEL, METADATA, RESULT = "model.onnx", "metadata.json", "export.json"
_MAX_BATCH = 1024
_BATCH = 64
Images = npt.NDArray[np.uint8]


def export(checkpoint: Path, output_dir: Path, dataset_root: Path | None = None) -> ExportResult:
    """Write model.onnx, metadata.json and export.json to `output_dir`. `dataset_root`: where the data was moved to.

    Raises:
        GateError: the file failed a check; nothing is left in `output_dir` that looks exported.
        ConfigError: checkpoint or dataset is missing.
        IntegrityError: the checkpoint is damaged, or the dataset is not the one it was trained on.
    """
    quiet_threads()
    from ml import checkpoint as checkpoints

    weights, trained = checkpoints.load(checkpoint)
    data = _dataset(trained, dataset_root)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, METADATA, MODEL):  # an older export must not be taken for this one
        (output_dir / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output_dir) as folder:
        result, metadata = _Export(weights, trained, data, Path(folder)).run()
        metadata.write(output_dir / METADATA)
        result.onnx.replace(output_dir / MODEL)
        final = result.model_copy(update={"onnx": output_dir / MODEL})
        final.write(output_dir / RESULT)
    return final


def _dataset(trained: Trained, root: Path | None) -> Dataset:
    data = Dataset.open(root or trained.dataset_root)
    if data.manifest_hash != trained.dataset_hash:
        raise IntegrityError(
            f"{data.root} holds data {data.manifest_hash[:12]}…, the model wants {trained.dataset_hash[:12]}…. "
            "Nothing was exported. Next: give the dataset it was trained on with --data, or train again."
        )
    return data


@dataclass(frozen=True, slots=True)
class _Parity:
    images: int
    largest: float
    argmax_equal: bool


class _Export:
    """One export, in a folder that is thrown away unless all checks pass."""

    def __init__(self, weights: dict[str, Any], trained: Trained, data: Dataset, folder: Path) -> None:
        from ml.exportable import exportable

        self._trained, self._data, self._folder = trained, data, folder
        self._options: ExportConfig = trained.config.export
        self._validation = data.split("validation", trained.config.px)
        self._model = exportable(trained.config.net, len(trained.classes), weights)

    def run(self) -> tuple[ExportResult, ModelMetadata]:
        logits = _torch_outputs(self._model, self._validation.images).logits
        t = temperature(logits, self._validation.labels)
        self._model.set_temperature(t)
        metadata = self._metadata(t, threshold(energy(logits), self._options.ood_quantile))
        path = self._folder / MODEL
        _write_onnx(self._model, path, self._trained.config.px, metadata)
        parity = self._check_parity(path)
        path, int8 = self._choose(path)
        return self._result(path, parity, int8), metadata

    def _metadata(self, temperature: float, ood_threshold: float) -> ModelMetadata:
        t = self._trained
        return ModelMetadata(
            net=t.config.net, classes=t.classes, healthy_classes=t.healthy_classes, px=t.config.px,
            decode_contract=t.decode_contract, temperature=temperature, ood_method="energy",
            ood_threshold=ood_threshold, embedding_size=self._model.embedding_size, dataset=t.dataset,
            dataset_hash=t.dataset_hash, seed=t.config.seed, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip

    def _check_parity(self, path: Path) -> _Parity:
        holdout = self._data.split("test", self._trained.config.px).images
        chosen = np.linspace(0, len(holdout) - 1, min(len(holdout), self._options.parity_images)).astype(int)
        images = np.ascontiguousarray(holdout[np.unique(chosen)])
        expected, found = _torch_outputs(self._model, images), outputs(Predictor(path), images)
        parity = _Parity(
            len(images), float(np.abs(expected.probs - found.probs).max()),
            bool((expected.probs.argmax(1) == found.probs.argmax(1)).all()),
        )  # fmt: skip
        if not (parity.largest <= self._options.parity_tolerance and parity.argmax_equal):
            raise GateError(
                f"The exported file and torch disagree on {parity.images} holdout images: largest difference of a "
                f"probability {parity.largest:.2g} (allowed {self._options.parity_tolerance:.2g}), classes "
                f"{'equal' if parity.argmax_equal else 'differ'}. Nothing was exported."
            )
        return parity

    def _choose(self, path: Path) -> tuple[Path, tuple[bool, str]]:
        if not self._options.try_int8:
            return path, (False, "not asked for (export.try_int8)")
        from ml.quantize import choose

        return choose(path, self._validation, self._options, self._trained.config.seed)

    def _result(self, path: Path, parity: _Parity, int8: tuple[bool, str]) -> ExportResult:
        from ml.checkpoint import sha256

        image = np.array(self._validation.images[:1])
        file = latencies_ms(Predictor(path).run, image, self._options.latency_runs)
        eager = latencies_ms(_one_thread(self._model), image, self._options.latency_runs)
        return ExportResult(
            onnx=path, sha256=sha256(path), size_bytes=path.stat().st_size, opset=OPSET,
            parity_images=parity.images, parity_max_abs_diff=parity.largest, parity_argmax_equal=parity.argmax_equal,
            latency_p50_ms=float(np.quantile(file, 0.5)), latency_p99_ms=float(np.quantile(file, 0.99)),
            torch_latency_p50_ms=float(np.quantile(eager, 0.5)), int8_considered=self._options.try_int8,
            int8_taken=int8[0], int8_reason=int8[1],
        )  # fmt: skip


def _quiet() -> None:
    """The exporter warns about libraries that this project does without."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")


def _write_onnx(model: torch.nn.Module, path: Path, px: int, metadata: ModelMetadata) -> None:
    """Export, check, and add the metadata.

    Raises:
        GateError: torch cannot export this net, or onnx.checker refuses the file.
    """
    import onnx
    import torch

    _quiet()
    example = (torch.zeros(2, px, px, 3, dtype=torch.uint8),)
    shapes = {"image": {0: torch.export.Dim("batch", min=1, max=_MAX_BATCH)}}
    try:
        program = torch.onnx.export(
            model, example, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False,
            input_names=["image"], output_names=["probs", "logits", "embedding"],
        )  # fmt: skip
        if program is None:
            raise GateError(f"torch exported nothing for {metadata.net}. Nothing was exported.")
        proto = program.model_proto
        onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.model_dump_json()})
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, str(path))
    except (
        torch.onnx.errors.OnnxExporterError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as e:
        raise GateError(f"{metadata.net} cannot be written as a valid ONNX file: {e}. Nothing was exported.") from e


def outputs(predictor: Predictor, images: Images) -> Outputs:
    """Run a file over many images, a batch at a time."""
    parts = [predictor.run(np.ascontiguousarray(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    return _joined(parts)


def _torch_outputs(model: torch.nn.Module, images: Images) -> Outputs:
    import torch

    with torch.inference_mode():
        parts = [
            Outputs(*(part.numpy() for part in model(torch.from_numpy(np.array(images[i : i + _BATCH])))))
            for i in range(0, len(images), _BATCH)
        ]
    return _joined(parts)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    return Outputs(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("probs", "logits", "embedding")))


def latencies_ms(call: Callable[[Images], object], image: Images, runs: int) -> npt.NDArray[np.float64]:
    """Milliseconds of each of `runs` calls, after a warm-up."""
    times = []
    for i in range(runs + 10):
        start = time.perf_counter()
        call(image)
        if i >= 10:
            times.append(1000.0 * (time.perf_counter() - start))
    return np.array(times)


def _one_thread(model: torch.nn.Module) -> Callable[[Images], object]:
    import torch

    def call(image: Images) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(image))

    torch.set_num_threads(1)
    return call


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ml.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.ckpt of a training")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for model.onnx and metadata.json")
    parser.add_argument("--data", help="dataset's name or folder, if it was moved since the training")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 configuration, 3 a check failed, 4 damaged files."""
    from ml.train import resolve_dataset

    arguments = _arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        root = resolve_dataset(arguments.data) if arguments.data else None
        result = export(arguments.checkpoint, arguments.output_dir, root)
    except KhetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(result.model_dump_json() if arguments.json else _summary(result))
    return 0


def _summary(r: ExportResult) -> str:
    return (
        f"{r.onnx}: {r.size_bytes / 1e6:.2f} MB, sha256 {r.sha256[:12]}…, opset {r.opset}\n"
        f"parity with torch on {r.parity_images} holdout images: largest difference {r.parity_max_abs_diff:.1e}, "
        f"classes equal\n"
        f"one image, one thread: {r.latency_p50_ms:.2f} ms (p99 {r.latency_p99_ms:.2f}); torch "
        f"{r.torch_latency_p50_ms:.2f} ms\n"
        f"int8: {'taken' if r.int8_taken else 'not taken'}, {r.int8_reason}\n"
        f"Next: python -m ml.evaluate --model {r.onnx} --out {r.onnx.parent / 'evaluation'}"
    )


if __name__ == "__main__":
    sys.exit(main())
