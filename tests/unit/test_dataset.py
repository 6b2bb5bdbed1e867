"""Importing a folder of photos: what is taken, what is put aside, how it is split, and that it is all or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from configs.areas import DataSettings
from configs.errors import ConfigError, ExternalError, GateError, IntegrityError
from ml import splits
from ml.dataset import Dataset, ImportReport, import_folder
from ml.importing import recover
from ml.splits import SPLITS

RULES = DataSettings()
LENIENT = DataSettings(max_bad_share=0.9)


def picture(seed: int, size: int = 48) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    _, data = cv2.imencode(".jpg", cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC))
    return data.tobytes()


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 20, 20 and 10 different photos."""
    folder = tmp_path / "photos"
    for number in range(50):
        label = ("Apple___healthy", "Apple___scab", "Apple___rust")[min(2, number // 20)]
        put(folder, f"{label}/{number}.jpg", picture(number))
    return folder


def run(source: Path, root: Path, rules: DataSettings = RULES) -> ImportReport:
    return import_folder(source, root, name="apples", settings=rules)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "datasets" / "apples"


def reasons(report: ImportReport) -> dict[str, str]:
    return {bad.path: bad.reason for bad in report.quarantined}


# What is taken --------------------------------------------------------------------------------------------------------


def test_an_import_tells_what_it_took(photos, root):
    seen: list[tuple[int, int]] = []
    report = import_folder(
        photos, root, name="apples", settings=RULES, on_progress=lambda done, total: seen.append((done, total))
    )
    assert (report.files, report.images, report.quarantined) == (50, 50, ())
    assert {label: sum(counts.values()) for label, counts in report.counts.items()} == {
        "Apple___healthy": 20,
        "Apple___rust": 10,
        "Apple___scab": 20,
    }
    assert seen[-1] == (50, 50)
    dataset = Dataset.open(root)
    assert dataset.classes == ("Apple___healthy", "Apple___rust", "Apple___scab")
    assert dataset.healthy_classes == ("Apple___healthy",)
    assert dataset.manifest_hash == report.manifest_hash
    assert ImportReport.read(root / "import.json").images == 50
    dataset.verify()


def test_the_manifest_describes_every_image(photos, root):
    (photos / "severity.csv").write_text("file,severity\nApple___scab/20.jpg,0.25\nApple___scab/21.jpg,\n")
    run(photos, root)
    rows = {row["source"]: row for row in pq.read_table(root / "manifest.parquet").to_pylist()}
    assert len(rows) == 50
    row = rows["Apple___scab/20.jpg"]
    assert (row["label"], row["width"], row["height"], row["severity"]) == ("Apple___scab", 48, 48, 0.25)
    assert rows["Apple___scab/21.jpg"]["severity"] is None
    assert (root / row["path"]).read_bytes() == picture(20)
    assert row["size_bytes"] == len(picture(20))
    assert 0 < row["brightness"] < 1 and row["sharpness"] > 0
    assert row["split"] in SPLITS


def test_the_same_photos_give_the_same_dataset_from_anywhere(photos, root, tmp_path):
    first = run(photos, root)
    info = (root / "dataset.json").read_bytes()
    again = run(photos, root)
    assert (again.manifest_hash, again.unchanged, first.unchanged) == (first.manifest_hash, True, False)
    assert (root / "dataset.json").read_bytes() == info
    moved = tmp_path / "elsewhere"
    for path in sorted(photos.rglob("*.jpg"), reverse=True):
        put(moved, f"{path.parent.name}/deep/er/x{path.name}", path.read_bytes())
    assert run(moved, tmp_path / "other").manifest_hash == first.manifest_hash


def test_the_hash_follows_content_labels_and_splits(photos, root, tmp_path):
    before = run(photos, root).manifest_hash
    assert run(photos, tmp_path / "b", DataSettings(split_seed=1)).manifest_hash != before
    (photos / "Apple___scab/20.jpg").rename(photos / "Apple___rust/20.jpg")
    assert run(photos, tmp_path / "c").manifest_hash != before


def test_the_holdout_hash_follows_the_test_images_only(photos, root, tmp_path):
    run(photos, root)
    dataset = Dataset.open(root)
    train = dataset.rows_of("train")["source"].to_pylist()
    (photos / train[0]).write_bytes(picture(1000))
    run(photos, tmp_path / "b")
    other = Dataset.open(tmp_path / "b")
    if other.rows_of("test")["sha256"].to_pylist() == dataset.rows_of("test")["sha256"].to_pylist():
        assert other.holdout_hash() == dataset.holdout_hash()
    assert other.holdout_hash("train") != dataset.holdout_hash("train")


def test_unicode_names_litter_and_upper_case_suffixes(photos, root):
    put(photos, "Pomme\u0301___saine/fe\u0301uille 1.JPG", picture(900))
    for name in ("Apple___scab/.DS_Store", "Apple___scab/Thumbs.db", ".git/x", "README.md", "__MACOSX/a/._1.jpg"):
        put(photos, name, b"litter")
    report = run(photos, root)
    assert report.images == 51
    assert report.quarantined == ()
    assert "Pomm\u00e9___saine" in Dataset.open(root).classes


def test_a_name_that_is_no_text_is_imported(photos, root):
    raw = os.fsencode(photos / "Apple___scab") + b"/caf\xe9.jpg"
    Path(os.fsdecode(raw)).write_bytes(picture(901))
    assert run(photos, root).images == 51


# What is put aside ----------------------------------------------------------------------------------------------------


def test_every_kind_of_bad_file_is_listed_with_its_reason(photos, root, tmp_path):
    scab = photos / "Apple___scab"
    put(scab, "empty.jpg", b"")
    put(scab, "cut.jpg", picture(500)[:-200])
    put(scab, "text.jpg", b"this is no picture")
    put(scab, "notes.txt", b"rained on monday")
    put(scab, "tiny.jpg", picture(501, size=20))
    put(scab, "huge.jpg", picture(502, size=400))
    put(scab, "copy.jpg", picture(20))
    put(photos, "Apple___rust/also 21.jpg", picture(21))
    put(photos, "loose.jpg", picture(503))
    (scab / "link.jpg").symlink_to(put(tmp_path, "outside.jpg", picture(504)))
    report = run(photos, root, DataSettings(max_bad_share=0.5, max_pixels=100_000))
    assert reasons(report) == {
        "Apple___scab/empty.jpg": "empty",
        "Apple___scab/cut.jpg": "truncated",
        "Apple___scab/text.jpg": "not_an_image",
        "Apple___scab/notes.txt": "not_an_image",
        "Apple___scab/tiny.jpg": "too_small",
        "Apple___scab/huge.jpg": "too_many_pixels",
        "Apple___scab/copy.jpg": "duplicate",
        "Apple___scab/21.jpg": "conflicting_labels",
        "Apple___rust/also 21.jpg": "conflicting_labels",
        "loose.jpg": "no_class",
        "Apple___scab/link.jpg": "link",
    }
    assert report.files == 60
    assert report.images == 49
    details = {bad.path: bad.detail for bad in report.quarantined}
    assert "Apple___rust and Apple___scab" in details["Apple___scab/21.jpg"]
    assert "Apple___scab/20.jpg" in details["Apple___scab/copy.jpg"]
    listed = json.loads((root / "quarantine.json").read_text())
    assert len(listed) == 11
    assert len((root / "quarantine.csv").read_text().splitlines()) == 12
    stored = {p.relative_to(root).as_posix() for p in (root / "images").rglob("*.*")}
    assert stored == set(Dataset.open(root).rows["path"].to_pylist())


def test_too_many_bad_files_fail_the_import_and_leave_the_old_dataset(photos, root):
    before = run(photos, root).manifest_hash
    for number in range(6):
        put(photos, f"Apple___scab/bad{number}.jpg", b"broken")
    with pytest.raises(GateError, match=r"6 of 56 files \(10\.7%\).*6 not_an_image.*unchanged") as caught:
        run(photos, root)
    report = root.parent / "apples.rejected" / "quarantine.csv"
    assert str(report) in str(caught.value)
    assert len(report.read_text().splitlines()) == 7
    assert Dataset.open(root).manifest_hash == before
    (photos / "Apple___scab/bad0.jpg").unlink()
    assert run(photos, root).images == 50
    assert not report.exists()
    assert {p.name for p in root.parent.iterdir()} == {"apples", ".apples.lock"}


def test_only_bad_files_fail_even_when_any_share_may_be_bad(tmp_path, root):
    for label in "ab":
        put(tmp_path / "in", f"{label}/1.jpg", b"broken")
    with pytest.raises(GateError, match="No dataset was made"):
        run(tmp_path / "in", root, DataSettings(max_bad_share=1.0))
    assert not root.exists()


# What is refused at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "It is empty"),
        (("1.jpg", "2.jpg"), "2 photos or links but no folders"),
        (("a/1.jpg",), "Only the class 'a'"),
        (("wrapped/a/1.jpg", "wrapped/b/1.jpg"), "did you mean that one"),
        (("a/1.jpg", "A/2.jpg"), "but for its case"),
        (("a/1.jpg", "b/1.jpg", "severity.csv"), "cannot be read as CSV"),
        (("dataset.json", "images/a/1.jpg", "images/b/1.jpg"), "is an imported dataset"),
    ],
)
def test_a_folder_of_another_shape_is_explained(tmp_path, root, files, message):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(files):
        put(folder, name, picture(number))
    with pytest.raises(ConfigError, match=message) as caught:
        run(folder, root)
    assert "Nothing was imported" in str(caught.value)
    assert not root.exists()


