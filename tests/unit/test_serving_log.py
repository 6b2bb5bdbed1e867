"""The prediction log's parts without a server: rows, spool, delivery."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.errors import ExternalError
from ml.images import STATISTICS
from ml.serving.bodies import read_head
from ml.serving.metrics import Metrics
from ml.serving.prediction_log import LogSettings, PredictionLog
from ml.serving.rows import Batch, Origin, Row, to_batches
from ml.serving.spool import Spool, parse_entry
from tests.support.replica import wait_until

ORIGIN = Origin("v1.0.0", "replica_a", ("healthy", "blight"))
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
DAY = NOON.date()


def _row(name: str = "a", at: datetime = NOON, chosen: int = 1) -> Row:
    probs = np.array([0.25, 0.75], dtype=np.float32)
    embedding = np.arange(4, dtype=np.float32)
    return Row(name, at.timestamp(), chosen, probs, -3.5, True, dict.fromkeys(STATISTICS, 0.5), embedding, "ab", 7.0)


def _batch(name: str, size: int = 100, rows: int = 10, day: date = DAY) -> Batch:
    return Batch(day, f"{name}.parquet", rows, bytes(size))


def _spool(root: Path, max_bytes: int = 10_000) -> Spool:
    ticks = count(1)
    return Spool(root, max_bytes, clock_ns=lambda: next(ticks))


# Rows -------------------------------------------------------------------------------------------------------------


def test_a_row_survives_parquet() -> None:
    (batch,) = to_batches([_row("a"), _row("b", chosen=0)], ORIGIN)
    table = pq.read_table(io.BytesIO(batch.data))
    first, second = table.to_pylist()
    assert (first["request_id"], first["class"], first["probability"]) == ("a", "blight", 0.75)
    assert (second["class"], second["probability"]) == ("healthy", 0.25)
    assert first["time"] == NOON
    assert first["probs"] == [0.25, 0.75]
    assert first["embedding"] == [0.0, 1.0, 2.0, 3.0]
    assert first["stat_sharpness"] == 0.5
    assert json.loads(table.schema.metadata[b"khet.classes"]) == ["healthy", "blight"]


@pytest.mark.parametrize(
    ("header", "source"), [(None, "user"), (b"x-khet-shadow", "shadow"), (b"x-khet-probe", "probe")]
)
def test_copies_and_probes_are_told_from_users_photos(header: bytes | None, source: str) -> None:
    head = read_head({"headers": [(header, b"1")] if header else []})
    assert head.source == source
    row = dataclasses.replace(_row(), source=head.source)
    table = pq.read_table(io.BytesIO(to_batches([row], ORIGIN)[0].data))
    assert table["source"].to_pylist() == [source]


def test_a_batch_is_cut_at_midnight_utc() -> None:
    late, early = (datetime(2026, 1, day, hour, tzinfo=UTC) for day, hour in ((30, 23), (31, 0)))
    batches = to_batches([_row("a", late), _row("b", early), _row("c", late)], ORIGIN)
    assert [(batch.day.isoformat(), batch.rows) for batch in batches] == [("2026-01-30", 2), ("2026-01-31", 1)]
    assert batches[0].key.startswith("inference/dt=2026-01-30/replica_a-")


# Spool ------------------------------------------------------------------------------------------------------------


def test_the_oldest_comes_first_and_goes_only_when_delivered(tmp_path: Path) -> None:
    spool = _spool(tmp_path)
    for name in ("one", "two"):
        spool.add(_batch(name))
    first = spool.oldest()
    assert first is not None
    assert first.key == "inference/dt=2026-01-31/one.parquet"
    assert spool.borrow(first) == bytes(100)
    spool.give_back(first)
    assert spool.oldest() == first
    spool.remove(first)
    assert (spool.rows, spool.used_bytes) == (10, 100)


def test_room_is_made_from_the_oldest_but_not_from_the_one_in_delivery(tmp_path: Path) -> None:
    spool = _spool(tmp_path, max_bytes=300)
    for name in ("one", "two", "three"):
        assert spool.add(_batch(name)) == 0
    oldest = spool.oldest()
    assert oldest is not None
    spool.borrow(oldest)
    assert spool.add(_batch("four", rows=7)) == 10
    spool.give_back(oldest)
    assert spool.used_bytes == 300
    assert {path.name.split("_")[3] for path in tmp_path.glob("*/*.parquet")} == {
        "one.parquet",
        "three.parquet",
        "four.parquet",
    }
    assert spool.add(_batch("giant", size=301, rows=3)) == 3, "what can never fit is dropped itself"


def test_what_a_living_process_holds_is_not_taken_and_what_a_dead_one_left_is(tmp_path: Path) -> None:
    owner, other = _spool(tmp_path), _spool(tmp_path)
    owner.add(_batch("one"))
    (next(tmp_path.glob("*/lock")).parent / "cut.partial").write_bytes(b"cut by a kill")
    assert other.adopt() == (0, 0)
    owner.close()  # as the kernel does for a killed process
    assert other.adopt() == (10, 0)
    entry = other.oldest()
    assert entry is not None
    assert (entry.key, other.borrow(entry)) == ("inference/dt=2026-01-31/one.parquet", bytes(100))
    assert other.adopt() == (0, 0)
    other.remove(entry)
    other.close()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_adopting_keeps_to_the_limit_and_prefers_the_youngest(tmp_path: Path) -> None:
    owner, other = _spool(tmp_path), _spool(tmp_path, max_bytes=250)
    for name in ("one", "two", "three"):
        owner.add(_batch(name))
    owner.close()
    assert other.adopt() == (20, 10)
    assert other.used_bytes == 200
    entry = other.oldest()
    assert entry is not None
    assert entry.key.endswith("two.parquet")


def test_two_processes_that_adopt_at_once_share_nothing(tmp_path: Path) -> None:
    for number in range(20):
        owner = _spool(tmp_path)
        owner.add(_batch(f"batch-{number}"))
        owner.close()
    several = [_spool(tmp_path) for _ in range(4)]
    taken: list[int] = []
    threads = [threading.Thread(target=lambda s=s: taken.append(s.adopt()[0])) for s in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 200
    assert sum(spool.rows for spool in several) == 200


@pytest.mark.parametrize("name", ["lock", "x.parquet", "1_2_2026-01-31_a.parquet", "0" * 20 + "_1_2026-01-31_../a"])
def test_files_of_others_are_left_alone(name: str) -> None:
    assert parse_entry(name, 1) is None


# Delivery ---------------------------------------------------------------------------------------------------------


class Store:
    """Objects in memory, or an outage."""

    def __init__(self) -> None:
        self.away = False
        self.objects: dict[str, bytes] = {}
        self.calls = 0

    def put(self, bucket: str, key: str, data: bytes) -> bool:
        self.calls += 1
        if self.away:
            raise ExternalError("The store is away.")
        self.objects[key] = data
        return True

    def request_ids(self) -> list[str]:
        tables = [pq.read_table(io.BytesIO(data)) for data in self.objects.values()]
        return sorted(name for table in tables for name in table.column("request_id").to_pylist())


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def log(tmp_path: Path, store: Store) -> Iterator[PredictionLog]:
    metrics = Metrics("v1.0.0")
    settings = LogSettings(bucket="data", batch_rows=10, flush_s=0.02)
    log = PredictionLog(settings, ORIGIN, store.put, Spool(tmp_path / "spool", 100_000), metrics)
    yield log
    log.close()


def _sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, {"version": "v1.0.0", **labels}) or 0.0


def _metrics(log: PredictionLog) -> Metrics:
    return log._metrics


def _fill(log: PredictionLog, names: list[str]) -> None:
    for name in names:
        log.append(_row(name))


def test_rows_reach_the_store_and_the_disk_is_empty_again(log: PredictionLog, store: Store, tmp_path: Path) -> None:
    log.start()
    names = [f"{index:03d}" for index in range(95)]
    _fill(log, names)
    wait_until(lambda: _sample(_metrics(log), "prediction_log_rows_total", result="written") == 95)
    assert store.request_ids() == names
    assert not list((tmp_path / "spool").rglob("*.parquet"))


def test_closing_writes_what_is_queued(log: PredictionLog, store: Store) -> None:
    log.start()
    _fill(log, ["a", "b"])
    log.close()
    assert store.request_ids() == ["a", "b"]


def test_a_full_queue_drops_and_counts_instead_of_blocking(log: PredictionLog) -> None:
    _fill(log, [str(index) for index in range(205)])  # no writer yet, and room for twenty batches
    assert _sample(_metrics(log), "prediction_log_queued_rows") == 200
    assert _sample(_metrics(log), "prediction_log_rows_total", result="dropped") == 5
    log.start()


def test_an_outage_is_waited_out(log: PredictionLog, store: Store) -> None:
    store.away = True
    log.start()
    _fill(log, ["a", "b", "c"])
    wait_until(lambda: store.calls > 0)
    assert store.objects == {}
    assert _sample(_metrics(log), "prediction_log_spooled_rows") == 3
    store.away = False
    wait_until(lambda: store.request_ids() == ["a", "b", "c"])


def test_rows_that_cannot_be_encoded_do_not_stop_the_others(log: PredictionLog, store: Store) -> None:
    broken = Row("x", NOON.timestamp(), 99, np.zeros(2, np.float32), 0.0, True, {}, np.zeros(4, np.float32), "", 0.0)
    log.append(broken)
    log.start()
    wait_until(lambda: _sample(_metrics(log), "prediction_log_rows_total", result="dropped") == 1)
    _fill(log, ["a"])
    wait_until(lambda: store.request_ids() == ["a"])
    assert _sample(_metrics(log), "prediction_log_problems_total", kind="encode") == 1


def test_without_a_disk_many_small_batches_are_kept_as_long_as_their_rows_fit(store: Store, tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be", encoding="utf-8")
    settings = LogSettings("data", 10, 0.01)
    log = PredictionLog(settings, ORIGIN, store.put, Spool(tmp_path / "spool", 100_000), Metrics("v1.0.0"))
    store.away = True
    log.start()
    names = [f"{index:03d}" for index in range(60)]
    for index, name in enumerate(names):
        log.append(_row(name))
        wait_until(lambda kept=index + 1: _sample(_metrics(log), "prediction_log_problems_total", kind="spool") == kept)
    assert _sample(_metrics(log), "prediction_log_rows_total", result="dropped") == 0
    store.away = False
    wait_until(lambda: sorted(store.request_ids()) == names, 60.0)
    log.close()
