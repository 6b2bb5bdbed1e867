"""Training speed, side by side with its limits: `python -m tests.benchmarks.bench_training`.

(a) The Lightning loop of `ml.fit` against a plain torch loop with the same net, batches, augmentation and average.
(b) Batches from the memory map against a DataLoader that decodes the JPEGs with Pillow in each epoch.
(c) On CUDA: the whole loop against the same net and batch fed from memory already on the device.

The two sides of a comparison take turns in one process; the ratio is the median over the turns, so that other work on
the machine, which comes and goes, weighs on both.
"""

from __future__ import annotations

import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from typing_extensions import override

from configs.training import TrainingConfig
from ml import fit
from ml.augment import augment, draw
from ml.batches import HostImages, TrainBatches
from ml.checkpoint import Trained
from ml.ema import Average
from ml.hardware import cores, quiet_threads
from ml.leaves import FOLDERS, render
from ml.model import ImageModel
from ml.module import Arrays, Classifier, learning_rate, seed_step
from ml.net import build
from ml.progress import Display
from ml.recorder import Recorder
from ml.results import Epoch
from ml.tracking import Silent

CLASSES = tuple(sorted(FOLDERS.values()))
ROUNDS = 7
CHUNK, TURNS = 4, 40
PHOTOS, PHOTO_PX = 768, 256
GPU_NETS = {"convnet": 1024, "resnet50": 256, "efficientnet_b4": 96}
GPU_PX, GPU_IMAGES, GPU_STEPS = 224, 8192, 60


def main() -> dict[str, Any]:
    """Measure in a process of its own, as training runs, and print; returns the ratios with their targets."""
    quiet_threads()  # for the child: OpenMP reads it when torch is loaded, which may have happened here already
    command = [sys.executable, "-m", "tests.benchmarks.bench_training", "--measure"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    _show(results)
    return results


def measure() -> dict[str, Any]:
    """The comparisons, in this process."""
    fit._quiet()
    torch.set_num_threads(cores())
    results = {"lightning_over_plain": lightning(), "memory_map_over_pillow": memory_map()}
    return results | {f"loop_over_device_memory_{net}": value for net, value in on_cuda().items()}


# (a) ------------------------------------------------------------------------------------------------------------------


def lightning() -> dict[str, Any]:
    """Images/s of the Lightning loop over those of a plain loop, taking turns every few steps of one epoch."""
    config, arrays = _config(64, budget={"epochs": 1}), _random_arrays(CHUNK * TURNS * 64, 64)
    turns = _Turns(_plain_steps(config, arrays))
    _lightning_loop(Classifier(build("convnet", len(CLASSES)), config, arrays), turns)
    return _summary([(CHUNK * 64 / a, CHUNK * 64 / b) for a, b in turns.pairs[2:]], target=0.95)


class _Turns(pl.Callback):
    """After every few steps of Lightning the peer does as many; each side's seconds are counted alone."""

    def __init__(self, peer: Iterator[None]) -> None:
        self.pairs: list[tuple[float, float]] = []
        self._peer, self._mark = peer, 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step and trainer.global_step % CHUNK == 0:
            between = time.perf_counter()
            with torch.random.fork_rng(devices=()):
                for _ in range(CHUNK):
                    next(self._peer)
            after = time.perf_counter()
            self.pairs.append((between - self._mark, after - between))
            self._mark = after


def _config(px: int, **changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"px": px, "budget": {"epochs": 2}, "tracking": False} | changes)


def _random_arrays(images: int, px: int) -> Arrays:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, px, px, 3), dtype=np.uint8)
    labels = rng.integers(0, len(CLASSES), images)
    return Arrays(pixels, labels, pixels[:64], labels[:64])


def _images_per_s(module: Classifier, device: torch.device | None = None, skip: int = 0) -> float:
    """From the start of step `skip` to the end of the last, with progress, checkpoints and validation."""
    watch = _Watch(skip, device)
    _lightning_loop(module, watch)
    return watch.images / (watch.end - watch.start)


def _lightning_loop(module: Classifier, watch: pl.Callback) -> None:
    """The run as `ml.fit` makes it, with one more callback."""
    with tempfile.TemporaryDirectory() as folder, Display("benchmark", quiet_s=float("inf")) as display:
        describe = functools.partial(_about, module.config)
        recorder = Recorder(Path(folder), module, describe, Silent(), display, lambda _step, _epoch: None)
        fit._trainer(module.config, [watch, recorder], Path(folder)).fit(module)


class _Watch(pl.Callback):
    """The clock of a Lightning run: from the first counted step's start to the last step's end."""

    def __init__(self, skip: int, device: torch.device | None) -> None:
        self.start = self.end = 0.0
        self.images = 0
        self._skip, self._device = skip, device

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._skip:
            _wait(self._device)
            self.start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._skip:
            self.images += len(batch[1])
        if trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs:
            _wait(self._device)
        self.end = time.perf_counter()


def _about(config: TrainingConfig, epoch: Epoch) -> Trained:
    return Trained(
        config=config, classes=CLASSES, healthy_classes=(), dataset="benchmark", dataset_root=Path(),
        dataset_hash="", decode_contract="", epoch=epoch.epoch, step=epoch.step, val_accuracy=0.0, val_loss=0.0,
    )  # fmt: skip


