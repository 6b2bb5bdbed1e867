"""Get a model onto this machine, trusted and warmed up, or say in one line why not."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from configs.areas import ServingSettings
from configs.errors import ConfigError
from configs.settings import Settings, home
from ml.predictor import Predictor
from ml.serving.inference import Inference
from ml.serving.metrics import Metrics
from ml.serving.rows import Origin
from ml.serving.service import Identity, LoadedModel, NoSink, PredictionSink
from ml.serving.spool import Spool
from ml.version import Version

logger = logging.getLogger(__name__)
# One try that fails soon: the log has a patience of its own, and SIGTERM must not wait for a store that hangs.
_LOG_STORE = {"patience_s": 0.0, "max_attempts": 1}


def cache_dir(settings: Settings) -> Path:
    """Where this machine keeps verified model files and the spool."""
    return settings.serving.cache_dir or home() / "serving"


def load_version(settings: Settings, version: Version) -> LoadedModel:
    """Fetch, verify and warm up a published version.

    Raises:
        IntegrityError: a file, the signature or the model's contract is not as promised.
        ExternalError: the object store did not answer.
        ConfigError: no such version, or no key is trusted.
    """
    from ml.bundle import MODEL, fetch_bundle
    from ml.objects import ObjectStore

    store = ObjectStore(settings.object_store)
    folder = cache_dir(settings) / "models" / str(version)
    bucket = settings.object_store.models_bucket
    bundle = fetch_bundle(store, bucket, version, folder, settings.registry.trusted_keys, only=(MODEL,))
    manifest = bundle.manifest
    return _warmed_up(bundle.path(MODEL), settings.serving, manifest.model_dump(mode="json"), manifest.metrics)


def load_folder(folder: Path, limits: ServingSettings) -> LoadedModel:
    """Warm up an exported folder as it is, unsigned: for developers.

    Raises:
        ConfigError: no model.onnx there.
        IntegrityError: not a model that ml.export wrote for this code.
    """
    onnx = folder / "model.onnx"
    if not onnx.is_file():
        raise ConfigError(f"{onnx}: no such file. Nothing is served. Next: name the folder that ml.export wrote.")
    return _warmed_up(onnx, limits, None, {})


def open_log(settings: Settings, identity: Identity, model: LoadedModel, metrics: Metrics) -> PredictionSink:
    """The prediction log in the data bucket, or nothing where it is switched off. Needs no store to start."""
    serving = settings.serving
    if not serving.log_predictions:
        return NoSink()
    from ml.objects import ObjectStore
    from ml.serving.prediction_log import LogSettings, PredictionLog

    store = ObjectStore(settings.object_store.model_copy(update=_LOG_STORE))
    spool = Spool(cache_dir(settings) / "spool", serving.spool_max_bytes)
    origin = Origin(identity.version, identity.replica, model.metadata.classes)
    cut = LogSettings(settings.object_store.data_bucket, serving.log_batch_rows, serving.log_flush_s)
    return PredictionLog(cut, origin, store.put, spool, metrics)


def _warmed_up(
    onnx: Path, limits: ServingSettings, manifest: dict[str, Any] | None, metrics: dict[str, float]
) -> LoadedModel:
    started = time.perf_counter()
    predictor = Predictor(onnx, threads=limits.onnx_threads)
    inference = Inference(predictor, limits)
    steady_s = inference.warm_up()
    logger.info(
        "Model loaded and warmed up in %.0f ms; one photo takes %.2f ms.",
        1e3 * (time.perf_counter() - started),
        1e3 * steady_s,
    )
    return LoadedModel(inference, predictor.metadata, manifest, metrics.get("accuracy"))