def test_a_sidecar_without_its_columns_is_explained(photos, root):
    (photos / "severity.csv").write_text("name,value\nApple___scab/20.jpg,0.5\n")
    with pytest.raises(ConfigError, match="needs the columns file,severity"):
        run(photos, root)


def test_class_folders_without_files_are_named(tmp_path, root):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/b").mkdir()
    with pytest.raises(ConfigError, match="The folders a, b hold no files"):
        run(tmp_path / "in", root)


def test_a_path_that_is_no_folder_is_named(tmp_path, root):
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "nowhere", root)
    with pytest.raises(ConfigError, match="is a file"):
        run(put(tmp_path, "x.zip", b"PK"), root)


@pytest.mark.parametrize("value", ["1.5", "-0.1", "mild", "nan"])
def test_a_severity_outside_its_range_is_refused_with_its_line(photos, root, value):
    (photos / "severity.csv").write_text(f"file,severity\nApple___scab/20.jpg,0.5\nApple___scab/21.jpg,{value}\n")
    with pytest.raises(ConfigError, match="line 3"):
        run(photos, root)


def test_what_deserves_a_look_is_warned_of(photos, root):
    (photos / "Apple___mildew").mkdir()
    put(photos, "Apple___blotch/1.jpg", picture(700))
    (photos / "severity.csv").write_text("file,severity\nApple___scab/none.jpg,0.5\n")
    text = " ".join(run(photos, root).warnings)
    assert "'Apple___mildew' holds no files" in text
    assert "Apple___blotch has no image for validation and test" in text
    assert "1 rows of severity.csv" in text
    for folder in photos.glob("*healthy"):
        folder.rename(photos / "Apple___fine")
    assert 'No class has "healthy"' in " ".join(run(photos, root).warnings)


