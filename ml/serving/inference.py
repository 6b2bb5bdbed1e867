"""From the bytes of a photo to an answer: decode, run the model, score how leaf-like it is. Runs on worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from configs.areas import ServingSettings
from configs.errors import IntegrityError
from ml.images import DECODE_CONTRACT, Pixels, decode
from ml.predictor import Floats, Predictor, energy

_WARM_UP_RUNS = 5  # the first two allocate, the rest show whether it is steady


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one photo. `rgb` is what it saw; `ood_score` above the threshold: not a leaf."""

    rgb: Pixels
    probs: Floats
    embedding: Floats
    order: tuple[int, ...]
    ood_score: float
    is_leaf: bool
    inference_s: float


class Inference:
    """A loaded model with the limits of this service around it. Thread-safe."""

    def __init__(self, predictor: Predictor, limits: ServingSettings) -> None:
        """Refuse a model this process would feed other pixels than it was trained on.

        Raises:
            IntegrityError: another decode contract or an unknown out-of-distribution method.
        """
        metadata = predictor.metadata
        if metadata.decode_contract != DECODE_CONTRACT:
            raise IntegrityError(
                f"The model expects images decoded as {metadata.decode_contract!r}, this service decodes as "
                f"{DECODE_CONTRACT!r}. Nothing is served. Next: export it again, or use its own release of serving."
            )
        if metadata.ood_method != "energy":
            raise IntegrityError(
                f"The model scores leaves by {metadata.ood_method!r}; this service knows 'energy' only."
            )
        self._predictor = predictor
        self._px = metadata.px
        self._threshold = metadata.ood_threshold
        self._max_pixels = limits.max_pixels
        self._min_side_px = limits.min_side_px
        self._top_k = min(limits.top_k, len(metadata.classes))

    def predict(self, data: bytes) -> Prediction:
        """Decode and predict one photo.

        Raises:
            ImageRejected: the bytes are no acceptable image.
        """
        rgb = decode(data, self._px, max_pixels=self._max_pixels, min_side_px=self._min_side_px)
        started = time.perf_counter()
        outputs = self._predictor.run(rgb[None])
        inference_s = time.perf_counter() - started
        probs = outputs.probs[0]
        score = float(energy(outputs.logits)[0])
        order = tuple(np.argsort(-probs, kind="stable")[: self._top_k].tolist())
        return Prediction(rgb, probs, outputs.embedding[0], order, score, score <= self._threshold, inference_s)

    def warm_up(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Run the whole path a few times and check what comes out; the seconds the last run took.

        Raises:
            IntegrityError: the outputs do not have the shapes the metadata promises, or are not finite.
        """
        metadata = self._predictor.metadata
        photo = _grey_photo(2 * self._px)
        try:
            for _ in range(_WARM_UP_RUNS):
                started = clock()
                prediction = self.predict(photo)
        except (InvalidArgument, Fail, RuntimeException) as error:
            raise IntegrityError(f"The model does not run on {self._px} px images: {error}") from error
        shapes = (prediction.probs.shape, prediction.embedding.shape)
        promised: Any = ((len(metadata.classes),), (metadata.embedding_size,))
        finite = np.isfinite(prediction.probs).all() and np.isfinite(prediction.embedding).all()
        if shapes != promised or not finite:
            raise IntegrityError(f"The model answered with shapes {shapes}, its metadata promises {promised}.")
        return clock() - started


def _grey_photo(side_px: int) -> bytes:
    pixels = np.full((max(side_px, 32), max(side_px, 32), 3), 128, dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=90))
