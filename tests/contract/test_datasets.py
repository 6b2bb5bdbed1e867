"""Datasets in a real S3 server: publish, fetch, repair, and a writer that dies half-way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs.areas import DataSettings, ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, GateError, IntegrityError
from configs.settings import Settings
from ml import leaves
from ml.dataset import Dataset
from ml.objects import ObjectStore
from tasks import datasets
from tasks.datasets.store import path_below
from tests.support.s3 import unique
from tests.support.stack import object_store


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="module")
def store(objects: ObjectStoreSettings) -> ObjectStore:
    return ObjectStore(objects)


@pytest.fixture
def settings(objects: ObjectStoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("KHET_HOME", str(tmp_path / "home"))
    return Settings(object_store=objects)


@pytest.fixture
def name() -> str:
    return unique("leaves")


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    _, data = cv2.imencode(".jpg", cv2.resize(coarse, (48, 48), interpolation=cv2.INTER_CUBIC))
    return data.tobytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 12 photos."""
    for number in range(24):
        folder = tmp_path / "photos" / ("Apple___healthy" if number < 12 else "Apple___scab")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return tmp_path / "photos"


def forget(name: str) -> None:
    """Remove the local copy, as a new machine has none."""
    root = datasets.local_root(name)
    root.rename(root.parent / unique("moved-away"))


def keys(store: ObjectStore, settings: Settings, name: str) -> dict[str, str]:
    bucket = settings.object_store.data_bucket
    prefix = f"training/{name}/"
    return {
        info.key.removeprefix(prefix): info.etag + info.modified_at.isoformat() for info in store.list(bucket, prefix)
    }


def test_an_imported_folder_can_be_fetched_on_another_machine(photos, name, settings, store):
    progress: list[tuple[int, int]] = []
    report = datasets.import_dataset(photos, name, settings, on_progress=lambda *done: progress.append(done))
    assert report.images == 24
    assert progress[0][0] <= progress[-1][0]
    rows = Dataset.open(datasets.local_root(name)).rows
    assert set(rows["path"].to_pylist()) | {"dataset.json", "manifest.parquet"} <= set(keys(store, settings, name))
    forget(name)
    seen: list[tuple[int, int]] = []
    fetched = datasets.fetch_dataset(name, settings, on_progress=lambda *done: seen.append(done))
    assert fetched.manifest_hash == report.manifest_hash
    assert fetched.rows.equals(rows)
    assert seen[-1] == (24, 24)
    fetched.verify()
    assert (fetched.root / "quarantine.csv").exists()
    assert fetched.split("train", 16).images.shape[1:] == (16, 16, 3)


def test_what_is_there_is_neither_sent_nor_fetched_again(photos, name, settings, store):
    datasets.import_dataset(photos, name, settings)
    before = keys(store, settings, name)
    assert datasets.import_dataset(photos, name, settings).unchanged
    assert keys(store, settings, name) == before
    (photos / "Apple___scab" / "new.jpg").write_bytes(picture(100))
    datasets.import_dataset(photos, name, settings)
    after = keys(store, settings, name)
    assert {key for key in before if key.startswith("images/") and after[key] != before[key]} == set()
    assert len([key for key in after if key.startswith("images/")]) == 25
    pixels = datasets.fetch_dataset(name, settings).split("test", 16).images
    seen: list[tuple[int, int]] = []
    again = datasets.fetch_dataset(name, settings, on_progress=lambda *done: seen.append(done))
    assert seen == []
    assert (again.split("test", 16).images == pixels).all()


def test_a_stale_copy_is_replaced_and_a_damaged_one_repaired(photos, name, settings):
    datasets.import_dataset(photos, name, settings)
    old = datasets.local_root(name)
    kept = old.with_name("kept")
    old.rename(kept)
    (photos / "Apple___scab" / "new.jpg").write_bytes(picture(100))
    new = datasets.import_dataset(photos, name, settings).manifest_hash
    forget(name)
    kept.rename(old)
    assert Dataset.open(old).manifest_hash != new
    fetched = datasets.fetch_dataset(name, settings)
    assert fetched.manifest_hash == new
    [first, second] = fetched.rows["path"].to_pylist()[:2]
    (fetched.root / first).write_bytes(b"bit rot")
    (fetched.root / second).unlink()
    seen: list[tuple[int, int]] = []
    datasets.fetch_dataset(name, settings, on_progress=lambda *done: seen.append(done)).verify()
    assert seen == [(1, 2), (2, 2)]