def test_holdouts_that_leave_nothing_to_train_on_are_refused(photos, root):
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        run(photos, root, DataSettings(validation_share=0.5, test_share=0.5))


# Splits ---------------------------------------------------------------------------------------------------------------


def variants(seed: int, count: int) -> list[bytes]:
    """Near-duplicates: one scene at several qualities and brightnesses."""
    image = cv2.imdecode(np.frombuffer(picture(seed, 96), np.uint8), cv2.IMREAD_COLOR)
    made = []
    for number in range(count):
        scaled = np.clip(image * (1 + 0.02 * number), 0, 255).astype(np.uint8)
        made.append(cv2.imencode(".jpg", scaled, [cv2.IMWRITE_JPEG_QUALITY, 95 - 8 * number])[1].tobytes())
    return made


@pytest.fixture
def bursts(tmp_path: Path) -> Path:
    """Two classes of 40 scenes; every third scene was photographed four times."""
    folder = tmp_path / "bursts"
    for scene in range(80):
        for shot, data in enumerate(variants(scene, 4 if scene % 3 == 0 else 1)):
            put(folder, f"{'a' if scene < 40 else 'b'}/{scene}-{shot}.jpg", data)
    return folder


def test_no_near_duplicates_are_on_both_sides_of_a_split(bursts, root):
    report = run(bursts, root)
    assert report.near_duplicate_groups >= 20
    rows = Dataset.open(root).rows
    hashes = np.array(rows["phash"].to_pylist(), dtype=np.uint64)
    split = np.array(rows["split"].to_pylist())
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= RULES.duplicate_hamming
    assert not (near & (split[:, None] != split[None, :])).any()


