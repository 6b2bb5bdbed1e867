"""Published versions made from the one that serves: the same, wrong, or nearly the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from configs.settings import load_settings
from ml.lineage import collect_lineage
from tasks.registry import Registry
from tests.support.local_stack import LocalStack


def publish_variant(
    stack: LocalStack, monkeypatch: pytest.MonkeyPatch, folder: Path, change: Callable[[Path], None] | None = None
) -> str:
    """Publish the serving model again as the next version, with its ONNX file changed if wanted."""
    monkeypatch.setenv("KHET_HOME", str(stack.home))
    settings = load_settings()
    registry = Registry.from_settings(settings)
    production = registry.alias("production")
    assert production is not None
    source = registry.fetch(production.version, folder / "source").manifest
    for name in source.files:
        target = folder / "variant" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / "source" / name).read_bytes())
    if change is not None:
        change(folder / "variant" / "model.onnx")
    version = registry.reserve(owner=folder.name)
    lineage = collect_lineage(
        config={}, seed=0, dataset="leaves", dataset_hash=source.lineage.dataset_hash, release_id=folder.name
    )
    registry.publish(version, folder / "variant", lineage=lineage, metrics=source.metrics, created_by="test")
    return str(version)


def rotate_answers(path: Path) -> None:
    """Give every class the probability of its neighbour: a model that is always sure and always wrong."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.output[:] = [f"{name}_right" if name in ("probs", "logits") else name for name in node.output]
        node.input[:] = [f"{name}_right" if name in ("probs", "logits") else name for name in node.input]
    for name in ("probs", "logits"):
        split = helper.make_node("Split", [f"{name}_right", f"{name}_sizes"], [f"{name}_a", f"{name}_b"], axis=1)
        classes = next(o for o in model.graph.output if o.name == name).type.tensor_type.shape.dim[1].dim_value
        sizes = helper.make_tensor(f"{name}_sizes", onnx.TensorProto.INT64, [2], [1, classes - 1])
        model.graph.initializer.append(sizes)
        model.graph.node.append(split)
        model.graph.node.append(helper.make_node("Concat", [f"{name}_b", f"{name}_a"], [name], axis=1))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def disturb_weights(seed: int, share: float = 0.003) -> Callable[[Path], None]:
    """Move every weight by about `share` of itself: a twin that is as good and answers a few photos differently."""

    def change(path: Path) -> None:
        model, random = onnx.load(str(path)), np.random.default_rng(seed)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim > 1:
                moved = values * (1 + share * random.standard_normal(values.shape)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
        onnx.save(model, str(path))

    return change
