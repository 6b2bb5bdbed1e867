"""Export: the file stands alone, agrees with torch, and appears only after its checks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from configs.errors import ConfigError, GateError, IntegrityError
from configs.training import ExportConfig
from ml import calibration, checkpoint
from ml import export as exporting
from ml.dataset import Dataset
from ml.predictor import Predictor, energy
from ml.results import ExportResult, ModelMetadata
from tests.support.training import dataset, exported, trained


def altered(tmp_path: Path, **options: object) -> Path:
    """The trained checkpoint with other export options."""
    weights, about = checkpoint.load(trained())
    options_ = ExportConfig.model_validate(options)
    config = about.config.model_copy(update={"export": options_})
    checkpoint.save(tmp_path / "best.ckpt", weights, about.model_copy(update={"config": config}))
    return tmp_path / "best.ckpt"


def test_the_export_passed_its_checks() -> None:
    result = ExportResult.read(exported() / "export.json")
    assert result.parity_images > 20
    assert result.parity_max_abs_diff <= 1e-5 and result.parity_argmax_equal
    assert result.latency_p50_ms > 0 and result.torch_latency_p50_ms > 0
    assert result.sha256 == checkpoint.sha256(exported() / "model.onnx")
    assert {p.name for p in exported().iterdir()} == {"model.onnx", "metadata.json", "export.json"}


def test_the_file_names_its_input_outputs_and_opset() -> None:
    model = onnx.load(str(exported() / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    (image,) = model.graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert [d.dim_value for d in image.type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert [o.name for o in model.graph.output] == ["probs", "logits", "embedding"]
    assert next(o.version for o in model.opset_import if not o.domain) == 20


def test_the_file_carries_the_metadata_beside_it() -> None:
    metadata = Predictor(exported() / "model.onnx").metadata
    assert metadata == ModelMetadata.read(exported() / "metadata.json")
    assert metadata.classes == Dataset.open(dataset()).classes
    assert metadata.embedding_size == 128


@pytest.mark.parametrize("count", [1, 3, 40])
def test_any_number_of_images_can_be_predicted(count: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    answers = Predictor(exported() / "model.onnx").run(images)
    assert answers.probs.shape == answers.logits.shape == (count, 8)
    assert answers.embedding.shape == (count, 128)
    assert np.allclose(answers.probs.sum(axis=1), 1.0, atol=1e-5)


def test_the_temperature_is_in_the_probabilities_only() -> None:
    predictor = Predictor(exported() / "model.onnx")
    answers = predictor.run(np.ascontiguousarray(Dataset.open(dataset()).split("test", 32).images))
    expected = calibration.softmax(answers.logits, predictor.metadata.temperature)
    assert np.allclose(answers.probs, expected, atol=1e-5)


def test_the_threshold_accepts_nearly_all_validation_images() -> None:
    predictor = Predictor(exported() / "model.onnx")
    split = Dataset.open(dataset()).split("validation", 32)
    scores = energy(exporting.outputs(predictor, split.images).logits)
    assert (scores > predictor.metadata.ood_threshold + 1e-4).mean() <= 0.01


def test_a_file_that_disagrees_with_torch_stops_the_export(tmp_path: Path) -> None:
    out = tmp_path / "exported"
    out.mkdir()
    shutil.copy(exported() / "model.onnx", out)
    with pytest.raises(GateError, match="Nothing was exported"):
        exporting.export(altered(tmp_path, parity_tolerance=1e-30), out)
    assert list(out.iterdir()) == [], "neither the new file nor the older one may look exported"


def test_the_command_tells_a_failed_check_by_its_exit_code(tmp_path: Path) -> None:
    bad = altered(tmp_path, parity_tolerance=1e-30)
    assert exporting.main(["--checkpoint", str(bad), "--output_dir", str(tmp_path / "out")]) == 3


def test_an_int8_file_is_measured_and_its_fate_explained(tmp_path: Path) -> None:
    result = exporting.export(altered(tmp_path, try_int8=True, int8_min_speedup=1000.0), tmp_path / "out")
    assert result.int8_considered and not result.int8_taken
    assert "too slow" in result.int8_reason and "points" in result.int8_reason


def test_an_int8_file_is_shipped_whole_if_it_is_good_enough(tmp_path: Path) -> None:
    options = {"try_int8": True, "int8_min_speedup": 1e-6, "int8_accuracy_loss": 1.0}
    result = exporting.export(altered(tmp_path, **options), tmp_path / "out")
    assert result.int8_taken
    kinds = {n.op_type for n in onnx.load(str(tmp_path / "out" / "model.onnx")).graph.node}
    assert "QuantizeLinear" in kinds
    assert Predictor(tmp_path / "out" / "model.onnx").metadata == ModelMetadata.read(tmp_path / "out" / "metadata.json")


def test_another_dataset_than_the_trained_one_is_refused(tmp_path: Path) -> None:
    weights, about = checkpoint.load(trained())
    checkpoint.save(tmp_path / "best.ckpt", weights, about.model_copy(update={"dataset_hash": "0" * 64}))
    with pytest.raises(IntegrityError, match="0000"):
        exporting.export(tmp_path / "best.ckpt", tmp_path / "out")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.ckpt"):
        exporting.export(tmp_path / "gone.ckpt", tmp_path / "out")


# Calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_000, 5))
    chances = calibration.softmax(logits, true)
    labels = (chances.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert calibration.temperature(logits, labels) == pytest.approx(true, rel=0.05)


def test_the_temperature_minimises_the_log_loss() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, (300, 4))
    labels = np.where(rng.random(300) < 0.7, logits.argmax(axis=1), rng.integers(0, 4, 300))

    def loss(t: float) -> float:
        return float(-np.log(calibration.softmax(logits, t)[np.arange(300), labels]).mean())

    best = calibration.temperature(logits, labels)
    assert loss(best) <= min(loss(best * 0.98), loss(best * 1.02))


def test_logits_that_are_no_numbers_stop_the_export() -> None:
    with pytest.raises(GateError, match="finite"):
        calibration.temperature(np.array([[np.nan, 1.0]]), np.array([0]))


def test_calibration_error_of_a_known_example() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    labels = np.array([0, 1, 0, 0])
    assert calibration.expected_calibration_error(probabilities, labels) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
