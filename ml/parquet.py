"""Reads small Parquet files, in this thread alone.

`pyarrow.parquet.read_table` goes through pyarrow's datasets, whose threads abort about one process in a hundred at its
very end ("terminate called without an active exception", pyarrow 26.0.1), after all its work was done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read_rows(source: Path | bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a file or of its bytes. `columns` None: all; those that it does not have are left out.

    Raises:
        OSError: it cannot be read.
        pyarrow.ArrowException: it is no whole Parquet file.
    """
    opened: Any = pa.BufferReader(source) if isinstance(source, bytes) else source
    with pq.ParquetFile(opened, pre_buffer=False) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