def test_every_class_has_its_share_in_every_split(bursts, root):
    run(bursts, root)
    for counts in Dataset.open(root).info.counts.values():
        total = sum(counts.values())
        assert counts["test"] == pytest.approx(0.15 * total, abs=2)
        assert counts["validation"] == pytest.approx(0.15 * total, abs=2)


def test_images_of_one_stated_group_stay_together(photos, root):
    lines = [f"{p.parent.name}/{p.name},plant-{int(p.stem) % 5}" for p in sorted(photos.rglob("*.jpg"))]
    (photos / "groups.csv").write_text("file,group\n" + "\n".join(lines))
    run(photos, root)
    seen: dict[int, set[str]] = {}
    for row in Dataset.open(root).rows.to_pylist():
        seen.setdefault(int(Path(row["source"]).stem) % 5, set()).add(row["split"])
    assert all(len(found) == 1 for found in seen.values())


def test_adding_photos_leaves_nearly_all_others_where_they_were(photos, root, tmp_path):
    run(photos, root)
    before = dict(zip(*(Dataset.open(root).rows[c].to_pylist() for c in ("sha256", "split")), strict=True))
    for number in range(100, 104):
        put(photos, f"Apple___scab/{number}.jpg", picture(number))
    run(photos, tmp_path / "more")
    after = dict(zip(*(Dataset.open(tmp_path / "more").rows[c].to_pylist() for c in ("sha256", "split")), strict=True))
    assert sum(before[image] != after[image] for image in before) <= 4


@examples(max_examples=60, deadline=None)
@given(
    hashes=st.lists(st.integers(0, 255), min_size=1, max_size=60),
    hamming=st.integers(0, 3),
    named=st.lists(st.sampled_from([None, "x", "y"]), min_size=60, max_size=60),
)
def test_groups_are_the_components_of_near_pairs(hashes, hamming, named):
    """Against a plain breadth-first search."""
    explicit = named[: len(hashes)]
    found = splits.group_images(np.array(hashes, dtype=np.uint64), explicit, hamming)

    def linked(i: int, j: int) -> bool:
        same = explicit[i] is not None and explicit[i] == explicit[j]
        return same or (hashes[i] ^ hashes[j]).bit_count() <= hamming

    component = [-1] * len(hashes)
    for start in range(len(hashes)):
        queue = [start] if component[start] < 0 else []
        while queue:
            one = queue.pop()
            if component[one] < 0:
                component[one] = start
                queue += [other for other in range(len(hashes)) if component[other] < 0 and linked(one, other)]
    expected = {(i, j) for i in range(len(hashes)) for j in range(len(hashes)) if component[i] == component[j]}
    assert {(i, j) for i in range(len(hashes)) for j in range(len(hashes)) if found[i] == found[j]} == expected


