"""The default 101 k ConvNet's graph with random weights, as ml.export writes it: a realistic load without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ml.results import METADATA_KEY
from tests.support.tiny_model import tiny_metadata

_CLASSES = tuple(f"class_{index}" for index in range(8))
# Channels in and out, stride, and whether a 2 x 2 max pool follows (ml.net.ConvNet, batch norm folded).
_LAYERS = ((3, 16, 2, False), (16, 16, 1, True), (16, 32, 1, True), (32, 64, 1, True), (64, 128, 1, False))


def write_conv_model(folder: Path, px: int = 64, seed: int = 0) -> Path:
    """Write `model.onnx` into `folder`; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    model = helper.make_model(_graph(px, seed), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    about = tiny_metadata(_CLASSES, px, seed, net="convnet", embedding_size=128)
    helper.set_model_props(model, {METADATA_KEY: about.model_dump_json()})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def _graph(px: int, seed: int) -> onnx.GraphProto:
    random = np.random.default_rng(seed)
    weights = {"white": np.array(255.0, dtype=np.float32), "head": _normal(random, 128, len(_CLASSES))}
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "white"], ["x0"]),
    ]
    for index, (inputs, outputs, stride, pooled) in enumerate(_LAYERS):
        weights[f"w{index}"] = _normal(random, outputs, inputs, 3, 3)
        weights[f"b{index}"] = np.zeros(outputs, dtype=np.float32)
        nodes += _conv(index, stride, pooled)
    nodes += [
        helper.make_node("ReduceMean", [f"x{len(_LAYERS)}", "axes"], ["embedding"], keepdims=0),
        helper.make_node("MatMul", ["embedding", "head"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "axes"))
    outputs_of = [("probs", len(_CLASSES)), ("logits", len(_CLASSES)), ("embedding", 128)]
    return helper.make_graph(
        nodes,
        "convnet",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", px, px, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in outputs_of],
        initializers,
    )


def _conv(index: int, stride: int, pooled: bool) -> list[onnx.NodeProto]:
    after = f"r{index}" if pooled else f"x{index + 1}"
    nodes = [
        helper.make_node(
            "Conv", [f"x{index}", f"w{index}", f"b{index}"], [f"c{index}"], pads=[1] * 4, strides=[stride] * 2
        ),
        helper.make_node("Relu", [f"c{index}"], [after]),
    ]
    if pooled:
        nodes.append(helper.make_node("MaxPool", [after], [f"x{index + 1}"], kernel_shape=[2, 2], strides=[2, 2]))
    return nodes


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    fan_in = float(np.prod(shape[1:])) if len(shape) > 2 else float(shape[0])
    return random.normal(0.0, (2.0 / fan_in) ** 0.5, shape).astype(np.float32)