def _plain_steps(config: TrainingConfig, arrays: Arrays) -> Iterator[None]:
    """The same work without Lightning, a step a `next`: seed, schedule, augmentation, loss, step, average."""
    model = ImageModel(build(config.net, len(CLASSES))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    average, a, total = Average(model.net, 0.998), config.augmentation, torch.zeros(())
    batches = TrainBatches(HostImages(arrays.images, arrays.labels), config.batch_size, seed=0)
    for step, (pixels, labels) in enumerate(batches):
        seed_step(step, pixels.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / len(batches), config.optimizer)
        changed = augment(pixels, *draw(config.px, a, pixels.device), a.gain, a.white_balance)
        loss = cross_entropy(model(changed), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update(step)
        total += loss.detach()
        yield


# (b) ------------------------------------------------------------------------------------------------------------------


class _Decoding(Classifier):
    """The same training, fed by a DataLoader that decodes each photo in each epoch."""

    photos: list[tuple[bytes, int]]
    workers: int

    @override
    def train_dataloader(self) -> Any:
        data = _Photos(self.photos, self.config.px)
        keep = self.workers > 0
        return DataLoader(
            data,
            self.config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            persistent_workers=keep,
        )


class _Photos(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """JPEGs, decoded and resized with Pillow when they are asked for, as torchvision's ImageFolder and Resize do."""

    def __init__(self, photos: list[tuple[bytes, int]], px: int) -> None:
        self._photos, self._px = photos, px

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        data, label = self._photos[index]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        resized = image.resize((self._px, self._px), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)), label


def memory_map() -> dict[str, Any]:
    """Images/s from the map over the better of a DataLoader without and with worker processes."""
    photos = _photos()
    config = _config(64, budget={"epochs": 4})
    with tempfile.TemporaryDirectory() as folder:
        arrays = _mapped(photos, Path(folder) / "map.npy")

        def peer(workers: int) -> float:
            module = _Decoding(build("convnet", len(CLASSES)), config, arrays)
            module.photos, module.workers = photos, workers
            return _images_per_s(module)

        ours = lambda: _images_per_s(Classifier(build("convnet", len(CLASSES)), config, arrays))  # noqa: E731
        return _compare(ours, lambda: max(peer(0), peer(cores())), target=1.25)


def _photos() -> list[tuple[bytes, int]]:
    """Photos of leaves at the size that most leaf collections have."""
    leaves = [render(seed, PHOTO_PX) for seed in range(PHOTOS // 4)]
    return [(leaf.jpeg(), CLASSES.index(FOLDERS[leaf.label])) for leaf in leaves] * 4


def _mapped(photos: list[tuple[bytes, int]], path: Path) -> Arrays:
    from ml.images import decode

    labels = np.array([label for _, label in photos])
    np.save(path, np.stack([decode(data, 64) for data, _ in photos]))
    images = np.load(path, mmap_mode="r")
    return Arrays(images, labels, images[:64], labels[:64])


# (c) ------------------------------------------------------------------------------------------------------------------


def on_cuda() -> dict[str, dict[str, Any]]:
    """Images/s of the whole loop over those of the net fed from device memory; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    return {net: _on_cuda(net, batch) for net, batch in GPU_NETS.items()}


def _on_cuda(net: str, batch: int) -> dict[str, Any]:
    arrays = _random_arrays(GPU_IMAGES, GPU_PX)
    epochs = max(2, GPU_STEPS // (GPU_IMAGES // batch) + 1)
    config = _config(GPU_PX, net=net, batch_size=batch, budget={"epochs": epochs}, validate_every=epochs)
    device = torch.device("cuda")
    return _compare(
        lambda: _images_per_s(Classifier(build(net, len(CLASSES)), config, arrays), device, skip=10),
        lambda: _device_limit(net, batch, arrays),
        target=0.9,
        rounds=3,
    )


def _device_limit(net: str, batch: int, arrays: Arrays) -> float:
    """Forward, backward and step on one batch that never leaves the device: bf16, channels_last, compiled."""
    device = torch.device("cuda")
    model = ImageModel(build(net, len(CLASSES))).to(device).train()
    model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images, labels = (torch.from_numpy(x[:batch].copy()).to(device) for x in (arrays.images, arrays.labels))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = cross_entropy(model(images), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for _ in range(10):
        step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(GPU_STEPS):
        step()
    _wait(device)
    return batch * GPU_STEPS / (time.perf_counter() - start)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


# Comparison -----------------------------------------------------------------------------------------------------------


def _compare(
    ours: Callable[[], float], peer: Callable[[], float], *, target: float, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Take turns, changing who begins; a warm-up of both is not counted."""
    ours(), peer()
    pairs = []
    for i in range(rounds):
        first, second = (ours, peer) if i % 2 == 0 else (peer, ours)
        a, b = first(), second()
        pairs.append((a, b) if i % 2 == 0 else (b, a))
    return _summary(pairs, target)


def _summary(pairs: Sequence[tuple[float, float]], target: float) -> dict[str, Any]:
    """Medians over the turns; the range of the ratio is that of its middle half."""
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ours_images_per_s": statistics.median(a for a, _ in pairs),
        "peer_images_per_s": statistics.median(b for _, b in pairs),
        "ratio": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        "target": target,
        "met": middle >= target,
    }


def _show(results: dict[str, Any]) -> None:
    table = Table(title=f"Training speed ({cores()} cores, torch {torch.__version__})")
    for column in ("comparison", "ours, images/s", "peer, images/s", "ratio (middle half)", "target", ""):
        table.add_column(column, justify="left" if column == "comparison" else "right")
    for name, r in results.items():
        spread = f"{r['ratio']:.2f} ({r['lower_quartile']:.2f} to {r['upper_quartile']:.2f})"
        values = (f"{r['ours_images_per_s']:.0f}", f"{r['peer_images_per_s']:.0f}", spread, f">= {r['target']:.2f}")
        table.add_row(name.replace("_", " "), *values, "met" if r["met"] else "MISSED")
    Console().print(table)
    if not torch.cuda.is_available():
        Console().print("No CUDA device here: the comparison with device memory was skipped.")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure()))
    else:
        sys.exit(0 if all(r["met"] for r in main().values()) else 1)
