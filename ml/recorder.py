"""What a training leaves on disk while it runs: last.ckpt, best.ckpt, progress lines; and when it stops."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from configs.errors import SafetyError
from ml import checkpoint
from ml.checkpoint import Trained
from ml.checkpoint_store import BEST, LAST
from ml.module import Classifier
from ml.progress import FILE, Display, ProgressLog, Tick, TrainingInterrupted
from ml.results import Epoch
from ml.tracking import Tracker

_TICK_S = 1.0


class Recorder(Checkpoint):
    """Records each validated epoch, keeps the best weights, and saves a state to resume from at each epoch's end.

    A `Checkpoint` callback: Lightning runs those after all others.
    best.ckpt is written before last.ckpt: a run killed in between repeats that epoch and writes it again.
    `on_saved` hears of every state, with its step and epoch, in the process that wrote it.
    """

    def __init__(
        self,
        out: Path,
        module: Classifier,
        describe: Callable[[Epoch], Trained],
        tracker: Tracker,
        display: Display,
        on_saved: Callable[[int, int], None],
    ) -> None:
        self._out, self._module, self._describe = out, module, describe
        self._tracker, self._display, self._on_saved = tracker, display, on_saved
        self._log: ProgressLog | None = None
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        self.resumed_from: int | None = None
        self.train_s, self.images = 0.0, 0
        self._fresh_s, self._fresh_images = 0.0, 0
        self._mark = self._ticked = 0.0

    # State that survives a kill ---------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "history": [e.model_dump() for e in self.history],
            "best": self.best.model_dump() if self.best else None,
            "train_s": self.train_s,
            "images": self.images,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [Epoch.model_validate(e) for e in state_dict["history"]]
        self.best = Epoch.model_validate(state_dict["best"]) if state_dict["best"] else None
        self.train_s, self.images = state_dict["train_s"], state_dict["images"]

    # Hooks ------------------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._module.interrupt = lambda: self._interrupt(trainer)
        if trainer.is_global_zero:
            self._log = ProgressLog(self._out / FILE, self.history)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _refuse_apart(trainer)
        self.resumed_from = trainer.global_step or None
        self._mark = self._ticked = time.monotonic()
        # After Lightning, whose own handler would run a collective inside a signal handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _Asker(self._module))

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._fresh_images += len(batch[1]) * trainer.world_size
        now = time.monotonic()
        if now - self._ticked >= _TICK_S and self._log is not None:
            self._ticked = now
            module = self._module
            tick = Tick(
                epoch=trainer.current_epoch, step=trainer.global_step, fraction=module.fraction,
                loss=float(module.last_loss), images_per_s=self._rate(now), elapsed_s=module.clock.elapsed(),
            )  # fmt: skip
            self._log.tick(tick)
            self._display.tick(tick, self.history[-1] if self.history else None)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count_time()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fresh_images == 0:  # a resumed run passes here once before it trains
            return
        self._count_time()
        if self._module.take_validated():
            self._record(trainer)
        self._save(trainer)
        self._mark = time.monotonic()
        if self._module.stop_agreed:
            raise TrainingInterrupted(self._farewell(trainer))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._log is not None:
            self._log.close()

    def _count_time(self) -> None:
        """Training time ends here; validating and saving do not count."""
        now = time.monotonic()
        self._fresh_s, self._mark = self._fresh_s + now - self._mark, now

    # Work -------------------------------------------------------------------------------------------------------------

    def _record(self, trainer: pl.Trainer) -> None:
        module = self._module
        epoch = Epoch(
            epoch=trainer.current_epoch, step=trainer.global_step, elapsed_s=module.clock.elapsed(),
            train_loss=module.take_train_loss(), val_loss=module.val_loss, val_accuracy=module.val_accuracy,
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            images_per_s=self._fresh_images / max(self._fresh_s, 1e-9),
        )  # fmt: skip
        self.history.append(epoch)
        self.train_s, self.images = self.train_s + self._fresh_s, self.images + self._fresh_images
        self._fresh_s, self._fresh_images = 0.0, 0
        if self.best is None or _better(epoch, self.best):
            self.best = epoch
            if trainer.is_global_zero:
                checkpoint.save(self._out / BEST, module.best_weights(), self._describe(epoch))
        self._stop_early(trainer, module)
        if self._log is not None:
            self._log.epoch(epoch)
            self._display.epoch(epoch, _share_done(trainer, module))
            self._tracker.log(epoch.step, epoch.model_dump(exclude={"step"}))

    def _stop_early(self, trainer: pl.Trainer, module: Classifier) -> None:
        patience = module.config.early_stopping
        if patience is not None and self.best and self.history[-1].epoch - self.best.epoch >= patience:
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer) -> None:
        partial = self._out / (LAST + ".partial")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(self._out / LAST)
            self._on_saved(trainer.global_step, trainer.current_epoch)

    def _interrupt(self, trainer: pl.Trainer) -> None:
        self._save(trainer)
        raise TrainingInterrupted(self._farewell(trainer))

    def _farewell(self, trainer: pl.Trainer) -> str:
        return (
            f"Training was asked to stop and saved its state at step {trainer.global_step} in {self._out / LAST}. "
            "Next: run the same command again to go on from there."
        )

    def _rate(self, now: float) -> float:
        seconds = self._fresh_s + (now - self._mark)
        return self._fresh_images / max(seconds, 1e-9)


class _Asker:
    """A signal handler that only leaves a note; the training loop reads it after the current step."""

    def __init__(self, module: Classifier) -> None:
        self._module = module

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (the signature of handlers)
        self._module.stop_asked = True


def _refuse_apart(trainer: pl.Trainer) -> None:
    """Processes that started from different states would train something that nobody asked for.

    Raises:
        SafetyError: they did, in each of them; when all start again they find the same state.
    """
    if trainer.world_size == 1:
        return
    steps = trainer.strategy.all_gather(torch.tensor(trainer.global_step, device=trainer.strategy.root_device))
    if steps.min() != steps.max():
        raise SafetyError(
            f"The processes of this training start from different steps ({sorted(set(steps.tolist()))}): a state was "
            "stored while they looked for one. Nothing was trained. Next: start all of them again."
        )


def _better(new: Epoch, old: Epoch) -> bool:
    return (new.val_accuracy, -new.val_loss) > (old.val_accuracy, -old.val_loss)


def _share_done(trainer: pl.Trainer, module: Classifier) -> float:
    if trainer.should_stop:
        return 1.0
    epochs = module.config.budget.epochs
    return module.fraction if epochs is None else min(1.0, (trainer.current_epoch + 1) / epochs)
