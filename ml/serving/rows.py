"""The rows of the prediction log, and their Parquet form. pyarrow is imported when the first batch is written.

Columns: request_id, time (UTC, microseconds), version, class, probability, probs (in the order of the file's metadata
entry `khet.classes`), ood_score, is_leaf, one `stat_<name>` for each of `ml.images.STATISTICS`, embedding, image_sha256
(of the bytes as sent, hex), latency_ms (from the request's head to the prediction), replica, source (user; shadow: a
copy for a canary; probe: a replayed holdout photo).
"""

from __future__ import annotations

import io
import json
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

import numpy as np

from ml.images import STATISTICS
from ml.predictor import Floats

PREFIX: Final = "inference"
_SCHEMA_VERSION: Final = "1"


@dataclass(frozen=True, slots=True)
class Row:
    """One answer. `time` in seconds since 1970 UTC, `chosen` the index of the class."""

    request_id: str
    time: float
    chosen: int
    probs: Floats
    ood_score: float
    is_leaf: bool
    statistics: Mapping[str, float]
    embedding: Floats
    image_sha256: str
    latency_ms: float
    source: str = "user"


@dataclass(frozen=True, slots=True)
class Origin:
    """What all rows of a replica share."""

    version: str
    replica: str
    classes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one day as a Parquet file. `name` is unique for ever, so delivering twice writes the same object."""

    day: date
    name: str
    rows: int
    data: bytes

    @property
    def key(self) -> str:
        """Its place in the data bucket."""
        return object_key(self.day, self.name)


def object_key(day: date, name: str) -> str:
    """`inference/dt=2026-01-31/<replica>-<uuid>.parquet`."""
    return f"{PREFIX}/dt={day.isoformat()}/{name}"


def to_batches(rows: Sequence[Row], origin: Origin) -> list[Batch]:
    """One batch a UTC day: a batch that spans midnight is cut there."""
    days: defaultdict[date, list[Row]] = defaultdict(list)
    for row in rows:
        days[datetime.fromtimestamp(row.time, UTC).date()].append(row)
    return [
        Batch(day, f"{origin.replica}-{uuid.uuid4().hex}.parquet", len(part), _parquet(part, origin))
        for day, part in sorted(days.items())
    ]


def _parquet(rows: Sequence[Row], origin: Origin) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(_table(rows, origin), sink, compression="zstd")
    return sink.getvalue()


def _table(rows: Sequence[Row], origin: Origin) -> Any:
    import pyarrow as pa

    count = len(rows)
    chosen = np.array([row.chosen for row in rows])
    probs = np.stack([row.probs for row in rows])
    times = np.array([round(row.time * 1e6) for row in rows])
    columns: dict[str, Any] = {
        "request_id": pa.array([row.request_id for row in rows]),
        "time": pa.array(times, pa.int64()).cast(pa.timestamp("us", tz="UTC")),
        "version": pa.array([origin.version] * count),
        "class": pa.array([origin.classes[index] for index in chosen]),
        "probability": pa.array(probs[np.arange(count), chosen]),
        "probs": _lists(probs),
        "ood_score": pa.array([row.ood_score for row in rows], pa.float32()),
        "is_leaf": pa.array([row.is_leaf for row in rows]),
        **{f"stat_{name}": pa.array([row.statistics[name] for row in rows], pa.float32()) for name in STATISTICS},
        "embedding": _lists(np.stack([row.embedding for row in rows])),
        "image_sha256": pa.array([row.image_sha256 for row in rows]),
        "latency_ms": pa.array([row.latency_ms for row in rows], pa.float32()),
        "replica": pa.array([origin.replica] * count),
        "source": pa.array([row.source for row in rows]),
    }
    about = {"khet.schema": _SCHEMA_VERSION, "khet.classes": json.dumps(list(origin.classes))}
    return pa.table(columns).replace_schema_metadata(about)


def _lists(values: Floats) -> Any:
    """[N, D] floats as N lists of D."""
    import pyarrow as pa

    count, width = values.shape
    offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values.astype(np.float32, copy=False).ravel())
