"""The state of one replica, and what it does with one photo."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import orjson

from configs.areas import ServingSettings
from configs.errors import SafetyError
from ml.results import ModelMetadata
from ml.serving.bodies import MULTIPART, SHADOW, Bodies
from ml.serving.inference import Inference, Prediction
from ml.serving.metrics import Metrics
from ml.serving.multipart import extract_file
from ml.serving.workers import Workers


@dataclass(slots=True)
class Photo:
    """One request's photo. `data` is the body as it came, then the file taken out of a form."""

    data: bytes
    content_type: bytes
    request_id: str
    started: float
    source: str = "user"


class PredictionSink(Protocol):
    """Where answers are written down."""

    def start(self) -> None:
        """Begin; called once the model is loaded."""

    def record(self, photo: Photo, prediction: Prediction, latency_s: float) -> None:
        """Remember one answer, without blocking."""

    def close(self) -> None:
        """Write what is left, within seconds."""


class NoSink:
    """Nothing is written down."""

    def start(self) -> None:
        """Nothing to start."""

    def record(self, photo: Photo, prediction: Prediction, latency_s: float) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing to write."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A verified, warmed-up model. `manifest` is its lineage, where it came from the registry."""

    inference: Inference
    metadata: ModelMetadata
    manifest: dict[str, Any] | None = None
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Which replica of which version this is."""

    version: str
    replica: str
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Service:
    """Loading, then ready, then draining. All methods but `_work` and `_record` run on the event loop."""

    def __init__(self, identity: Identity, limits: ServingSettings) -> None:
        self.identity: Final = identity
        self.limits: Final = limits
        self.metrics: Final = Metrics(identity.version)
        self.bodies: Final = Bodies(limits)
        self.in_flight = 0
        self.draining = False
        self.model: LoadedModel | None = None
        self._sink: PredictionSink = NoSink()
        self._labels: Sequence[str] = ()
        self._workers: Workers[Photo, Prediction] = Workers(
            limits.threads, limits.max_waiting, self._work, self._record
        )
        self.metrics.watch("http_requests_in_flight", "Requests being read or answered.", lambda: self.in_flight)
        self.metrics.watch("http_bodies_held_bytes", "Memory held by bodies.", lambda: self.bodies.held_bytes)
        self.metrics.watch("predictions_pending", "Photos waiting or in work.", lambda: self._workers.pending)

    @property
    def ready(self) -> bool:
        """Whether traffic may be sent here."""
        return self.model is not None and not self.draining

    def open(self, model: LoadedModel, sink: PredictionSink) -> None:
        """Take traffic.

        Raises:
            SafetyError: a model is loaded already; a replica serves one version all its life.
        """
        if self.model is not None:
            raise SafetyError("This replica serves a model already. Start another replica for another version.")
        self._sink = sink
        self._labels = model.metadata.classes
        self.metrics.model_loaded(model.metadata.classes, model.accuracy)
        self.model = model
        self._workers.start()
        sink.start()
        self.metrics.set_ready(True)

    def drain(self) -> None:
        """Ask for no more traffic; what comes is still answered."""
        self.draining = True
        self.metrics.set_ready(False)

    def close(self, timeout_s: float) -> None:
        """End the worker threads, then the log of what they answered."""
        if self.model is not None:
            self._workers.stop(timeout_s)
            self._sink.close()

    async def predict(self, photo: Photo) -> bytes:
        """The JSON answer.

        Raises:
            Refused: busy, not ready, or the form holds no photo.
            ImageRejected: the bytes are no acceptable image.
        """
        prediction = await self._workers.run(photo)
        if photo.source != SHADOW:
            self.metrics.predicted(prediction.order[0], prediction.is_leaf, prediction.inference_s)
        return self._answer(photo, prediction)

    def _work(self, photo: Photo) -> Prediction:
        if self.model is None:
            raise SafetyError("A photo reached the workers before the model did.")
        if photo.content_type[: len(MULTIPART)].lower() == MULTIPART:
            photo.data = extract_file(photo.data, photo.content_type)
        return self.model.inference.predict(photo.data)

    def _record(self, photo: Photo, prediction: Prediction) -> None:
        self._sink.record(photo, prediction, time.perf_counter() - photo.started)

    def _answer(self, photo: Photo, prediction: Prediction) -> bytes:
        ranked = [
            {"class": self._labels[index], "probability": float(prediction.probs[index])} for index in prediction.order
        ]
        return orjson.dumps(
            {
                **ranked[0],
                "top_k": ranked,
                "is_leaf": prediction.is_leaf,
                "ood_score": prediction.ood_score,
                "model_version": self.identity.version,
                "request_id": photo.request_id,
            }
        )
