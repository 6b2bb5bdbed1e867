"""How a model is trained and exported: the types behind `configs/training/*.yaml`.

The YAML files live in the folder `configs/training/`, this module beside it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from configs.base import Area, Probability, Share

NetName = Literal[
    "convnet",
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "efficientnet_b4",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
]


class Budget(Area):
    """How long to train: exactly one of the two. The learning rate follows the share of it that is spent."""

    epochs: PositiveInt | None = Field(default=None, description="Passes over the training split. Resume is bit-exact.")
    seconds: PositiveFloat | None = Field(
        default=None, description="Wall-clock seconds of training and validation; what a killed run spent counts."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Budget:
        if (self.epochs is None) == (self.seconds is None):
            raise ValueError("give exactly one of epochs and seconds")
        return self


class OptimizerConfig(Area):
    """AdamW with warm-up, then a cosine down to `final_lr_share`."""

    lr: PositiveFloat = Field(default=4e-3, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(
        default=0.05, description="Decay of weight matrices and kernels; biases and norms have none."
    )
    beta2: Probability = Field(default=0.999, description="Decay of the second moment.")
    warm_up_share: Probability = Field(default=0.08, description="Share of the budget with a rising rate.")
    final_lr_share: Probability = Field(default=0.0, description="Rate at the end, as a share of the peak.")
    clip_norm: PositiveFloat | None = Field(default=None, description="Gradients are scaled to this norm. None: never.")


class AugmentConfig(Area):
    """Random changes of training images. A batch shares its geometry; exposure and colour differ between images."""

    flips: bool = Field(default=True, description="Mirror left-right and up-down, each half of the time.")
    transpose: bool = Field(default=True, description="Swap rows and columns half of the time.")
    shift: Probability = Field(default=0.06, description="Shift by up to this share of the side, both ways.")
    gain: Probability = Field(default=0.15, description="Brightness factor within 1 plus or minus this.")
    white_balance: Probability = Field(default=0.06, description="Factor a channel, within 1 plus or minus this.")


class ExportConfig(Area):
    """The checks an exported file must pass, and whether a quantized one is tried."""

    parity_images: PositiveInt = Field(default=256, description="Holdout images on which file and torch are compared.")
    parity_tolerance: PositiveFloat = Field(default=1e-5, description="Largest difference of a probability.")
    ood_quantile: Probability = Field(
        default=0.99, description="Share of validation images that the out-of-distribution threshold accepts."
    )
    latency_runs: PositiveInt = Field(default=200, description="Timed single-image runs of the file.")
    try_int8: bool = Field(default=False, description="Quantize too, and take it if faster and accurate enough.")
    int8_accuracy_loss: Probability = Field(
        default=0.005, description="Validation accuracy that the quantized file may lose."
    )
    int8_min_speedup: PositiveFloat = Field(
        default=1.1, description="Times faster that it must be; a draw is not worth the accuracy."
    )


class TrainingConfig(Area):
    """One training run. Two runs with equal values, data and hardware give equal weights (epoch budgets)."""

    dataset: str = Field(default="leaves", description="Name below <home>/datasets, or a folder.")
    net: NetName = Field(default="convnet", description="Architecture.")
    px: PositiveInt = Field(default=64, ge=16, le=1024, description="Side of the square input, in pixels.")
    budget: Budget
    batch_size: PositiveInt = Field(default=64, description="Images a step, on each device.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig())
    augmentation: AugmentConfig = Field(default=AugmentConfig())
    export: ExportConfig = Field(default=ExportConfig())
    label_smoothing: Probability = Field(default=0.05, description="Probability spread over the other classes.")
    ema_decay: float | None = Field(
        default=0.998, gt=0, lt=1, description="Average of the weights that is validated and exported. None: the last."
    )
    early_stopping: PositiveInt | None = Field(
        default=None, description="Epochs without a better validation result before stopping. None: never."
    )
    validate_every: PositiveInt = Field(default=1, description="Epochs between validations and checkpoints.")
    seed: NonNegativeInt = Field(default=0, description="Of weights, order, augmentation and dropout.")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is one.")
    devices: PositiveInt = Field(default=1, description="Devices (or CPU processes) on this machine.")
    nodes: PositiveInt = Field(
        default=1, description="Machines (pods) that train one model, each with `devices`; torchrun starts them."
    )
    strategy: Literal["auto", "ddp"] = Field(default="auto", description="auto: ddp for several devices.")
    threads: PositiveInt | None = Field(default=None, description="CPU threads a process. None: the cores it may use.")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        default="auto", description="auto: bf16-mixed on CUDA, 32-true on CPUs (bf16 is many times slower there)."
    )
    compile: Literal["auto", "on", "off"] = Field(default="auto", description="torch.compile. auto: on CUDA.")
    channels_last: bool = Field(default=True, description="Memory layout of activations; faster for convolutions.")
    device_resident: Literal["auto", "on", "off"] = Field(
        default="auto", description="Keep the uint8 set in the device's memory. auto: on CUDA, where it fits."
    )
    device_memory_share: Share = Field(default=0.5, description="Free device memory that the uint8 set may take.")
    init_weights: str | None = Field(
        default=None, description="Checkpoint to start from: a path or s3://bucket/key. None: random weights."
    )
    init_weights_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="Refuse other contents. Required for s3://."
    )
    tracking: bool = Field(default=True, description="Report to Weights & Biases, in the mode of the settings.")

    @model_validator(mode="after")
    def _remote_weights_are_pinned(self) -> TrainingConfig:
        if (self.init_weights or "").startswith("s3://") and self.init_weights_sha256 is None:
            raise ValueError("init_weights from s3:// needs init_weights_sha256")
        return self
