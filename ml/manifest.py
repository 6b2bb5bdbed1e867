"""What a dataset says about itself: the rows of manifest.parquet and the facts of dataset.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from configs.errors import IntegrityError
from ml.parquet import read_rows
from ml.results import Record
from ml.splits import SPLITS

MANIFEST: Final = "manifest.parquet"
INFO: Final = "dataset.json"
REPORT: Final = "import.json"
CACHE: Final = ".cache"
REPAIR: Final = "Nothing was changed. Next: import it again, or delete the folder so that it is fetched again."
SCHEMA: Final = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("brightness", pa.float32(), nullable=False),
        pa.field("sharpness", pa.float32(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("severity", pa.float32()),
        pa.field("source", pa.string(), nullable=False),
    ]
)


class DatasetInfo(Record):
    """dataset.json. `counts[label][split]`; `rules` are the data settings it was imported with; `origin` says where the
    photos came from; hashes are SHA-256 in hex."""

    format: int = 1
    name: str
    classes: tuple[str, ...]
    healthy_classes: tuple[str, ...]
    manifest_hash: str
    manifest_sha256: str
    images: int
    counts: dict[str, dict[str, int]]
    rules: dict[str, float]
    origin: str
    created_at: str


def read_manifest(root: Path, info: DatasetInfo) -> pa.Table:
    """The rows of the manifest in `root`.

    Raises:
        IntegrityError: it is missing, or not the one that `info` was written with.
    """
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}). {REPAIR}") from error
    if hashlib.sha256(data).hexdigest() != info.manifest_sha256:
        raise IntegrityError(f"{path} does not match its hash in {INFO}. {REPAIR}")
    rows: pa.Table = read_rows(data)
    if manifest_hash(rows) != info.manifest_hash:
        raise IntegrityError(f"{path} does not hold the rows that {INFO} promises. {REPAIR}")
    return rows


def manifest_hash(rows: pa.Table) -> str:
    """Content hash of a manifest: independent of file names, order and time."""
    listed = zip(*columns_of(rows, "sha256", "label", "split"), strict=True)
    return hash_lines("\t".join(row) for row in listed)


def hash_lines(lines: Iterable[str]) -> str:
    """SHA-256 of the lines in sorted order."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def columns_of(rows: pa.Table, *columns: str) -> list[list[Any]]:
    """Columns as Python lists."""
    return [rows[column].to_pylist() for column in columns]


def healthy(classes: Iterable[str]) -> tuple[str, ...]:
    """Those classes that mean no disease."""
    return tuple(name for name in classes if "healthy" in name.lower())


def count(rows: pa.Table) -> dict[str, dict[str, int]]:
    """Images per class and split; every class has all three splits."""
    labels, splits = columns_of(rows, "label", "split")
    counts: dict[str, dict[str, int]] = {label: dict.fromkeys(SPLITS, 0) for label in sorted(set(labels))}
    for label, split in zip(labels, splits, strict=True):
        counts[label][split] += 1
    return counts
