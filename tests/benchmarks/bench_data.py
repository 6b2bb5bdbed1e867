"""Photos a CPU-second: decoding (with Pillow as the peer), generating, importing, and publishing to the object store.

python -m tests.benchmarks.bench_data
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from configs.areas import DataSettings
from ml import leaves
from ml.dataset import Dataset, import_folder
from ml.images import decode, phash, statistics
from ml.objects import ObjectStore
from tasks.datasets.store import DatasetStore
from tests.support.stack import object_store

Item = TypeVar("Item")
_SIDES = (128, 256, 384, 1024)
_PX = 64
_SAMPLE = 800


def main() -> dict[str, float]:
    """Images per CPU-second of one thread, by step."""
    result: dict[str, float] = {}
    for side in _SIDES:
        photos = [_photo(seed, side) for seed in range(24)]
        result[f"decode_{side}_to_{_PX}_px"] = _rate(photos, lambda data: decode(data, _PX))
        result[f"pillow_{side}_to_{_PX}_px"] = _rate(photos, _pillow)
    small = [decode(_photo(seed, 128), _PX) for seed in range(50)]
    result["statistics"] = _rate(small, statistics)
    result["phash"] = _rate(small, phash)
    result["generate_128_px"] = _rate(list(range(100)), lambda seed: leaves.render(seed).jpeg())
    return result | _dataset()


def _photo(seed: int, side: int) -> bytes:
    leaf = leaves.render(seed, px=128)
    large = cv2.resize(leaf.rgb, (side, side), interpolation=cv2.INTER_CUBIC)
    return leaves.Leaf(np.asarray(large, dtype=np.uint8), leaf.label, leaf.severity, 85).jpeg()


def _pillow(data: bytes) -> object:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((_PX, _PX), Image.Resampling.BILINEAR))


def _rate(items: list[Item], work: Callable[[Item], object], seconds: float = 1.0) -> float:
    done, started = 0, time.thread_time()
    while (spent := time.thread_time() - started) < seconds:
        for item in items:
            work(item)
        done += len(items)
    return done / spent


def _dataset() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-data-") as name, object_store(Path(name) / "s3") as settings:
        tmp = Path(name)
        leaves.generate(tmp / "photos", _SAMPLE)
        before, wall = _cpu(), time.monotonic()
        import_folder(tmp / "photos", tmp / "leaves", name="leaves", settings=DataSettings())
        imported, import_s = _cpu() - before, time.monotonic() - wall
        dataset = Dataset.open(tmp / "leaves")
        store = DatasetStore(ObjectStore(settings), settings.data_bucket, settings.upload_threads)
        before, wall = _cpu(), time.monotonic()
        store.publish(dataset)
        return {
            "import_per_cpu_s": _SAMPLE / imported,
            "import_per_s": _SAMPLE / import_s,
            "publish_per_client_cpu_s": _SAMPLE / (_cpu() - before),
            "publish_per_s": _SAMPLE / (time.monotonic() - wall),
        }


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    print(json.dumps({name: round(value, 1) for name, value in main().items()}, indent=2))
