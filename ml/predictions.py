"""What a model answered on a holdout, image by image: predictions.parquet, read for paired comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.errors import IntegrityError
from ml.parquet import read_rows

PREDICTIONS = "predictions.parquet"
Names = npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """One model's answers. `image`: SHA-256 of the photo; `label` and `predicted`: class names; `group`: images with
    the same one are near-duplicates or of one plant. Arrays of str, all in one order."""

    image: Names
    label: Names
    predicted: Names
    group: Names

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Read what `ml.evaluate` wrote; in files of before there were groups every image is its own.

        Raises:
            IntegrityError: the file is missing, damaged, or names an image twice.
        """
        try:
            table = read_rows(path)
            image = _names(table, "sha256")
            group = _names(table, "group") if "group" in table.column_names else image
            found = cls(image, _names(table, "label"), _names(table, "predicted"), group)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise IntegrityError(f"{path} holds no readable predictions: {error}. Next: evaluate again.") from error
        if len(set(image)) != len(image):
            raise IntegrityError(f"{path} names an image twice: it is of no imported dataset. Next: evaluate again.")
        return found


def _names(table: pa.Table, column: str) -> Names:
    return np.array(table[column].to_pylist(), dtype=object)
