"""A training run: what it leaves, when it answers at once, what it refuses, and that a tracker cannot stop it."""

from __future__ import annotations

import fcntl
import logging
import shutil
from pathlib import Path

import pytest
import torch

from configs.areas import TrackingSettings
from configs.errors import ConfigError, SafetyError
from ml import checkpoint, progress, train
from ml.results import TrainResult
from ml.tracking import Silent, tracker
from tests.support.training import CONFIGS, config, dataset


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("run") / "outputs"
    return out, train.train(config(), dataset(), out)


def test_a_run_leaves_its_result_curves_and_checkpoints(finished: tuple[Path, TrainResult]) -> None:
    out, result = finished
    assert (result.epochs, len(result.history)) == (2, 2)
    assert result.steps == result.history[-1].step > 0
    assert {"best.ckpt", "last.ckpt", "config.json", "train.json", "curves.png"} <= {p.name for p in out.iterdir()}
    assert not list(out.glob("*.partial"))
    assert progress.read(out / progress.FILE)[0] == list(result.history)
    assert result.hardware["cpu"] and result.resumed_from_step is None


def test_the_best_checkpoint_holds_the_validated_weights(finished: tuple[Path, TrainResult]) -> None:
    out, result = finished
    weights, trained = checkpoint.load(out / "best.ckpt")
    assert trained.val_accuracy == result.best_val_accuracy == max(e.val_accuracy for e in result.history)
    assert len(trained.classes) == 8 and weights["head.1.bias"].shape == (8,)


def test_the_resume_checkpoint_loads_without_running_code(finished: tuple[Path, TrainResult]) -> None:
    state = torch.load(finished[0] / "last.ckpt", weights_only=True)
    assert state["khet"]["average"].keys() <= {name.removeprefix("model.net.") for name in state["state_dict"]}


def test_a_finished_run_answers_at_once(finished: tuple[Path, TrainResult]) -> None:
    out, result = finished
    before = (out / "best.ckpt").stat().st_mtime_ns
    assert train.train(config(), dataset(), out) == result
    assert (out / "best.ckpt").stat().st_mtime_ns == before


def test_another_configuration_is_refused_by_name(finished: tuple[Path, TrainResult]) -> None:
    with pytest.raises(ConfigError, match=r"seed was 0, is 1.*--fresh"):
        train.train(config(seed=1), dataset(), finished[0])


def test_clearing_removes_our_files_only(finished: tuple[Path, TrainResult], tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt", "config.json", "mine.txt"):
        (tmp_path / name).write_text("x")
    train.clear(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", ".lock"}


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SafetyError, match="Another process"):
            train.train(config(), dataset(), tmp_path)


def test_files_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="unclear"):
        train.train(config(), dataset(), tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == b"precious"


def test_batches_can_live_in_device_memory(tmp_path: Path) -> None:
    result = train.train(config(device_resident="on"), dataset(), tmp_path)
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_the_settings_of_a_gpu_run_on_a_cpu_too(tmp_path: Path) -> None:
    settings = config(
        device_resident="on", precision="bf16-mixed", optimizer={"lr": 0.003, "clip_norm": 1.0}, budget={"epochs": 1}
    )
    assert train.train(settings, dataset(), tmp_path).history[0].train_loss < 2.2


def test_clipping_bounds_every_step(tmp_path: Path) -> None:
    held = config(optimizer={"lr": 0.003, "clip_norm": 1e-12}, budget={"epochs": 1}, ema_decay=None)
    free = config(optimizer={"lr": 0.003}, budget={"epochs": 1}, ema_decay=None)
    losses = [train.train(c, dataset(), tmp_path / str(i)).history[0].train_loss for i, c in enumerate((held, free))]
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_learns_the_same(tmp_path: Path) -> None:
    eager, compiled = (
        train.train(config(compile=mode, device_resident="on"), dataset(), tmp_path / mode) for mode in ("off", "on")
    )
    assert compiled.history[-1].train_loss == pytest.approx(eager.history[-1].train_loss, abs=0.1)


def test_a_seconds_budget_ends_the_run_and_validates_it(tmp_path: Path) -> None:
    result = train.train(config(budget={"seconds": 1.0}, validate_every=1000), dataset(), tmp_path)
    assert 1.0 <= result.elapsed_s < 30.0
    assert len(result.history) == 1 and result.history[0].learning_rate < 1e-3


def test_patience_stops_a_run_that_does_not_improve(tmp_path: Path) -> None:
    frozen = config(budget={"epochs": 50}, optimizer={"lr": 1e-12}, ema_decay=None, early_stopping=2)
    result = train.train(frozen, dataset(), tmp_path)
    best = max(result.history, key=lambda e: (e.val_accuracy, -e.val_loss))
    assert result.epochs - 1 - best.epoch == 2 < 49


def test_a_run_starts_from_given_weights(finished: tuple[Path, TrainResult], tmp_path: Path) -> None:
    out, result = finished
    pin = checkpoint.sha256(out / "best.ckpt")
    started = config(
        init_weights=str(out / "best.ckpt"), init_weights_sha256=pin, optimizer={"lr": 1e-9}, budget={"epochs": 1}
    )
    again = train.train(started, dataset(), tmp_path)
    assert again.history[0].val_loss == pytest.approx(result.history[-1].val_loss, abs=0.05)


def test_the_command_reports_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS / "smoke.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert train.main(arguments) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("ConfigError: Dataset ")
    assert not (tmp_path / "out").exists()


# Tracking -------------------------------------------------------------------------------------------------------------


def test_a_disabled_tracker_is_silent(tmp_path: Path) -> None:
    assert isinstance(tracker(TrackingSettings(mode="disabled"), tmp_path, "id", {}), Silent)


def test_an_offline_tracker_writes_below_its_folder(tmp_path: Path) -> None:
    follower = tracker(TrackingSettings(), tmp_path / "out", "abc123", {"lr": 1})
    follower.log(1, {"loss": 1.0})
    follower.finish({"accuracy": 0.5}, {})
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*-abc123/*.wandb"))


def test_a_tracker_that_cannot_write_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        follower = tracker(TrackingSettings(), tmp_path / "file", "id", {})
    follower.log(1, {"loss": 1.0})
    follower.finish({}, {})
    assert "training goes on without it" in caplog.text


def test_an_unreachable_tracker_falls_back_to_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ml.tracking._PATIENCE_S", 2.0)
    online = TrackingSettings.model_validate({"mode": "online", "api_key": "k" * 40})
    with caplog.at_level(logging.WARNING):
        follower = tracker(online, tmp_path, "id5", {})
    follower.log(1, {"loss": 1.0})
    follower.finish({}, {})
    assert "could not start online" in caplog.text
    assert "k" * 40 not in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*-id5"))
