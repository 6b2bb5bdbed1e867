"""The training itself: torch and Lightning are imported here, and `ml.train` imports this inside its process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from configs.errors import ConfigError
from configs.settings import settings
from configs.training import TrainingConfig
from ml import checkpoint, pictures
from ml.checkpoint import Trained
from ml.checkpoint_store import BEST, LAST
from ml.dataset import Dataset
from ml.hardware import cores, describe, first_rank
from ml.images import DECODE_CONTRACT
from ml.module import Arrays, Classifier
from ml.net import build
from ml.progress import Display
from ml.recorder import Recorder
from ml.results import Epoch, TrainResult
from ml.tracking import Silent, Tracker, tracker


def fit(
    config: TrainingConfig, data: Dataset, out: Path, run_id: str, on_saved: Callable[[int, int], None]
) -> TrainResult:
    """Train, or go on from out/last.ckpt, and write best.ckpt and curves.png.

    `on_saved(step, epoch)` is called in the process that writes, after each state it wrote.

    Raises:
        ConfigError: the data or the start weights do not fit the configuration.
        TrainingInterrupted: a signal asked to stop; the state is saved.
    """
    _quiet()
    torch.set_num_threads(config.threads or max(1, cores() // (config.devices if _on_cpu(config) else 1)))
    pl.seed_everything(config.seed, workers=False, verbose=False)
    net = build(config.net, len(data.classes))
    resume = out / LAST if (out / LAST).exists() else None
    if config.init_weights is not None and resume is None:
        checkpoint.initialise(net, config.init_weights, config.init_weights_sha256)
    module = Classifier(net, config, _arrays(data, config.px))
    follower = _tracker(config, out, run_id)
    with Display(f"training {config.net}") as display:
        recorder = Recorder(out, module, _describer(config, data), follower, display, on_saved)
        trainer = _trainer(config, [recorder], out)
        trainer.fit(module, ckpt_path=resume, weights_only=True)
    result = _result(config, data, out, recorder, module)
    if trainer.is_global_zero:
        pictures.curves(result.history, out / "curves.png")
        follower.finish({"best_val_accuracy": result.best_val_accuracy}, {"curves": out / "curves.png"})
    return result


def wait_for_all() -> None:
    """Return when every process of this training has called it: none ends while another may still need it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _quiet() -> None:
    """Lightning's advice is about loaders, loggers and validation that this project does in its own way."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for category in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(pytorch_lightning|lightning_fabric)\.")


def _on_cpu(config: TrainingConfig) -> bool:
    return config.accelerator == "cpu" or not torch.cuda.is_available()


def _arrays(data: Dataset, px: int) -> Arrays:
    train, validation = data.split("train", px), data.split("validation", px)
    for name, split in (("train", train), ("validation", validation)):
        if len(split.labels) < 2:
            raise ConfigError(
                f"Dataset {data.name} has {len(split.labels)} images in its {name} split; at least 2 are needed. "
                "Nothing was trained. Next: import more photos."
            )
    return Arrays(train.images, train.labels, validation.images, validation.labels)


def _tracker(config: TrainingConfig, out: Path, run_id: str) -> Tracker:
    if not config.tracking or not first_rank():
        return Silent()
    return tracker(settings().tracking, out, run_id, config.model_dump(mode="json"))


def _describer(config: TrainingConfig, data: Dataset) -> Callable[[Epoch], Trained]:
    def described(epoch: Epoch) -> Trained:
        return Trained(
            config=config, classes=data.classes, healthy_classes=data.healthy_classes, dataset=data.name,
            dataset_root=data.root.resolve(), dataset_hash=data.manifest_hash, decode_contract=DECODE_CONTRACT,
            epoch=epoch.epoch, step=epoch.step, val_accuracy=epoch.val_accuracy, val_loss=epoch.val_loss,
        )  # fmt: skip

    return described


def _trainer(config: TrainingConfig, callbacks: list[pl.Callback], out: Path) -> pl.Trainer:
    """A trainer without the parts that cost time or files: own progress, checkpoints and tracking replace them."""
    cuda = not _on_cpu(config)
    if cuda:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return pl.Trainer(
        accelerator=config.accelerator, devices=config.devices, num_nodes=config.nodes, strategy=_strategy(config),
        precision=_precision(config, cuda), max_epochs=config.budget.epochs or -1,
        check_val_every_n_epoch=config.validate_every,
        sync_batchnorm=cuda and config.devices * config.nodes > 1,
        use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=callbacks, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out,
    )  # fmt: skip


def _strategy(config: TrainingConfig) -> str:
    if config.nodes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # it would wait for ever for the others
        raise ConfigError(
            f"nodes is {config.nodes}, and nothing has started the others. Nothing was trained. "
            f"Next: on each machine, torchrun --nnodes={config.nodes} ... --module ml.train ..."
        )
    return "ddp" if config.devices * config.nodes > 1 or config.strategy == "ddp" else "auto"


def _precision(config: TrainingConfig, cuda: bool) -> Any:
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if cuda else "32-true"


def _result(config: TrainingConfig, data: Dataset, out: Path, recorder: Recorder, module: Classifier) -> TrainResult:
    best, last = recorder.best, recorder.history[-1] if recorder.history else None
    if best is None or last is None:
        raise ConfigError("The budget ended before the first validation: no model was made. Next: raise the budget.")
    return TrainResult(
        checkpoint=out / BEST, net=config.net, px=config.px, seed=config.seed, epochs=last.epoch + 1, steps=last.step,
        elapsed_s=last.elapsed_s, images_per_s=recorder.images / max(recorder.train_s, 1e-9),
        best_val_accuracy=best.val_accuracy, dataset=data.name, dataset_hash=data.manifest_hash,
        hardware=describe() | {"device": str(module.device.type)}, resumed_from_step=recorder.resumed_from,
        history=tuple(recorder.history),
    )  # fmt: skip
