"""Finds past answers in the inference log: `inference/dt=YYYY-MM-DD/*.parquet` in the data bucket."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from typing import Any, Final

from configs.errors import IntegrityError
from ml.objects import ObjectStore
from ml.serving.rows import object_key
from tasks.feedback.labels import Answer

_COLUMNS: Final = ("request_id", "time", "version", "class", "source")
_THREADS: Final = 4
# Copies for a canary and replayed holdout photos carry ids too, but nobody was given those answers.
_ANSWERED: Final = "user"


class PredictionLog:
    """The log of one data bucket."""

    def __init__(self, store: ObjectStore, bucket: str) -> None:
        self._store = store
        self._bucket = bucket

    def find(self, request_ids: Collection[str], last: date, days: int) -> dict[str, set[Answer]]:
        """What was answered to users under these ids on `days` UTC days up to `last`, newest day first.

        It stops at the day on which every id has been found. A client may choose its ids, so that one may have had
        several answers.

        Raises:
            IntegrityError: an object of the log is no Parquet file with these columns.
            ExternalError: the store does not answer.
        """
        wanted, found = set(request_ids), dict[str, set[Answer]]()
        for back in range(days):
            if not wanted - found.keys():
                break
            for request_id, answer in self._day(last - timedelta(days=back), wanted):
                found.setdefault(request_id, set()).add(answer)
        return found

    def _day(self, day: date, wanted: set[str]) -> Iterator[tuple[str, Answer]]:
        keys = [info.key for info in self._store.list(self._bucket, object_key(day, ""))]
        with ThreadPoolExecutor(_THREADS) as pool:
            for rows in pool.map(lambda key: self._rows(key, wanted), keys):
                yield from rows

    def _rows(self, key: str, wanted: set[str]) -> list[tuple[str, Answer]]:
        import pyarrow as pa

        try:
            rows = _select(self._store.get(self._bucket, key), wanted)
        except (pa.ArrowInvalid, KeyError) as error:
            raise IntegrityError(f"s3://{self._bucket}/{key} is no file of the inference log: {error}.") from error
        return [(row["request_id"], Answer(row["version"], row["class"], row["time"])) for row in rows]


def _select(data: bytes, wanted: set[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    from ml.parquet import read_rows

    table = read_rows(data, _COLUMNS)
    ours = pc.is_in(table["request_id"], value_set=pa.array(sorted(wanted)))
    rows: list[dict[str, Any]] = table.filter(pc.and_(ours, pc.equal(table["source"], _ANSWERED))).to_pylist()
    return rows
