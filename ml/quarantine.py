"""Files an import does not take: looked at one by one, listed with a reason, and left where they are."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter

from ml import images
from ml.results import Record

QuarantineReason = Literal[
    "empty",
    "not_an_image",
    "truncated",
    "too_small",
    "too_many_pixels",
    "unreadable",
    "duplicate",
    "conflicting_labels",
    "no_class",
    "link",
]
# Side in pixels at which brightness, sharpness and pHash are measured: one size, so that photos of any size compare.
_INSPECT_PX: Final = 128
_SUFFIX_OF_MAGIC: Final = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}


class Quarantined(Record):
    """One file that was left out. `path` is relative to the imported folder."""

    path: str
    reason: QuarantineReason
    detail: str


@dataclass(frozen=True, slots=True)
class Inspected:
    """Facts about one good image. `suffix` follows from the bytes, not from the file's name."""

    sha256: str
    width: int
    height: int
    brightness: float
    sharpness: float
    phash: int
    suffix: str


def inspect(data: bytes, *, max_pixels: int, min_side_px: int) -> Inspected:
    """Decode an image completely and measure it.

    Raises:
        images.ImageRejected: with the reason.
    """
    rgb = images.decode(data, _INSPECT_PX, max_pixels=max_pixels, min_side_px=min_side_px)
    width, height = images.image_size(data)
    numbers = images.statistics(rgb)
    return Inspected(
        sha256=hashlib.sha256(data).hexdigest(),
        width=width,
        height=height,
        brightness=numbers["brightness"],
        sharpness=numbers["sharpness"],
        phash=images.phash(rgb),
        suffix=next(s for magic, s in _SUFFIX_OF_MAGIC.items() if data.startswith(magic)),
    )


def write_report(folder: Path, quarantined: Iterable[Quarantined]) -> Path:
    """Write quarantine.json (machines) and quarantine.csv (people) into `folder`; returns the latter."""
    rows = sorted(quarantined, key=lambda q: (q.reason, q.path))
    (folder / "quarantine.json").write_bytes(TypeAdapter(list[Quarantined]).dump_json(rows, indent=2) + b"\n")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "reason", "detail"))
    writer.writerows((row.path, row.reason, row.detail) for row in rows)
    table = folder / "quarantine.csv"
    table.write_text(text.getvalue(), encoding="utf-8")
    return table
