"""States and results of a training in a real object store (SeaweedFS): whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError, IntegrityError
from ml.bundle import Lineage
from ml.checkpoint import write_atomically
from ml.checkpoint_courier import Courier
from ml.checkpoint_store import BEST, LAST, LINEAGE, RESULT, Finished, TrainingStore, fingerprint, forget, split_address
from ml.lineage import collect_lineage
from ml.objects import ObjectStore
from ml.results import TrainResult
from tests.support.s3 import unique
from tests.support.stack import object_store
from tests.support.training import config

BUCKET = "khet-guard-models"
RUN = fingerprint(config(), "d" * 64)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield ObjectStore(found)


@pytest.fixture
def prefix() -> str:
    return unique("training")


@pytest.fixture
def store(objects: ObjectStore, prefix: str) -> TrainingStore:
    return TrainingStore(objects, BUCKET, prefix, RUN)


def write(folder: Path, last: bytes, best: bytes | None = b"best") -> dict[str, Path]:
    """A state of a training, written as training does; what the files hold does not matter to the store."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {LAST: last, **({BEST: best} if best is not None else {})}
    for name, data in contents.items():
        write_atomically(folder / name, data)
    return {name: folder / name for name in contents}


def result(folder: Path) -> TrainResult:
    return TrainResult(
        checkpoint=folder / BEST, net="convnet", px=32, seed=3, epochs=2, steps=10, elapsed_s=1.0, images_per_s=10.0,
        best_val_accuracy=0.75, dataset="leaves", dataset_hash="d" * 64, hardware={"cpu": "x"}, resumed_from_step=None,
        history=(),
    )  # fmt: skip


def finish(store: TrainingStore, folder: Path) -> Finished:
    files = write(folder, b"last")
    lineage = collect_lineage(config={"net": "convnet"}, seed=3, dataset="leaves", dataset_hash="d" * 64)
    return store.finish(result(folder), lineage, {BEST: files[BEST]})


def keys(objects: ObjectStore, prefix: str) -> list[str]:
    return [found.key.removeprefix(f"{prefix}/{RUN}/") for found in objects.list(BUCKET, prefix)]


def damage(objects: ObjectStore, prefix: str, holding: str, data: bytes) -> None:
    """Replace what is stored under the one key that contains `holding`."""
    [key] = [found.key for found in objects.list(BUCKET, prefix) if holding in found.key]
    objects.put(BUCKET, key, data)


