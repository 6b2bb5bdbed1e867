"""An int8 copy of an exported file, taken only if it is measurably better here.

Without integer instructions for neural nets (VNNI, AMX) int8 is often the slower one, so it is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.training import ExportConfig
from ml.dataset import Split
from ml.predictor import Predictor

_CALIBRATION_IMAGES = 256
_ROUNDS = 5


def choose(path: Path, validation: Split, options: ExportConfig, seed: int) -> tuple[Path, tuple[bool, str]]:
    """Quantize `path` and compare; returns the file to ship, whether it is the int8 one, and why."""
    from ml.export import latencies_ms, outputs

    order = np.random.default_rng(seed).permutation(len(validation.labels))[:_CALIBRATION_IMAGES]
    small = _quantize(path, np.ascontiguousarray(validation.images[np.sort(order)]))
    files = Predictor(path), Predictor(small)
    full, loss = [(outputs(f, validation.images).probs.argmax(1) == validation.labels).mean() for f in files]
    image = np.ascontiguousarray(validation.images[:1])
    runs = max(20, options.latency_runs // _ROUNDS)
    rounds = [[float(np.median(latencies_ms(f.run, image, runs))) for f in files] for _ in range(_ROUNDS)]
    speedup = float(np.median([a / b for a, b in rounds]))
    lost = float(full - loss)
    told = f"{speedup:.2f}x the speed of float32, {100 * lost:+.2f} points of validation accuracy lost"
    if speedup < options.int8_min_speedup:
        return path, (False, f"too slow: {told}; asked for {options.int8_min_speedup:.2f}x")
    if lost > options.int8_accuracy_loss:
        return path, (False, f"too inaccurate: {told}; allowed {100 * options.int8_accuracy_loss:.2f}")
    return small, (True, told)


def _quantize(path: Path, images: npt.NDArray[np.uint8]) -> Path:
    """Static quantization of weights and activations with ranges seen on `images`."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, small = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(small), _Reader(images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )  # fmt: skip
    proto = onnx.load(str(small))
    original = onnx.load(str(path))
    onnx.helper.set_model_props(proto, {p.key: p.value for p in original.metadata_props})
    onnx.save(proto, str(small))
    return small


class _Reader:
    """Feeds calibration images in batches; onnxruntime asks until it gets None."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._batches: Iterator[Any] = iter([images[i : i + 32] for i in range(0, len(images), 32)])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}