@examples(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_assignments_keep_groups_whole_and_always_leave_some_to_train(sizes, seed):
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    shares = {"train": 0.7, "validation": 0.15, "test": 0.15}
    chosen = splits.assign(groups, ["a"] * len(groups), shares, seed)
    by_group = {group: {c for g, c in zip(groups, chosen, strict=True) if g == group} for group in set(groups)}
    assert all(len(found) == 1 for found in by_group.values())
    assert "train" in chosen
    if len(sizes) >= 3:
        assert set(chosen) == set(SPLITS)
    assert splits.assign(groups, ["a"] * len(groups), shares, seed) == chosen


def test_a_giant_group_trains_and_the_small_ones_are_held_out():
    groups = ["giant"] * 80 + [f"g{number}" for number in range(20)]
    shares = {"train": 0.7, "validation": 0.1, "test": 0.1}
    chosen = splits.assign(groups, ["a"] * 100, shares, 0)
    assert set(chosen[:80]) == {"train"}
    assert (chosen.count("test"), chosen.count("validation")) == (10, 10)


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_a_split_has_pixels_labels_and_rows_in_one_order(photos, root):
    run(photos, root)
    dataset = Dataset.open(root)
    split = dataset.split("train", 24)
    assert split.images.shape == (len(split.labels), 24, 24, 3)
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int64)
    assert [dataset.classes[i] for i in split.labels] == split.rows["label"].to_pylist()
    from ml.images import decode

    for index in (0, len(split.labels) - 1):
        data = (root / split.rows["path"][index].as_py()).read_bytes()
        assert (split.images[index] == decode(data, 24)).all()
    with pytest.raises(ValueError, match="read-only"):
        split.images[0] = 0


def test_pixels_are_decoded_once(photos, root):
    run(photos, root)
    seen: list[tuple[int, int]] = []
    dataset = Dataset.open(root)
    first = dataset.split("train", 24, on_progress=lambda *done: seen.append(done))
    assert seen[-1] == (len(first.labels), len(first.labels))
    seen.clear()
    for image in (root / "images").rglob("*.jpg"):
        image.unlink()
    again = Dataset.open(root).split("train", 24, on_progress=lambda *done: seen.append(done))
    assert seen == []
    assert (first.images == again.images).all()


def test_importing_the_same_again_keeps_the_decoded_pixels(photos, root):
    run(photos, root)
    Dataset.open(root).split("train", 24)
    made = {p.name: p.stat().st_mtime_ns for p in (root / ".cache").glob("*.npy")}
    run(photos, root)
    assert {p.name: p.stat().st_mtime_ns for p in (root / ".cache").glob("*.npy")} == made


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"garbage" * 100])
def test_a_damaged_cache_is_made_again(photos, root, damage):
    run(photos, root)
    dataset = Dataset.open(root)
    expected = np.array(dataset.split("test", 24).images)
    [cache] = (root / ".cache").glob("*.npy")
    cache.write_bytes(damage)
    assert (dataset.split("test", 24).images == expected).all()


