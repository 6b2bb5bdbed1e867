"""Evaluation: the numbers are right, the pictures are there, and torch is not needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, IntegrityError
from ml import evaluate as evaluating
from ml import pictures, scores
from ml.dataset import Dataset
from ml.occlusion import occlusion
from ml.predictions import Predictions
from ml.predictor import Outputs, Predictor
from ml.results import Evaluation
from tests.support.training import dataset, exported


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    out = tmp_path_factory.mktemp("evaluation")
    return out, evaluating.evaluate(exported() / "model.onnx", dataset(), out)


def test_the_numbers_agree_with_the_predictions(judged: tuple[Path, Evaluation]) -> None:
    out, result = judged
    table = pq.read_table(out / "predictions.parquet")
    data = Dataset.open(dataset())
    assert table.num_rows == result.images == len(data.rows_of("test"))
    assert np.mean(table["correct"].to_pylist()) == pytest.approx(result.accuracy)
    assert result.accuracy_low < result.accuracy < result.accuracy_high
    assert sum(map(sum, result.confusion)) == result.images
    flagged = np.mean([v > 0 for v in table["ood_score"].to_pylist()])
    assert flagged == pytest.approx(result.ood_flagged_share)
    assert set(table.column_names) >= {"path", "sha256", "label", "predicted", "probability", "severity", "energy"}


def test_the_predictions_name_the_groups_of_the_dataset(judged: tuple[Path, Evaluation]) -> None:
    rows = Dataset.open(dataset()).rows_of("test")
    seen = Predictions.read(judged[0] / "predictions.parquet")
    groups = dict(zip(rows["sha256"].to_pylist(), rows["group"].to_pylist(), strict=True))
    assert dict(zip(seen.image, seen.group, strict=True)) == groups


def test_the_evaluation_names_its_holdout(judged: tuple[Path, Evaluation]) -> None:
    data = Dataset.open(dataset())
    assert judged[1].holdout_hash == data.holdout_hash("test")
    assert judged[1].dataset_hash == data.manifest_hash
    assert Evaluation.read(judged[0] / "evaluation.json") == judged[1]


def test_severities_are_scored_where_they_are_known(judged: tuple[Path, Evaluation]) -> None:
    known = [s for s in Dataset.open(dataset()).rows_of("test")["severity"].to_pylist() if s is not None]
    assert sum(b.images for b in judged[1].by_severity) == len(known) > 0


def test_every_named_picture_is_a_png(judged: tuple[Path, Evaluation]) -> None:
    out, result = judged
    names = [*result.pictures, *(m.picture for m in result.mistakes), "mistakes.png"]
    assert {"confusion.png", "reliability.png", "recall.png"} <= set(names)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_mistakes_are_the_most_confident_ones(judged: tuple[Path, Evaluation]) -> None:
    out, result = judged
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    wrong = sorted((r["probability"] for r in table if not r["correct"]), reverse=True)
    assert [m.probability for m in result.mistakes] == pytest.approx(wrong[:12])
    assert all(m.label != m.predicted for m in result.mistakes)


def test_evaluating_again_gives_the_same_numbers(judged: tuple[Path, Evaluation], tmp_path: Path) -> None:
    again = evaluating.evaluate(exported() / "model.onnx", dataset(), tmp_path)
    assert again.model_copy(update={"latency_p50_ms": 0}) == judged[1].model_copy(update={"latency_p50_ms": 0})


def test_no_torch_is_imported() -> None:
    code = "import sys, ml.evaluate, ml.predictor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dataset_with_other_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "classes", ("a", "b"))
    with pytest.raises(ConfigError, match="knows the classes"):
        evaluating.evaluate(exported() / "model.onnx", dataset(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_for_another_decoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "DECODE_CONTRACT", "other-v2")
    with pytest.raises(IntegrityError, match="other-v2"):
        evaluating.evaluate(exported() / "model.onnx", dataset(), tmp_path / "out")


def test_a_damaged_model_is_an_integrity_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        evaluating.evaluate(tmp_path / "model.onnx", dataset(), tmp_path / "out")


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Published examples: Newcombe, Statistics in Medicine 1998, table I (score method without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(hits: int, total: int, low: float, high: float) -> None:
    assert scores.wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


def test_nothing_seen_means_nothing_known() -> None:
    assert scores.wilson(0, 0) == (0.0, 1.0)


def test_recall_precision_and_f1_of_a_known_matrix() -> None:
    matrix = scores.confusion(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0]), 3)
    assert matrix.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    a, b, c = scores.per_class(matrix, ["a", "b", "c"])
    assert (a.recall, a.precision) == pytest.approx((2 / 3, 2 / 3))
    assert (b.recall, b.precision, b.f1) == pytest.approx((1.0, 2 / 3, 0.8))
    assert (c.recall, c.precision, c.f1, c.support) == (0.0, 0.0, 0.0, 1)
    assert scores.macro_f1([a, b, c]) == pytest.approx((2 / 3 + 0.8 + 0.0) / 3)


def test_missed_disease_counts_the_diseased_taken_for_healthy() -> None:
    matrix = np.array([[5, 3, 2], [0, 9, 1], [1, 0, 4]])
    assert scores.missed_disease(matrix, ["rust", "healthy", "scab"], ["healthy"]) == (3, 15)
    assert scores.missed_disease(matrix, ["rust", "rot", "scab"], []) is None


def test_severities_fall_into_fifths() -> None:
    severity = np.array([0.0, 0.19, 0.2, 0.99, 1.0, np.nan])
    bins = scores.by_severity(severity, np.array([True, False, True, True, False, True]))
    assert [(b.low, b.images, b.accuracy) for b in bins] == [(0.0, 2, 0.5), (0.2, 1, 1.0), (0.8, 2, 0.5)]


def test_sources_are_the_folders_below_the_class_folders() -> None:
    files = ["rust/farm_a/1.jpg", "rust/farm_a/old/2.jpg", "healthy/farm_a/3.jpg", "rust/farm_b/1.jpg", "rust/4.jpg"]
    found = scores.by_source(files, np.array([True, True, False, False, True]))
    assert [(s.name, s.images, s.accuracy) for s in found] == [
        ("farm_a", 3, pytest.approx(2 / 3)), ("farm_b", 1, 0.0), ("no folder of its own", 1, 1.0),
    ]  # fmt: skip
    assert scores.by_source(["rust/1.jpg", "healthy/2.jpg"], np.array([True, False])) == ()


# Occlusion and pictures -----------------------------------------------------------------------------------------------


class Spot:
    """A model whose confidence in class 1 is the brightness of one corner."""

    def run(self, images: npt.NDArray[np.uint8]) -> Outputs:
        bright = images[:, :8, :8].mean(axis=(1, 2, 3), dtype=np.float32) / 255
        nothing = np.zeros((len(images), 2), dtype=np.float32)
        return Outputs(np.stack([1 - bright, bright], axis=1).astype(np.float32), nothing, nothing)


def test_the_occlusion_map_points_at_what_matters() -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:8, :8] = 255
    heat = occlusion(Spot(), image, 1)  # type: ignore[arg-type]
    assert heat.shape == (32, 32)
    assert heat[:8, :8].mean() > 0.1
    assert np.abs(heat[16:, 16:]).max() < 1e-5


def test_a_real_model_can_be_explained() -> None:
    image = np.ascontiguousarray(Dataset.open(dataset()).split("test", 32).images[0])
    heat = occlusion(Predictor(exported() / "model.onnx"), image, 0)
    assert np.isfinite(heat).all() and heat.std() > 0


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["Tomato___Leaf_mold", "Tomato___healthy"], ["Leaf mold", "healthy"]),
        (["Tomato___rust", "Apple___rust"], ["Tomato: rust", "Apple: rust"]),
        (["rust", "healthy"], ["rust", "healthy"]),
    ],
)
def test_class_names_are_shown_as_people_say_them(names: list[str], short: list[str]) -> None:
    assert pictures.short_names(names) == short
