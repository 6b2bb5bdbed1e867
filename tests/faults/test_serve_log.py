"""The prediction log when the object store, the disk or the replica fails: no request notices, and rows are counted."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs.areas import ObjectStoreSettings
from ml.images import STATISTICS
from ml.objects import ObjectStore
from tests.support.replica import Replica, launch, photo, running, store_environment, wait_until
from tests.support.stack import start_object_store, stop_parts
from tests.support.tiny_model import EMBEDDING_SIZE, write_tiny_model

MEMORY_DISK = 'mount -t tmpfs -o size=48k none {} && exec "$@"'


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A model, and a store that is stopped at the end."""
    write_tiny_model(tmp_path / "model")
    yield tmp_path
    stop_parts(tmp_path / "s3")


def _arguments(home: Path, name: str) -> list[str]:
    return ["--model", str(home / "model"), "--log-predictions", "--name", name]


def _environment(store: ObjectStoreSettings, **changes: str) -> dict[str, str]:
    quick = {"MODEL_VERSION": "v1.2.3", "KHET_SERVING__LOG_FLUSH_S": "0.1", "KHET_SERVING__LOG_BATCH_ROWS": "10"}
    return quick | store_environment(store) | changes


def _stopped_store(home: Path) -> ObjectStoreSettings:
    """A store that was there once: its address is known and nobody answers."""
    store = start_object_store(home / "s3")
    stop_parts(home / "s3")
    return store


def _send(replica: Replica, count: int, prefix: str) -> list[str]:
    """Predictions that all succeed; returns their request ids."""
    names = [f"{prefix}-{index}" for index in range(count)]
    for index, name in enumerate(names):
        assert replica.predict(photo(index), **{"x-request-id": name}).status_code == 200
    return names


def _logged(store: ObjectStoreSettings) -> Counter[str]:
    """How often each request id is in the log."""
    client = ObjectStore(store)
    found: Counter[str] = Counter()
    for item in client.list(store.data_bucket, "inference/"):
        table = pq.read_table(io.BytesIO(client.get(store.data_bucket, item.key)))
        found.update(table.column("request_id").to_pylist())
    return found


def _wait_logged(store: ObjectStoreSettings, names: list[str]) -> None:
    wait_until(lambda: len(_logged(store)) >= len(names), 30.0, "all rows delivered")
    assert _logged(store) == Counter(names)


def test_every_prediction_is_in_the_log_once_with_what_drift_needs(home: Path) -> None:
    store = start_object_store(home / "s3")
    with running(home, _arguments(home, "replica-a"), _environment(store)) as replica:
        names = _send(replica, 25, "scan")
        wait_until(lambda: replica.metric("prediction_log_rows_total", result="written") == 25)
        names += _send(replica, 3, "last")
        assert replica.terminate() == 0
    assert _logged(store) == Counter(names)
    client = ObjectStore(store)
    items = list(client.list(store.data_bucket, "inference/"))
    assert all(item.key.startswith("inference/dt=2") and "/replica-a-" in item.key for item in items)
    row = pq.read_table(io.BytesIO(client.get(store.data_bucket, items[0].key))).to_pylist()[0]
    assert (row["version"], row["replica"]) == ("v1.2.3", "replica-a")
    assert len(row["embedding"]) == EMBEDDING_SIZE
    assert sum(row["probs"]) == pytest.approx(1.0, abs=1e-5)
    assert row["probability"] == max(row["probs"])
    assert len(row["image_sha256"]) == 64
    assert all(f"stat_{name}" in row for name in STATISTICS)
    assert row["time"].tzinfo is not None
    assert row["latency_ms"] > 0


def test_a_store_that_is_away_costs_no_request_and_no_row(home: Path) -> None:
    store = _stopped_store(home)
    with running(home, _arguments(home, "replica-a"), _environment(store)) as replica:
        names = _send(replica, 40, "away")
        wait_until(lambda: replica.metric("prediction_log_spooled_rows") == 40)
        wait_until(lambda: replica.metric("prediction_log_problems_total", kind="store") >= 1)
        assert replica.get("/readyz").status_code == 200
        start_object_store(home / "s3")
        names += _send(replica, 5, "back")
        wait_until(lambda: replica.metric("prediction_log_rows_total", result="written") == 45, 30.0)
        assert replica.metric("prediction_log_rows_total", result="dropped") == 0
        assert replica.metric("prediction_log_spooled_bytes") == 0
        assert replica.text().count("is not delivered") == 1, "one line an outage"
    _wait_logged(store, names)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_what_a_dead_replica_left_in_the_spool_is_delivered_by_the_next(home: Path, how: str) -> None:
    store = _stopped_store(home)
    with running(home, _arguments(home, "first"), _environment(store)) as replica:
        names = _send(replica, 20, "left")
        if how == "SIGKILL":
            wait_until(lambda: replica.metric("prediction_log_spooled_rows") == 20)
            replica.process.kill()
            replica.process.wait(10)
        else:
            assert replica.terminate(timeout_s=8) == 0
    start_object_store(home / "s3")
    with running(home, _arguments(home, "second"), _environment(store)) as replica:
        names += _send(replica, 1, "own")
        _wait_logged(store, names)
        assert replica.terminate() == 0
    assert not [path for path in (home / "serving" / "spool").rglob("*") if path.is_file()]


