"""A dataset: a folder with manifest.parquet, dataset.json and images/<label>/<file>, complete or absent.

`import_folder` makes one from photos, `Dataset.open` reads one, `Dataset.split` gives its pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import ConfigError, IntegrityError
from ml import images, pixelcache
from ml.importing import ImportReport, import_folder
from ml.manifest import CACHE, INFO, REPAIR, DatasetInfo, columns_of, hash_lines, read_manifest
from ml.pixelcache import Progress
from ml.splits import SplitName

__all__ = ["Dataset", "DatasetInfo", "ImportReport", "Split", "SplitName", "import_folder"]

_NO_LIMIT: Final = 1 << 40  # the import already refused what is too large


@dataclass(frozen=True)
class Split:
    """One split: images uint8 [N, px, px, 3] (RGB, read-only memory map), labels int64 [N] (index into
    `Dataset.classes`), rows: the manifest's rows in the same order."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    rows: pa.Table


class Dataset:
    """An imported dataset on disk. Open it with `Dataset.open`."""

    def __init__(self, root: Path, info: DatasetInfo, rows: pa.Table) -> None:
        self.root = root
        self.info = info
        self.rows = rows

    @classmethod
    def open(cls, root: Path) -> Dataset:
        """Read a dataset and check its tables against their hashes (`verify` checks the images too).

        Raises:
            ConfigError: there is no dataset at `root`.
            IntegrityError: it is damaged or incomplete.
        """
        if not (root / INFO).exists():
            what = f"{root} holds no {INFO}" if root.is_dir() else f"{root} does not exist"
            raise ConfigError(
                f"No dataset here: {what}. "
                "Next: `khet data import FOLDER --name NAME`, or `khet data sample --name NAME` for generated photos."
            )
        info = DatasetInfo.read(root / INFO)
        return cls(root, info, read_manifest(root, info))

    @property
    def name(self) -> str:
        """The name it was imported under."""
        return self.info.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels in the order of the model's outputs."""
        return self.info.classes

    @property
    def healthy_classes(self) -> tuple[str, ...]:
        """Classes that mean no disease: those with "healthy" in their name."""
        return self.info.healthy_classes

    @property
    def manifest_hash(self) -> str:
        """SHA-256 of the sorted (sha256, label, split): the same content has the same hash wherever it lies."""
        return self.info.manifest_hash

    def rows_of(self, name: SplitName) -> pa.Table:
        """The manifest's rows of one split."""
        return self.rows.filter(pc.equal(self.rows["split"], name))

    def holdout_hash(self, name: SplitName = "test") -> str:
        """Hash of one split's (sha256, label): two models are comparable when they were judged on the same."""
        rows = self.rows_of(name)
        return hash_lines(f"{s}\t{label}" for s, label in zip(*columns_of(rows, "sha256", "label"), strict=True))

    def split(self, name: SplitName, px: int, *, on_progress: Progress | None = None) -> Split:
        """The pixels of one split, decoded on the first call and memory-mapped from then on.

        Raises:
            IntegrityError: an image is missing or is not the one in the manifest.
            ExternalError: the decoded images cannot be written.
        """
        rows = self.rows_of(name)
        paths, hashes, labels = columns_of(rows, "path", "sha256", "label")
        cache = self.root / CACHE / f"{self.manifest_hash[:16]}-{name}-{px}-{images.DECODE_CONTRACT}.npy"
        pixels = pixelcache.mapped(
            cache,
            len(paths),
            px,
            lambda i: images.decode(self.read(paths[i], hashes[i]), px, max_pixels=_NO_LIMIT),
            on_progress,
        )
        index = {label: i for i, label in enumerate(self.classes)}
        return Split(pixels, np.array([index[label] for label in labels], dtype=np.int64), rows)

    def read(self, path: str, sha256: str) -> bytes:
        """The bytes of one image.

        Raises:
            IntegrityError: it is missing, or its content changed.
        """
        try:
            data = (self.root / path).read_bytes()
        except OSError as error:
            raise IntegrityError(f"Dataset {self.name}: {path} cannot be read ({error.strerror}). {REPAIR}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(f"Dataset {self.name}: {path} is not the image in the manifest. {REPAIR}")
        return data

    def verify(self) -> None:
        """Read every image and compare its hash.

        Raises:
            IntegrityError: naming the first one that is missing or changed.
        """
        pairs = zip(*columns_of(self.rows, "path", "sha256"), strict=True)
        for _ in pixelcache.parallel(lambda pair: len(self.read(*pair)), pairs):
            continue
