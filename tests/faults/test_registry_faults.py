"""What happens to a publication when its process is killed, or the store goes away under it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.areas import ObjectStoreSettings
from configs.errors import ExternalError, is_retryable
from ml.objects import ObjectStore
from ml.version import Version
from tests.support.registry import Shelf
from tests.support.s3 import impatient, unique
from tests.support.stack import object_store, pids, start_object_store, stop_parts

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
V1 = Version(1, 0, 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3")


@pytest.fixture(scope="module")
def settings(home: Path) -> Iterator[ObjectStoreSettings]:
    with object_store(home) as found:
        yield found


@pytest.fixture
def shelf(settings: ObjectStoreSettings, tmp_path: Path) -> Shelf:
    return Shelf.make(ObjectStore(settings), unique("models"), tmp_path)


# Killed ---------------------------------------------------------------------------------------------------------------


@dataclass
class Publisher:
    """A publishing process of its own."""

    shelf: Shelf
    settings: ObjectStoreSettings
    tmp: Path
    seen: list[str] = field(default_factory=list)

    def run(self, kill_before_request: int | None = None) -> int:
        """Publish; kill -9 just before the n-th request of the process. Returns its exit status."""
        job = self.tmp / "job.json"
        assert self.settings.secret_access_key is not None
        store = self.settings.model_dump(mode="json") | {
            "secret_access_key": self.settings.secret_access_key.get_secret_value()
        }
        paths = {"key": self.tmp / "signing.key", "trusted": self.shelf.trusted[0], "folder": self.shelf.folder}
        rest = {"bucket": self.shelf.bucket, "owner": "release-1", **{k: str(v) for k, v in paths.items()}}
        job.write_text(json.dumps({"store": store, **rest}), encoding="utf-8")
        command = [sys.executable, "-m", "tests.support.publish_child", str(job)]
        self.seen = []
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as child:
            assert child.stdout is not None
            for line in child.stdout:
                self.seen.append(line.strip())
                if len(self.seen) == kill_before_request:
                    child.kill()
                    break
            child.stdout.read()
            return child.wait(30)


def test_a_publication_killed_at_any_request_is_completed_by_the_next(
    shelf: Shelf, settings: ObjectStoreSettings, tmp_path: Path
) -> None:
    """One process after another is killed, each at a later point than the one before, until one gets through."""
    shelf.folder.joinpath("model.onnx").write_bytes(b"w" * (17 * MIB))
    publisher = Publisher(shelf, settings, tmp_path)
    kills, strike = 0, random.Random(7)
    point = strike.randint(2, 5)
    while publisher.run(kill_before_request=point) == -signal.SIGKILL:
        kills += 1
        for info in shelf.registry.versions():
            assert shelf.registry.verify(info.version).ok, f"complete or absent, after {publisher.seen}"
        point += strike.randint(3, 6)
    assert publisher.seen[-1] == "published"
    assert kills >= 4
    assert [info.version for info in shelf.registry.versions()] == [V1]
    assert shelf.registry.verify(V1).ok
    assert shelf.registry.verify(V1).unlisted == ()
    assert shelf.registry.abandoned() == []
    assert publisher.run() == 0, "publishing once more changes nothing"
    assert [info.version for info in shelf.registry.versions()] == [V1]


# The store goes away --------------------------------------------------------------------------------------------------


def upload_in_thread(
    store: ObjectStore, bucket: str, items: dict[str, Path | bytes]
) -> tuple[threading.Thread, list[object]]:
    outcome: list[object] = []
    progressed = threading.Event()

    def work() -> None:
        try:
            store.upload(bucket, items, lambda done, total: progressed.set() if 0 < done < total else None)
            outcome.append("stored")
        except ExternalError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert progressed.wait(60), "the upload was over before it could be interrupted"
    return thread, outcome


def many_objects(tmp_path: Path, base: str) -> dict[str, Path | bytes]:
    """Enough that an upload takes seconds: two files in parts, and hundreds of small ones."""
    items: dict[str, Path | bytes] = {}
    for name in ("model.onnx", "checkpoint.ckpt"):
        path = tmp_path / name
        path.write_bytes(os.urandom(24 * MIB))
        items[f"{base}/{name}"] = path
    return items | {f"{base}/{n:05d}": b"%d" % n for n in range(600)}


@contextlib.contextmanager
def frozen(home: Path) -> Iterator[None]:
    """The server still has its connections and answers nothing."""
    for pid in pids(home):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids(home):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed(home: Path) -> Iterator[None]:
    """The server is gone, and comes back on the same address with its data."""
    stop_parts(home, signal.SIGKILL)
    yield
    start_object_store(home)


@pytest.mark.parametrize(("away", "outage_s"), [(frozen, 6), (killed, 20)], ids=["frozen for 6 s", "killed for 20 s"])
def test_a_store_that_is_away_in_the_middle_of_an_upload_fails_nothing(
    tmp_path: Path, away: Callable[[Path], AbstractContextManager[None]], outage_s: float
) -> None:
    home = tmp_path / "s3"
    settings = start_object_store(home, read_timeout_s=2.0, upload_threads=4)
    store = ObjectStore(settings)
    items = many_objects(tmp_path, "big")
    thread, outcome = upload_in_thread(store, settings.models_bucket, items)
    with away(home):
        thread.join(outage_s)
        assert outcome == []
        assert thread.is_alive()
    thread.join(90)
    assert outcome == ["stored"]
    assert {info.key for info in store.list(settings.models_bucket, "big/")} == set(items)
    for key, item in items.items():
        if isinstance(item, Path):
            assert store.get(settings.models_bucket, key) == item.read_bytes()
    stop_parts(home)


def test_a_store_that_stays_away_is_reported_with_what_was_stored(tmp_path: Path) -> None:
    home = tmp_path / "s3"
    settings = start_object_store(home, upload_threads=4)
    store = impatient(settings)
    items = many_objects(tmp_path, "big")
    thread, outcome = upload_in_thread(store, settings.models_bucket, items)
    stop_parts(home, signal.SIGKILL)
    thread.join(60)
    (error,) = outcome
    assert isinstance(error, ExternalError)
    assert is_retryable(error)
    assert f"{settings.endpoint_url} did not answer" in str(error)
    assert "were stored" in str(error)
    assert "were not (" in str(error)
    assert "khet up" in str(error)
    assert len(str(error)) < 3000
    start_object_store(home)
    ObjectStore(settings).upload(settings.models_bucket, items)
    assert sum(1 for _ in store.list(settings.models_bucket, "big/")) == len(items)
    stop_parts(home)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(shelf: Shelf, tmp_path: Path) -> None:
    """The limit on a file's size makes the same error at the same place as a disk without room."""
    shelf.folder.joinpath("model.onnx").write_bytes(b"w" * MIB)
    shelf.publish("release-1")
    got, before = tmp_path / "got", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ExternalError, match=r"cannot be written: File too large") as caught:
            shelf.registry.fetch(V1, got, only=["model.onnx"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not is_retryable(caught.value)
    assert list(got.iterdir()) == []
    assert shelf.registry.fetch(V1, got, only=["model.onnx"]).version == V1
