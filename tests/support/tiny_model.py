"""A real, tiny ONNX model with the exported model's contract, written in milliseconds and without torch.

It splits the photo into a 4 x 4 grid, takes the mean colours (48 numbers), and applies one seeded linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ml.images import DECODE_CONTRACT
from ml.results import METADATA_KEY, ModelMetadata

CLASSES = ("healthy", "early_blight", "late_blight", "leaf_mold")
EMBEDDING_SIZE = 48


def tiny_metadata(classes: Sequence[str] = CLASSES, px: int = 64, seed: int = 0, **changes: object) -> ModelMetadata:
    """Metadata that fits `write_tiny_model`; `changes` replace fields."""
    values: dict[str, object] = {
        "net": "tiny",
        "classes": tuple(classes),
        "healthy_classes": (classes[0],),
        "px": px,
        "decode_contract": DECODE_CONTRACT,
        "temperature": 1.0,
        "ood_method": "energy",
        "ood_threshold": 1000.0,
        "embedding_size": EMBEDDING_SIZE,
        "dataset": "tiny",
        "dataset_hash": "0" * 64,
        "seed": seed,
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return ModelMetadata.model_validate(values | changes)


def write_tiny_model(
    path: Path,
    classes: Sequence[str] = CLASSES,
    px: int = 64,
    seed: int = 0,
    permute: Sequence[int] | None = None,
    **metadata: object,
) -> Path:
    """Write model.onnx at `path` (a folder gets `model.onnx` and `metadata.json`); returns the model's path.

    `permute` reorders the outputs: [1, 0, 2, 3] swaps the first two labels, a model that is wrong on purpose.
    `metadata` replaces fields of what the file says about itself.
    """
    if path.suffix != ".onnx":
        path.mkdir(parents=True, exist_ok=True)
        path = path / "model.onnx"
    about = tiny_metadata(classes, px, seed, **metadata)
    model = helper.make_model(_graph(len(classes), px, seed, permute), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    helper.set_model_props(model, {METADATA_KEY: about.model_dump_json()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    about.write(path.with_name("metadata.json"))
    return path


def _graph(classes: int, px: int, seed: int, permute: Sequence[int] | None) -> onnx.GraphProto:
    weights = np.random.default_rng(seed).normal(0.0, 4.0, (EMBEDDING_SIZE, classes)).astype(np.float32)
    if permute is not None:
        weights = weights[:, list(permute)]
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels", "white"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["grid"], kernel_shape=[px // 4] * 2, strides=[px // 4] * 2),
        helper.make_node("Flatten", ["grid"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
    ]
    outputs = [("probs", classes), ("logits", classes), ("embedding", EMBEDDING_SIZE)]
    return helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", px, px, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in outputs],
        [
            numpy_helper.from_array(np.array(255.0, dtype=np.float32), "white"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
