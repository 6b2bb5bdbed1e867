"""The training step as a Lightning module: schedule, augmentation, loss, average, validation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from configs.errors import SafetyError
from configs.training import OptimizerConfig, TrainingConfig
from ml.augment import augment, draw
from ml.batches import Batch, DeviceImages, HostImages, Source, TrainBatches, ValidationBatches
from ml.ema import Average
from ml.model import ImageModel
from ml.net import Net

_STEPS_BETWEEN_SYNCS = 10  # ranks agree on time spent and on stopping this often


@dataclass(frozen=True, slots=True)
class Arrays:
    """Decoded training and validation images: uint8 [N, px, px, 3] with labels int64 [N]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    val_images: npt.NDArray[np.uint8]
    val_labels: npt.NDArray[np.int64]


def _cannot_stop() -> None:
    raise SafetyError("The training step was used outside of ml.fit, which decides where a state is saved.")


class Clock:
    """Seconds of the budget that are spent, over all processes that worked on the run."""

    def __init__(self) -> None:
        self._before, self._start = 0.0, time.monotonic()

    def start(self, before: float) -> None:
        """Go on from `before`."""
        self._before, self._start = before, time.monotonic()

    def elapsed(self) -> float:
        """Seconds spent."""
        return self._before + time.monotonic() - self._start


def learning_rate(fraction: float, config: OptimizerConfig) -> float:
    """Linear warm-up, then half a cosine (Loshchilov and Hutter, ICLR 2017), by the share of the budget spent."""
    if fraction < config.warm_up_share:
        return config.lr * max(fraction / config.warm_up_share, 0.01)
    rest = min(1.0, (fraction - config.warm_up_share) / max(1.0 - config.warm_up_share, 1e-9))
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * 0.5 * (1.0 + math.cos(math.pi * rest)))


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the generators that a step draws from: the CPU's and the device's.

    `torch.manual_seed` would also queue a call, with a formatted stack, for every kind of device that is not there:
    a millisecond a step, and a list that grows with the run.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