def test_a_process_killed_while_decoding_leaves_nothing_that_is_trusted(photos, root):
    run(photos, root)
    code = (
        "import time; from pathlib import Path; from ml import pixelcache; from ml.dataset import Dataset\n"
        "pixelcache._CHUNK = 4\n"
        "def stuck(done, total): print(done, flush=True); time.sleep(60)\n"
        f"Dataset.open(Path({str(root)!r})).split('train', 24, on_progress=stuck)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "4"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert list((root / ".cache").glob("*.partial"))
    split = Dataset.open(root).split("train", 24)
    assert len(split.images) == len(split.labels)
    assert split.images[-1].any()
    assert not list((root / ".cache").glob("*.partial"))


def test_processes_that_need_the_same_pixels_at_once_all_get_them(photos, root):
    run(photos, root)
    code = (
        "import hashlib; from pathlib import Path; from ml.dataset import Dataset\n"
        f"images = Dataset.open(Path({str(root)!r})).split('train', 24).images\n"
        "print(hashlib.sha256(images.tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    with ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=True), range(3))
        )
    assert len({answer.stdout for answer in answers}) == 1


def test_no_threads_of_pyarrow_are_left_to_abort_a_process_at_its_end(photos, root):
    """One in a hundred processes that read with pyarrow's datasets died of SIGABRT when its work was done."""
    run(photos, root)
    code = (
        "import sys; from pathlib import Path; from ml.dataset import Dataset\n"
        f"Dataset.open(Path({str(root)!r})).split('train', 24)\n"
        "print([name for name in sys.modules if name.startswith('pyarrow.dataset')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_image_that_changed_is_not_trained_on(photos, root):
    run(photos, root)
    dataset = Dataset.open(root)
    path = dataset.rows_of("train")["path"][0].as_py()
    (root / path).write_bytes(picture(999))
    with pytest.raises(IntegrityError, match="is not the image in the manifest"):
        dataset.split("train", 24)
    with pytest.raises(IntegrityError):
        dataset.verify()
    (root / path).unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        dataset.split("train", 24)
    assert not list((root / ".cache").glob("*.npy"))


def test_pixels_that_cannot_be_kept_say_so(photos, root):
    run(photos, root)
    (root / ".cache").write_text("in the way")
    with pytest.raises(ExternalError, match="cannot be kept"):
        Dataset.open(root).split("train", 24)


# All or nothing -------------------------------------------------------------------------------------------------------


def test_no_dataset_is_told_from_a_damaged_one(photos, root):
    with pytest.raises(ConfigError, match="khet data import"):
        Dataset.open(root)
    run(photos, root)
    table = root / "manifest.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[:-10])
    with pytest.raises(IntegrityError, match="does not match its hash"):
        Dataset.open(root)
    table.unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        Dataset.open(root)
    table.write_bytes(whole)
    (root / "dataset.json").write_text("{}")
    with pytest.raises(IntegrityError, match="DatasetInfo"):
        Dataset.open(root)


def test_an_import_killed_between_the_two_renames_is_undone(photos, root):
    before = run(photos, root).manifest_hash
    root.rename(root.parent / ".apples.old")
    recover(root)
    assert Dataset.open(root).manifest_hash == before
    (root.parent / ".apples.old" / "images").mkdir(parents=True)
    recover(root)
    assert {p.name for p in root.parent.iterdir()} == {"apples", ".apples.lock"}


def test_an_import_that_is_killed_leaves_the_old_dataset_and_the_next_one_works(photos, root):
    before = run(photos, root).manifest_hash
    put(photos, "Apple___scab/new.jpg", picture(800))
    code = (
        "import time; from pathlib import Path; from configs.areas import DataSettings\n"
        "from ml import importing\n"
        "def stuck(*_): print('here', flush=True); time.sleep(60)\n"
        f"importing.import_folder(Path({str(photos)!r}), Path({str(root)!r}), name='apples', "
        "settings=DataSettings(), on_progress=stuck)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "here"
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert Dataset.open(root).manifest_hash == before
    assert run(photos, root).images == 51
    assert {p.name for p in root.parent.iterdir()} == {"apples", ".apples.lock"}


def test_two_imports_of_one_name_do_not_mix(photos, root):
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: run(photos, root), range(2)))
    assert reports[0].manifest_hash == reports[1].manifest_hash
    Dataset.open(root).verify()
    assert time.monotonic() - started < 60


def test_a_disk_that_does_not_take_it_leaves_what_was_there(photos, tmp_path):
    parent = put(tmp_path, "file", b"in the way")
    with pytest.raises(ExternalError, match="What was there before is unchanged"):
        run(photos, parent / "apples")