def test_several_new_replicas_share_what_was_left_without_doubling_it(home: Path) -> None:
    store = _stopped_store(home)
    with running(home, _arguments(home, "first"), _environment(store)) as replica:
        names = _send(replica, 60, "left")
        wait_until(lambda: replica.metric("prediction_log_spooled_rows") == 60)
        replica.process.kill()
        replica.process.wait(10)
    start_object_store(home / "s3")
    with ExitStack() as stack:
        several = [launch(home, _arguments(home, f"next-{index}"), _environment(store)) for index in range(3)]
        for replica in several:
            stack.callback(replica.end)
        for replica in several:
            replica.wait_ready()
        _wait_logged(store, names)
        written = sum(replica.metric("prediction_log_rows_total", result="written") for replica in several)
        assert written == 60


def test_a_spool_over_its_limit_drops_the_oldest_and_says_so(home: Path) -> None:
    store = _stopped_store(home)
    small = _environment(store, KHET_SERVING__SPOOL_MAX_BYTES="40000")
    with running(home, _arguments(home, "replica-a"), small) as replica:
        names = _send(replica, 100, "many")
        wait_until(lambda: replica.metric("prediction_log_queued_rows") == 0)
        wait_until(lambda: replica.metric("prediction_log_rows_total", result="dropped") > 0)
        assert replica.metric("prediction_log_spooled_bytes") <= 40000
        start_object_store(home / "s3")
        wait_until(lambda: replica.metric("prediction_log_spooled_rows") == 0, 30.0)
        written = replica.metric("prediction_log_rows_total", result="written")
        dropped = replica.metric("prediction_log_rows_total", result="dropped")
        assert written + dropped == 100
    logged = _logged(store)
    assert len(logged) == written
    # The batch that is just being tried is kept as well, however old it is.
    assert set(names[len(names) - int(written) + 10 :]) <= set(logged), "the youngest are kept"


def test_a_spool_that_cannot_be_written_is_bypassed(home: Path) -> None:
    store = start_object_store(home / "s3")
    (home / "serving").mkdir()
    (home / "serving" / "spool").write_text("a file where the folder should be", encoding="utf-8")
    with running(home, _arguments(home, "replica-a"), _environment(store)) as replica:
        names = _send(replica, 20, "direct")
        wait_until(lambda: replica.metric("prediction_log_rows_total", result="written") == 20)
        assert replica.metric("prediction_log_problems_total", kind="spool") >= 1
        assert replica.text().count("The spool takes no batches") == 1, "logged once"
        assert replica.terminate() == 0
    assert _logged(store) == Counter(names)


def _can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs a mount namespace for a small disk")
def test_a_full_disk_hurts_only_the_log_and_only_for_a_while(home: Path) -> None:
    store = _stopped_store(home)
    disk = home / "disk"
    disk.mkdir()
    prefix = ["unshare", "-rm", "sh", "-c", MEMORY_DISK.format(disk), "sh"]
    environment = _environment(store, KHET_SERVING__CACHE_DIR=str(disk))
    with running(home, _arguments(home, "replica-a"), environment, prefix=prefix) as replica:
        names = _send(replica, 120, "full")
        wait_until(lambda: replica.metric("prediction_log_problems_total", kind="spool") > 0)
        assert "No space left on device" in replica.text()
        assert replica.get("/readyz").status_code == 200
        start_object_store(home / "s3")
        # The pause between two tries has grown to half a minute by now.
        wait_until(lambda: replica.metric("prediction_log_rows_total", result="written") == 120, 90.0)
        assert replica.metric("prediction_log_rows_total", result="dropped") == 0
        names += _send(replica, 10, "after")
        wait_until(lambda: "The spool takes batches again" in replica.text())
        _wait_logged(store, names)  # while it lives: this disk dies with it
