"""Run an exported model: the one way evaluation, replicas and checks read a model.onnx. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    RuntimeException,
)
from pydantic import ValidationError

from configs.errors import IntegrityError
from ml.results import METADATA_KEY, ModelMetadata

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_OUTPUTS = ("probs", "logits", "embedding")
_LOAD_ERRORS = (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile, RuntimeException)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Answers for N images: probs and logits [N, classes] (temperature applied in probs only), embedding [N, D]."""

    probs: Floats
    logits: Floats
    embedding: Floats


class Predictor:
    """A loaded model. Thread-safe: onnxruntime sessions may be run from several threads."""

    def __init__(self, onnx: Path, *, threads: int = 1) -> None:
        """Load `onnx`.

        Raises:
            IntegrityError: not a model, or one that this code did not export.
        """
        self._session = _open(onnx, threads)
        self.metadata = _metadata(self._session, onnx)

    def run(self, images: Images) -> Outputs:
        """Predict uint8 RGB images of shape [N, px, px, 3]."""
        probs, logits, embedding = self._session.run(list(_OUTPUTS), {"image": images})
        return Outputs(probs, logits, embedding)


def _open(onnx: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads starve everything else on shared cores (4-8x, measured).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
    except _LOAD_ERRORS as error:
        raise IntegrityError(f"{onnx} is not a model that onnxruntime can load: {error}") from error


def _metadata(session: Any, onnx: Path) -> ModelMetadata:
    if {o.name for o in session.get_outputs()} < set(_OUTPUTS):
        raise IntegrityError(f"{onnx} has no outputs {', '.join(_OUTPUTS)}: it was not written by ml.export.")
    try:
        return ModelMetadata.model_validate_json(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, ""))
    except ValidationError as error:
        raise IntegrityError(f"{onnx} carries no readable metadata under {METADATA_KEY!r}: {error}") from error


def energy(logits: Floats) -> Floats:
    """Energy score, -logsumexp of the logits, shape [N]; larger means less like the training data.

    Source: Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    top = logits.max(axis=1)
    return np.asarray(-(top + np.log(np.exp(logits - top[:, None]).sum(axis=1))), dtype=np.float32)