def test_a_fetch_that_was_cut_short_goes_on_where_it_stopped(photos, name, settings, store):
    datasets.import_dataset(photos, name, settings)
    forget(name)
    one_by_one = settings.model_copy(
        update={"object_store": settings.object_store.model_copy(update={"upload_threads": 1})}
    )
    stop = RuntimeError("pulled the plug")

    def pull(done: int, total: int) -> None:
        if done == 10:
            raise stop

    with pytest.raises(RuntimeError, match="pulled the plug"):
        datasets.fetch_dataset(name, one_by_one, on_progress=pull)
    assert not datasets.local_root(name).exists()
    seen: list[tuple[int, int]] = []
    datasets.fetch_dataset(name, settings, on_progress=lambda *done: seen.append(done)).verify()
    assert 0 < seen[-1][1] <= 14


def test_a_writer_that_dies_before_the_last_object_changes_nothing_for_readers(photos, name, settings, store):
    before = datasets.import_dataset(photos, name, settings).manifest_hash
    bucket, info_key = settings.object_store.data_bucket, f"training/{name}/dataset.json"
    info = store.get(bucket, info_key)
    (photos / "Apple___scab" / "new.jpg").write_bytes(picture(100))
    (photos / "Apple___scab" / "12.jpg").unlink()
    datasets.import_dataset(photos, name, settings)
    store.put(bucket, info_key, info)  # everything of the second import is there but its last object
    forget(name)
    assert datasets.fetch_dataset(name, settings).manifest_hash == before


def test_a_damaged_store_is_named_and_the_local_copy_kept(photos, name, settings, store):
    report = datasets.import_dataset(photos, name, settings)
    bucket = settings.object_store.data_bucket
    path = Dataset.open(report.root).rows["path"][0].as_py()
    (photos / "Apple___scab" / "new.jpg").write_bytes(picture(100))
    datasets.import_dataset(photos, name, settings)
    store.put(bucket, f"training/{name}/{path}", picture(999))
    forget(name)
    with pytest.raises(IntegrityError, match="is not the image in the manifest"):
        datasets.fetch_dataset(name, settings)
    store.delete(bucket, [f"training/{name}/{path}"])
    with pytest.raises(IntegrityError, match="is missing although its dataset is published"):
        datasets.fetch_dataset(name, settings)
    assert not report.root.exists()
    datasets.import_dataset(photos, name, settings)  # the advice of the message
    forget(name)
    datasets.fetch_dataset(name, settings).verify()


def test_a_damaged_dataset_file_in_the_store_is_named_and_replaced_by_the_next_import(photos, name, settings, store):
    datasets.import_dataset(photos, name, settings)
    store.put(settings.object_store.data_bucket, f"training/{name}/dataset.json", b"{}")
    with pytest.raises(IntegrityError, match=r"dataset\.json cannot be read"):
        datasets.fetch_dataset(name, settings)
    datasets.import_dataset(photos, name, settings)
    assert datasets.fetch_dataset(name, settings).info.images == 24


def test_a_dataset_that_is_not_there_is_answered_with_those_that_are(photos, name, settings):
    datasets.import_dataset(photos, name, settings)
    with pytest.raises(ConfigError, match=name) as caught:
        datasets.fetch_dataset("missing", settings)
    assert "khet data import" in str(caught.value)
    listed = {info.name: info.images for info in datasets.list_datasets(settings)}
    assert listed[name] == 24


@pytest.mark.parametrize("bad", ["", "Leaves", "../up", "a/b", "-x", "x" * 64, "blatt ü"])
def test_names_that_no_folder_or_key_can_carry_are_refused(bad, photos, settings):
    with pytest.raises(ConfigError, match="cannot name a dataset"):
        datasets.import_dataset(photos, bad, settings)


