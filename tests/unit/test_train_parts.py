"""The parts of a training: batches, augmentation, schedule, average, checkpoint files, progress."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from configs.errors import ConfigError, IntegrityError
from configs.training import AugmentConfig, OptimizerConfig
from ml import checkpoint
from ml.augment import augment, draw
from ml.batches import DeviceImages, HostImages, TrainBatches, ValidationBatches
from ml.ema import Average
from ml.module import learning_rate
from ml.net import build
from ml.progress import ProgressLog, Tick, read
from ml.results import Epoch


def numbered(n: int, px: int = 2) -> HostImages:
    """Images whose label is their index."""
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, px, px, 3), np.uint8)
    return HostImages(images, np.arange(n, dtype=np.int64))


def labels(batches: TrainBatches | ValidationBatches) -> list[list[int]]:
    return [part.tolist() for _, part in batches]


def test_an_epoch_takes_whole_batches_and_no_image_twice() -> None:
    batches = TrainBatches(numbered(23), 5, seed=0)
    seen = labels(batches)
    assert [len(b) for b in seen] == [5] * len(batches) == [5] * 4
    assert len({i for b in seen for i in b}) == 20


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    a, b = TrainBatches(numbered(40), 8, seed=3), TrainBatches(numbered(40), 8, seed=3)
    first = labels(a)
    a.set_epoch(1)
    b.set_epoch(1)
    assert labels(a) == labels(b) != first
    assert labels(TrainBatches(numbered(40), 8, seed=4)) != first


def test_ranks_share_an_epoch_without_overlap() -> None:
    parts = [labels(TrainBatches(numbered(40), 5, seed=0, rank=r, world=2)) for r in range(2)]
    flat = [{i for b in part for i in b} for part in parts]
    assert flat[0].isdisjoint(flat[1])
    assert len(flat[0] | flat[1]) == 40


def test_batches_go_on_behind_a_restored_position() -> None:
    whole = labels(TrainBatches(numbered(40), 8, seed=0))
    first = TrainBatches(numbered(40), 8, seed=0)
    stream = iter(first)
    next(stream), next(stream)
    resumed = TrainBatches(numbered(40), 8, seed=0)
    resumed.load_state_dict(first.state_dict())
    assert labels(resumed) == whole[2:]
    assert labels(resumed) == whole, "the epoch after the resumed one is complete"


def test_reading_ahead_changes_nothing_but_the_time() -> None:
    plain = TrainBatches(numbered(40), 4, seed=0)
    ahead = TrainBatches(numbered(40), 4, seed=0, read_ahead=True)
    assert labels(plain) == labels(ahead)


def test_images_in_device_memory_are_the_same_images() -> None:
    rng = np.random.default_rng(0)
    images, marks = rng.integers(0, 256, (30, 4, 4, 3), dtype=np.uint8), np.arange(30, dtype=np.int64)
    host = TrainBatches(HostImages(images, marks), 10, seed=1)
    device = TrainBatches(DeviceImages(images, marks, torch.device("cpu")), 10, seed=1)
    for (a, la), (b, lb) in zip(host, device, strict=True):
        order = lb.argsort()
        assert torch.equal(la, lb[order])
        assert torch.equal(a, b[order])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_sees_every_image_once_in_equally_many_batches(world: int) -> None:
    parts = [labels(ValidationBatches(numbered(20), 6, rank=r, world=world)) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for b in part for i in b if i >= 0) == list(range(20))


def test_augmentation_repeats_after_the_same_seed() -> None:
    images, config = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8), AugmentConfig()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(augment(images, *draw(16, config, images.device), config.gain, config.white_balance))
    assert torch.equal(*results)
    assert results[0].shape == images.shape
    assert results[0].min() >= 0.0 and results[0].max() <= 255.0


def test_augmentation_switched_off_leaves_pixels_alone() -> None:
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    off = AugmentConfig(flips=False, transpose=False, shift=0, gain=0, white_balance=0)
    assert torch.equal(augment(images, *draw(16, off, images.device), 0.0, 0.0), images.float())


@pytest.mark.parametrize(("shift", "views"), [(0.0, range(8, 9)), (0.2, range(20, 41))])
def test_a_batch_is_seen_in_the_eight_symmetries_and_shifted(shift: float, views: range) -> None:
    images = torch.arange(16 * 16, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()
    config = AugmentConfig(gain=0, white_balance=0, shift=shift)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        moved = augment(images, *draw(16, config, images.device), 0.0, 0.0)
        assert torch.equal(moved[0], moved[1])
        seen.add(tuple(moved[0, :, :, 0].flatten().tolist()))
    assert len(seen) in views


def test_the_learning_rate_rises_then_falls_to_its_end() -> None:
    config = OptimizerConfig(lr=1.0, warm_up_share=0.1, final_lr_share=0.01)
    rates = [learning_rate(f, config) for f in np.linspace(0, 1, 101)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] > 0 and rates[-1] == pytest.approx(0.01)


def test_swapping_the_average_twice_gives_back_the_weights() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = Average(module, 0.9)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    average.update(50)
    live = {k: v.clone() for k, v in module.state_dict().items()}
    shadow = {k: v.clone() for k, v in average.state_dict().items()}
    average.swap()
    assert all(torch.equal(module.state_dict()[k], v) for k, v in shadow.items())
    assert not torch.equal(module.state_dict()["0.weight"], live["0.weight"])
    average.swap()
    assert all(torch.equal(module.state_dict()[k], v) for k, v in live.items())


def test_the_average_moves_by_its_decay() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = Average(module, 0.9)
    nn.init.ones_(module.weight)
    average.update(10_000)
    assert average.state_dict()["weight"].item() == pytest.approx(0.1)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.ckpt"
    torch.save({"weights": Bomb()}, path, pickle_module=pickle)
    with pytest.raises(IntegrityError, match=r"evil\.ckpt"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04cut"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"x\.ckpt"):
        checkpoint.load(tmp_path / "x.ckpt")


def test_start_weights_of_another_head_are_taken_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = build("convnet", 3), build("convnet", 5)
    torch.save(old.state_dict(), tmp_path / "w.pt")
    before = {name: value.clone() for name, value in new.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        checkpoint.initialise(new, str(tmp_path / "w.pt"), checkpoint.sha256(tmp_path / "w.pt"))
    assert "except the head" in caplog.text
    for name, value in new.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("head.") else old.state_dict()[name])


def test_start_weights_of_equal_classes_are_taken_whole(tmp_path: Path) -> None:
    old, new = build("convnet", 3), build("convnet", 3)
    torch.save({"weights": old.state_dict()}, tmp_path / "w.pt")
    checkpoint.initialise(new, str(tmp_path / "w.pt"), None)
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())


def test_start_weights_with_another_hash_are_refused(tmp_path: Path) -> None:
    torch.save(build("convnet", 3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(IntegrityError, match="expected 000000000000"):
        checkpoint.initialise(build("convnet", 3), str(tmp_path / "w.pt"), "0" * 64)


def test_start_weights_of_another_net_are_refused(tmp_path: Path) -> None:
    torch.save(build("mobilenet_v3_small", 3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="another net"):
        checkpoint.initialise(build("convnet", 3), str(tmp_path / "w.pt"), None)


@pytest.mark.parametrize("pin", [None, "0" * 64])
def test_missing_start_weights_are_named(tmp_path: Path, pin: str | None) -> None:
    with pytest.raises(ConfigError, match=r"gone\.pt"):
        checkpoint.initialise(build("convnet", 3), str(tmp_path / "gone.pt"), pin)


def epoch(number: int) -> Epoch:
    return Epoch(
        epoch=number, step=10 * number, elapsed_s=1.0, train_loss=2.0, val_loss=1.0, val_accuracy=0.5,
        learning_rate=0.1, images_per_s=100.0,
    )  # fmt: skip


def test_progress_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert read(path) == ([], None)
    log = ProgressLog(path, [epoch(0)])
    tick = Tick(epoch=1, step=15, fraction=0.5, loss=1.5, images_per_s=9.0, elapsed_s=2.0)
    log.tick(tick)
    log.epoch(epoch(1))
    with path.open("a") as file:
        file.write(json.dumps({"epoch": epoch(2).model_dump()})[:40])
    assert read(path) == ([epoch(0), epoch(1)], tick)
    log.close()
