"""The generated leaf photos: the same everywhere, labelled truly, and different where they should be."""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.errors import ConfigError, ExternalError
from ml import leaves
from ml.images import decode, statistics


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    code = "import hashlib; from ml import leaves; print(hashlib.sha256(leaves.render(41).jpeg()).hexdigest())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == hashlib.sha256(leaves.render(41).jpeg()).hexdigest()


def test_other_seeds_give_other_photos():
    assert len({leaves.render(seed, px=48).rgb.tobytes() for seed in range(24)}) == 24


def test_labels_follow_from_seeds_and_every_class_has_its_share():
    drawn = [leaves.render(seed, px=32) for seed in range(32)]
    assert [leaf.label for leaf in drawn] == [leaves.LABELS[seed % 8] for seed in range(32)]
    assert all((leaf.severity is None) == (leaf.label == "healthy") for leaf in drawn)
    assert all(0 <= leaf.severity <= 1 for leaf in drawn if leaf.severity is not None)


@pytest.mark.parametrize("px", [32, 64, 128, 200])
def test_a_photo_has_the_asked_size_and_survives_its_jpeg(px):
    leaf = leaves.render(1, px=px)
    assert leaf.rgb.shape == (px, px, 3)
    assert leaf.rgb.dtype == np.uint8
    assert decode(leaf.jpeg(), px).shape == (px, px, 3)


def test_a_disease_shows_more_as_it_gets_worse():
    """Between a diseased and a sound blade of the same geometry, severity rules how much differs."""
    from ml import leaves_render as paint
    from ml.leaves_disease import PAINTERS

    for name, painter in PAINTERS.items():
        changes = [np.mean([_changed(paint, painter, seed, severity) for seed in range(12)]) for severity in (0.1, 0.8)]
        assert changes[0] == changes[1] == 0 if name == "healthy" else changes[1] > 1.5 * changes[0] > 0, name


def _changed(paint, painter, seed: int, severity: float) -> float:
    rng = np.random.default_rng(seed)
    leaf = paint.frame(rng, 64, distortion=0.0, other_cultivar=False)
    blade = paint.tissue(rng, leaf, other_cultivar=False)
    before = blade.copy()
    painter(np.random.default_rng(seed), leaf, blade, severity)
    return float((np.abs(blade - before).mean(axis=2) * leaf.mask).mean())


@pytest.mark.parametrize(
    ("shift", "number", "direction"),
    [
        ("overexposed", "brightness", 1),
        ("overexposed", "highlights", 1),
        ("mild_light", "brightness", 1),
        ("dusk", "brightness", -1),
        ("blur", "sharpness", -1),
        ("new_camera", "sharpness", 1),
    ],
)
def test_a_shift_moves_what_its_name_says(shift, number, direction):
    seeds = range(40)
    base = np.mean([statistics(leaves.render(s, px=64).rgb)[number] for s in seeds])
    moved = np.mean([statistics(leaves.render(s, px=64, shift=shift).rgb)[number] for s in seeds])
    assert direction * (moved - base) > 0.02


@pytest.mark.parametrize("shift", leaves.SHIFTS[1:])
def test_a_shift_keeps_label_and_severity(shift):
    for seed in range(8):
        base, moved = leaves.render(seed, px=32), leaves.render(seed, px=32, shift=shift)
        assert (moved.label, moved.severity) == (base.label, base.severity)
        assert (moved.rgb != base.rgb).any()


def tree(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_set_is_the_same_however_many_workers_make_it(tmp_path):
    seen: list[tuple[int, int]] = []
    leaves.generate(tmp_path / "a", 96, seed=5, px=32, workers=2, on_progress=lambda *done: seen.append(done))
    leaves.generate(tmp_path / "b", 96, seed=5, px=32, workers=1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert seen[-1] == (96, 96)
    assert sorted(seen) == seen


def test_a_set_has_a_folder_a_class_and_a_table_of_severities(tmp_path):
    leaves.generate(tmp_path, 40, px=32, workers=1)
    counts = {folder.name: len(list(folder.glob("*.jpg"))) for folder in tmp_path.iterdir() if folder.is_dir()}
    assert counts == dict.fromkeys(leaves.FOLDERS.values(), 5)
    assert counts["Tomato___healthy"] == 5
    with (tmp_path / "severity.csv").open(encoding="utf-8") as handle:
        rows = {row["file"]: float(row["severity"]) for row in csv.DictReader(handle)}
    assert len(rows) == 35
    assert all((tmp_path / name).exists() and 0 <= value <= 1 for name, value in rows.items())
    assert rows["Tomato___Early_blight/000001.jpg"] == pytest.approx(leaves.render(1, px=32).severity, abs=1e-4)


def test_a_set_that_was_cut_short_is_finished_and_what_is_there_is_kept(tmp_path):
    leaves.generate(tmp_path, 24, px=32, workers=1)
    whole = tree(tmp_path)
    kept = tmp_path / "Tomato___healthy/000000.jpg"
    written = kept.stat().st_mtime_ns
    for name in ("Tomato___Early_blight/000001.jpg", "severity.csv"):
        (tmp_path / name).unlink()
    leaves.generate(tmp_path, 24, px=32, workers=1)
    assert tree(tmp_path) == whole
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("other", [{"seed": 1}, {"px": 48}, {"shift": "dusk"}, {"count": 16}], ids=str)
def test_sets_are_not_mixed_in_one_folder(tmp_path, other):
    leaves.generate(tmp_path, 8, px=32, workers=1)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="Nothing was written"):
        leaves.generate(tmp_path, **{"count": 8, "px": 32, "workers": 1, **other})
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExternalError, match="file"):
        leaves.generate(tmp_path / "file", 8)


def test_a_worker_that_fails_fails_the_set(tmp_path):
    (tmp_path / "Tomato___Early_blight" / ".000001.jpg").mkdir(parents=True)
    with pytest.raises(ExternalError, match="000001"):
        leaves.generate(tmp_path, 8, px=32)


def test_impossible_counts_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Cannot generate 0"):
        leaves.generate(tmp_path, 0)