def test_a_prefix_in_a_store_is_imported_like_a_folder(photos, name, settings, store):
    bucket, prefix = settings.object_store.data_bucket, unique("raw")
    for path in photos.rglob("*.jpg"):
        store.put(bucket, f"{prefix}/{path.relative_to(photos).as_posix()}", path.read_bytes())
    store.put(bucket, f"{prefix}/severity.csv", b"file,severity\nApple___scab/12.jpg,0.5\n")
    store.put(bucket, f"{prefix}/notes.txt", b"not for import")
    store.put(bucket, f"{prefix}-other/a/1.jpg", picture(500))
    url = f"s3://{bucket}/{prefix}"
    report = datasets.import_dataset(url, name, settings)
    assert (report.images, report.source) == (24, url)
    assert sum(value is not None for value in Dataset.open(report.root).rows["severity"].to_pylist()) == 1
    local = datasets.import_dataset(photos, unique("local"), settings)
    assert local.manifest_hash == report.manifest_hash
    assert not list((report.root.parent.parent / "work").iterdir())


def test_a_prefix_with_nothing_in_it_is_refused(name, settings):
    bucket, prefix = settings.object_store.data_bucket, unique("raw")
    with pytest.raises(ConfigError, match="holds no photos"):
        datasets.import_dataset(f"s3://{bucket}/{prefix}", name, settings)


@pytest.mark.parametrize("key", ["raw/a/../../x.jpg", "raw/a//x.jpg", "raw/./x.jpg", "raw/a/..", "raw//etc/x.jpg"])
def test_a_key_that_would_leave_the_folder_is_refused(key, tmp_path):
    with pytest.raises(ConfigError, match="no path inside a folder"):
        path_below(tmp_path, key, "raw/")


@pytest.mark.parametrize("key", ["raw/", "raw/a/", "raw/notes.txt", "raw/.git/x.jpg", "raw/a/.DS_Store"])
def test_keys_that_no_import_reads_are_passed_over(key, tmp_path):
    assert path_below(tmp_path, key, "raw/") is None
    assert path_below(tmp_path, "raw/a/b.jpg", "raw/") == tmp_path / "a" / "b.jpg"


def test_a_sample_is_made_once(name, settings, store, monkeypatch):
    lenient = settings.model_copy(update={"data": DataSettings(max_bad_share=0.5)})
    report = datasets.sample_dataset(name, lenient, count=80, seed=3)
    assert report.images == 80
    assert Dataset.open(report.root).info.origin == leaves.recipe(80, seed=3)
    before = keys(store, settings, name)
    monkeypatch.setattr(leaves, "generate", None)  # calling it would fail
    again = datasets.sample_dataset(name, lenient, count=80, seed=3)
    assert (again.unchanged, again.manifest_hash) == (True, report.manifest_hash)
    assert keys(store, settings, name) == before
    monkeypatch.undo()
    monkeypatch.setenv("KHET_HOME", str(report.root.parent.parent))
    assert datasets.sample_dataset(name, lenient, count=88, seed=3).images == 88


def test_bad_photos_publish_nothing(photos, name, settings, store):
    for number in range(10):
        (photos / "Apple___scab" / f"bad{number}.jpg").write_bytes(b"broken")
    with pytest.raises(GateError, match="10 not_an_image"):
        datasets.import_dataset(photos, name, settings)
    assert keys(store, settings, name) == {}


def test_an_unreachable_store_fails_the_publishing_and_the_next_call_finishes_it(photos, name, settings, store):
    away = settings.object_store.model_copy(
        update={
            "endpoint_url": "http://127.0.0.1:9",
            "patience_s": 0.3,
            "max_attempts": 1,
            "connect_timeout_s": 0.3,
        }
    )
    with pytest.raises(ExternalError):
        datasets.import_dataset(photos, name, settings.model_copy(update={"object_store": away}))
    assert keys(store, settings, name) == {}
    assert datasets.import_dataset(photos, name, settings).unchanged
    assert "dataset.json" in keys(store, settings, name)