class Classifier(pl.LightningModule):
    """Trains an `ImageModel`. State that Lightning does not keep travels in the checkpoint under `khet`.

    Bit-exact resume: the order of images depends on (seed, epoch), every other random number on (seed, step).
    """

    def __init__(self, net: Net, config: TrainingConfig, arrays: Arrays) -> None:
        super().__init__()
        self.model = ImageModel(net, channels_last=config.channels_last)
        self.config = config
        self.arrays = arrays
        self.clock = Clock()
        self.average: Average | None = None
        self.fraction = 0.0
        self.stop_asked = False
        self.stop_agreed = False
        self.interrupt: Callable[[], None] = _cannot_stop
        self._validated = False
        self._restored: dict[str, Any] = {}
        self._augment = augment
        self._reset_sums()

    # Data -------------------------------------------------------------------------------------------------------------

    @override
    def train_dataloader(self) -> TrainBatches:
        source = self._source(self.arrays.images, self.arrays.labels)
        c, t = self.config, self.trainer
        ahead = self.device.type == "cuda" and isinstance(source, HostImages)
        return TrainBatches(source, c.batch_size, seed=c.seed, rank=t.global_rank, world=t.world_size, read_ahead=ahead)

    @override
    def val_dataloader(self) -> ValidationBatches:
        source = self._source(self.arrays.val_images, self.arrays.val_labels)
        size = max(256, self.config.batch_size)
        return ValidationBatches(source, size, rank=self.trainer.global_rank, world=self.trainer.world_size)

    def _source(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Source:
        if self._fits_device():
            return DeviceImages(images, labels, self.device)
        return HostImages(images, labels, pin=self.device.type == "cuda")

    def _fits_device(self) -> bool:
        wanted = self.config.device_resident
        if wanted != "auto" or self.device.type != "cuda":
            return wanted == "on"
        total = torch.cuda.get_device_properties(self.device).total_memory
        return self.arrays.images.nbytes + self.arrays.val_images.nbytes <= self.config.device_memory_share * total

    # Set-up and schedule ----------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW (Loshchilov and Hutter, ICLR 2019); decay on matrices and kernels only."""
        o = self.config.optimizer
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, o.beta2), fused=True)

    @override
    def on_fit_start(self) -> None:
        if self.config.ema_decay is not None:
            self.average = Average(self.model.net, self.config.ema_decay)
        wanted = self.config.compile
        if wanted == "on" or (wanted == "auto" and self.device.type == "cuda"):
            self.model.compile()
            self._augment = torch.compile(augment)

    @override
    def on_train_start(self) -> None:
        if self.average is not None and "average" in self._restored:
            self.average.load_state_dict(self._restored["average"])
        self._reset_sums()  # on the device, where the module is by now
        self._sums.copy_(self._restored.get("sums", self._sums))
        self.clock.start(float(self._restored.get("elapsed_s", 0.0)))
        self._restored = {}

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        seed_step((self.config.seed << 20) + step * self.trainer.world_size + self.trainer.global_rank, self.device)
        self._agree(step)
        rate = learning_rate(self.fraction, self.config.optimizer)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def _agree(self, step: int) -> None:
        """Update the spent share of the budget; rank 0's clock and its signals count for all."""
        budget = self.config.budget
        if budget.seconds is not None:
            self.fraction = min(1.0, self.clock.elapsed() / budget.seconds)
        else:
            self.fraction = step / (int(budget.epochs or 1) * int(self.trainer.num_training_batches))
        self.stop_agreed = self.stop_asked
        if self.trainer.world_size > 1:
            self._agree_with_others(step)

    def _agree_with_others(self, step: int) -> None:
        if step % _STEPS_BETWEEN_SYNCS == 0 or not hasattr(self, "_agreed"):
            said = torch.tensor([self.fraction, float(self.stop_asked)], dtype=torch.float64, device=self.device)
            torch.distributed.broadcast(said, src=0)
            self._agreed = said.tolist()
            self.stop_agreed = bool(self._agreed[1])
        else:
            self.stop_agreed = False
        if self.config.budget.seconds is not None:
            self.fraction = self._agreed[0]

    # Steps ------------------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        a = self.config.augmentation
        rows, columns, transpose = draw(images.shape[1], a, images.device)
        pixels = self._augment(images, rows, columns, transpose, a.gain, a.white_balance)
        loss = cross_entropy(self.model(pixels), labels, label_smoothing=self.config.label_smoothing)
        self.last_loss = loss.detach()
        return loss

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip here: Lightning refuses to with a fused optimizer, which matters for fp16 only."""
        if self.config.optimizer.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._sums += torch.stack((self.last_loss.double(), torch.ones_like(self.last_loss, dtype=torch.float64)))
        if self.average is not None:
            self.average.update(self.trainer.global_step)
        if self.config.budget.seconds is not None and self.fraction >= 1.0:
            self.trainer.should_stop = True
        if self.trainer.should_stop or self.trainer.current_epoch + 1 == self.config.budget.epochs:
            self.trainer.check_val_every_n_epoch = 1  # the last weights are always validated
        if self.stop_agreed and not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.interrupt()

    @override
    def on_validation_start(self) -> None:
        if self.average is not None:
            self.average.swap()
            if self.trainer.world_size > 1:  # batch norm's statistics saw other images on each rank
                for buffer in self.model.net.buffers():
                    torch.distributed.broadcast(buffer, src=0)
        self._val_sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self.model(images)
        counted = labels >= 0
        loss = cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
        hits = (logits.argmax(1) == labels).sum()
        self._val_sums += torch.stack((loss.double(), hits.double(), counted.sum().double()))

    @override
    def on_validation_end(self) -> None:
        loss, hits, count = self._over_ranks(self._val_sums)
        self.val_loss, self.val_accuracy = loss / count, hits / count
        self._validated = True
        if self.average is not None:
            self.average.swap()

    # Results ----------------------------------------------------------------------------------------------------------

    def take_validated(self) -> bool:
        """Whether there was a validation since the last call."""
        validated, self._validated = self._validated, False
        return validated

    def take_train_loss(self) -> float:
        """Mean training loss since the last call, over all ranks."""
        loss, steps = self._over_ranks(self._sums)
        self._reset_sums()
        return loss / max(steps, 1.0)

    def best_weights(self) -> dict[str, Tensor]:
        """The net's state dict with the average in place of the live values."""
        live = self.model.net.state_dict()
        return live | self.average.state_dict() if self.average is not None else live

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: dict[str, Any] = {"elapsed_s": self.clock.elapsed(), "sums": self._sums.cpu()}
        if self.average is not None:
            state["average"] = self.average.state_dict()
        checkpoint["khet"] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["khet"]

    def _reset_sums(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def _over_ranks(self, values: Tensor) -> list[float]:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        return [float(v) for v in values.tolist()]