def test_an_empty_folder_gets_the_newest_state(store: TrainingStore, tmp_path: Path) -> None:
    assert store.newest() is None and store.bring_newest(tmp_path / "new") is None
    for step in (5, 10):
        store.keep(step, step // 5, write(tmp_path / "out", b"state of %d" % step))
    found = store.bring_newest(tmp_path / "new")
    assert found is not None and (found.step, found.epoch) == (10, 2)
    assert (tmp_path / "new" / LAST).read_bytes() == b"state of 10"
    assert (tmp_path / "new" / BEST).read_bytes() == b"best"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {LAST, BEST}


def test_two_states_are_kept_and_nothing_else(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    for step in range(1, 6):
        store.keep(step, 0, write(tmp_path, b"%d" % step, best=b"best of %d" % (step // 2)))
    names = keys(objects, prefix)
    assert [name for name in names if name.startswith("checkpoints/")] == [
        "checkpoints/000000000004.json",
        "checkpoints/000000000005.json",
    ]
    files = sorted(name.rpartition("-")[2] for name in names if name.startswith("files/"))
    assert files == [BEST, LAST, LAST], "the best that both name lies there once"


def test_a_state_without_a_validated_model_has_no_best(store: TrainingStore, tmp_path: Path) -> None:
    store.keep(1, 0, write(tmp_path / "out", b"early", best=None))
    assert store.bring_newest(tmp_path / "new") is not None
    assert {path.name for path in (tmp_path / "new").iterdir()} == {LAST}


@pytest.mark.parametrize("cut", [b"new", b""], ids=["truncated", "empty"])
def test_a_truncated_state_is_reported_and_the_one_before_is_taken(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    cut: bytes,
) -> None:  # fmt: skip
    store.keep(1, 0, write(tmp_path / "out", b"older state"))
    kept = store.keep(2, 1, write(tmp_path / "out", b"newer state"))
    damage(objects, prefix, kept.files[LAST].sha256, cut)
    with caplog.at_level(logging.WARNING):
        found = store.bring_newest(tmp_path / "new")
    assert found is not None and found.step == 1
    assert (tmp_path / "new" / LAST).read_bytes() == b"older state"
    assert "step 2 is damaged; taking the one before" in caplog.text
    assert f"{len(cut)} of 11 bytes" in caplog.text


def test_a_state_of_another_training_is_never_taken(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.keep(1, 0, write(tmp_path / "out", b"ours"))
    other = TrainingStore(objects, BUCKET, prefix, "f" * 20)
    assert other.bring_newest(tmp_path / "new") is None, "another training has a folder of its own"
    copied = other.keep(9, 0, write(tmp_path / "other", b"theirs"))
    objects.put(BUCKET, f"{prefix}/{RUN}/checkpoints/000000000009.json", copied.model_dump_json().encode())
    found = store.bring_newest(tmp_path / "new")
    assert found is not None and found.step == 1
    assert "belongs to another training" in caplog.text


@pytest.mark.parametrize("data", [b"", b'{"step": 2', b"{}"])
def test_an_unreadable_pointer_is_passed_over(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    data: bytes,
) -> None:  # fmt: skip
    store.keep(1, 0, write(tmp_path / "out", b"older"))
    store.keep(2, 0, write(tmp_path / "out", b"newer"))
    damage(objects, prefix, "000000000002.json", data)
    found = store.bring_newest(tmp_path / "new")
    assert found is not None and found.step == 1
    assert "cannot be read and is passed over" in caplog.text


def test_a_damaged_state_leaves_the_folder_as_it_was(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    kept = store.keep(1, 0, write(tmp_path / "out", b"state", best=b"new best"))
    damage(objects, prefix, kept.files[BEST].sha256, b"cut")
    write(tmp_path / "here", b"local", best=b"local best")
    assert store.bring_newest(tmp_path / "here") is None
    assert (tmp_path / "here" / LAST).read_bytes() == b"local"
    assert (tmp_path / "here" / BEST).read_bytes() == b"local best"


def test_a_finished_training_is_brought_with_its_result_and_its_states_are_gone(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    assert store.finished() is None
    store.keep(10, 1, write(tmp_path / "out", b"state"))
    finish(store, tmp_path / "out")
    found = store.finished()
    assert found is not None
    assert found.lineage.packages["torch"] and found.lineage.config == {"net": "convnet"}
    brought = store.bring_result(found, tmp_path / "new")
    assert brought == result(tmp_path / "new") == TrainResult.read(tmp_path / "new" / RESULT)
    assert (tmp_path / "new" / BEST).read_bytes() == b"best"
    assert Lineage.read(tmp_path / "new" / LINEAGE) == found.lineage
    assert [name for name in keys(objects, prefix) if not name.endswith(BEST)] == ["result.json"]


def test_a_result_that_is_not_what_was_stored_is_refused(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    finish(store, tmp_path / "out")
    damage(objects, prefix, "files/", b"other weights")
    found = store.finished()
    assert found is not None
    with pytest.raises(IntegrityError, match="is not what was stored"):
        store.bring_result(found, tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())
    forget(objects, BUCKET, prefix)
    with pytest.raises(IntegrityError, match="is not whole"):
        store.bring_result(found, tmp_path / "new")


def test_forgetting_leaves_nothing(store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path) -> None:
    store.keep(1, 0, write(tmp_path, b"state"))
    neighbour = TrainingStore(objects, BUCKET, f"{prefix}-b", RUN)
    neighbour.keep(1, 0, write(tmp_path, b"state"))
    assert forget(objects, BUCKET, prefix) == 3
    assert store.newest() is None and neighbour.newest() is not None


# The courier ----------------------------------------------------------------------------------------------------------


def test_the_courier_stores_what_is_offered_and_not_what_is_overtaken(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), Courier(store, tmp_path, every_s=3600.0) as courier:
        for step in range(1, 50):
            write(tmp_path, b"%d" % step)
            courier.offer(step, 0)
        write(tmp_path, b"not offered any more")
        raise KeyboardInterrupt  # an interrupted training: what waits is sent
    found = store.bring_newest(tmp_path / "new")
    assert found is not None and found.step == 49
    assert (tmp_path / "new" / LAST).read_bytes() == b"49"
    pointers = [name for name in keys(objects, prefix) if name.startswith("checkpoints/")]
    assert len(pointers) <= 2
    assert not (tmp_path / ".sending").exists()


def test_after_a_clean_end_nothing_waits_to_be_sent(store: TrainingStore, tmp_path: Path) -> None:
    with Courier(store, tmp_path, every_s=3600.0) as courier:
        for step in (1, 2, 3):
            write(tmp_path, b"%d" % step)
            courier.offer(step, 0)
    assert (found := store.newest()) is None or found.step < 3


# Addresses and identity -----------------------------------------------------------------------------------------------


def test_a_fingerprint_changes_with_configuration_and_data() -> None:
    assert fingerprint(config(), "a") == fingerprint(config(), "a")
    others = {fingerprint(config(), "b"), fingerprint(config(seed=1), "a"), fingerprint(config(), "a")}
    assert len(others) == 3


def test_addresses() -> None:
    assert split_address("s3://bucket/a/b/") == ("bucket", "a/b")
    for wrong in ("bucket/a", "s3://bucket", "s3://bucket/", "https://bucket/a", "s3:///a"):
        with pytest.raises(ConfigError, match="s3://bucket/prefix"):
            split_address(wrong)


def test_the_pointer_names_sizes_and_digests(
    store: TrainingStore, objects: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    store.keep(7, 3, write(tmp_path, b"state"))
    data = json.loads(objects.get(BUCKET, f"{prefix}/{RUN}/checkpoints/000000000007.json"))
    assert data["files"][LAST]["size_bytes"] == 5 and len(data["files"][LAST]["sha256"]) == 64
    assert (data["step"], data["epoch"], data["fingerprint"]) == (7, 3, RUN)
