"""The zoo: image classifiers in plain torch, by name. torchvision's wheels may not match the installed torch.

Every net maps normalised float images [N, 3, H, W] to logits [N, classes] and splits that in two:
`embed` gives the features [N, embedding_size], `head` turns them into logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from configs.errors import ConfigError

Activation = Callable[[], nn.Module]


class Net(nn.Module):
    """Features, then a head of dropout and one linear layer."""

    head: nn.Sequential

    def __init__(self, embedding_size: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(embedding_size, classes))

    def embed(self, x: Tensor) -> Tensor:
        """Features [N, embedding_size] of normalised images [N, 3, H, W]."""
        raise NotImplementedError(f"{type(self).__name__} defines no embed()")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.head(self.embed(x))
        return logits


def pooled(x: Tensor) -> Tensor:
    """Global average. `mean` exports to half the ONNX nodes of AdaptiveAvgPool2d + flatten."""
    return x.mean((2, 3))


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Activation | None = nn.ReLU
) -> nn.Sequential:
    """Convolution without bias, batch norm, activation (None: linear)."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


# ---------------------------------------------------------------- ConvNet


class ConvNet(Net):
    """The default: 101 k parameters, made for minutes of training on a CPU."""

    def __init__(self, classes: int) -> None:
        super().__init__(128, classes, dropout=0.1)
        self.features = nn.Sequential(
            conv_bn(3, 16, stride=2),
            conv_bn(16, 16),
            nn.MaxPool2d(2),
            conv_bn(16, 32),
            nn.MaxPool2d(2),
            conv_bn(32, 64),
            nn.MaxPool2d(2),
            conv_bn(64, 128),
        )

    def embed(self, x: Tensor) -> Tensor:
        return pooled(self.features(x))


# ---------------------------------------------------------------- ResNet (He et al., CVPR 2016)


class _Residual(nn.Module):
    """A residual block: `body` plus the input, projected where shapes differ."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        same = inputs == outputs and stride == 1
        self.body = body
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride, act=None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.body(x) + self.shortcut(x))
        return y


def _basic(inputs: int, width: int, stride: int) -> _Residual:
    body = nn.Sequential(conv_bn(inputs, width, 3, stride), conv_bn(width, width, 3, act=None))
    return _Residual(body, inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int) -> _Residual:
    """With the stride in the 3x3 convolution ("v1.5"), as the published ResNet-50 weights have it."""
    body = nn.Sequential(
        conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride), conv_bn(width, 4 * width, 1, act=None)
    )
    return _Residual(body, inputs, 4 * width, stride)


class ResNet(Net):
    """ResNet-18 and ResNet-50."""

    def __init__(self, classes: int, blocks: Sequence[int], *, bottleneck: bool) -> None:
        block, expansion = (_bottleneck, 4) if bottleneck else (_basic, 1)
        super().__init__(512 * expansion, classes, dropout=0.0)
        layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for i in range(count):
                layers.append(block(inputs, width, 2 if stage and i == 0 else 1))
                inputs = width * expansion
        self.features = nn.Sequential(*layers)

    def embed(self, x: Tensor) -> Tensor:
        return pooled(self.features(x))


# ---------------------------------------------------------------- inverted residuals


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, squeezed: int, act: Activation, gate: Activation) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))
        return x * scale


class DropPath(nn.Module):
    """Drop the residual branch of whole images while training (Huang et al., ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).add_(keep).floor_()
        return x * (mask / keep)


@dataclass(frozen=True, slots=True)
class _Stage:
    """One inverted residual block (Sandler et al., CVPR 2018)."""

    kernel: int
    inputs: int
    expanded: int
    outputs: int
    stride: int
    squeezed: int
    act: Activation
    squeeze_act: Activation
    gate: Activation
    drop_path: float = 0.0


class _Inverted(nn.Module):
    """Expand, depthwise convolution, squeeze-excite, project; plus the input where shapes agree."""

    def __init__(self, s: _Stage) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if s.expanded != s.inputs:
            layers.append(conv_bn(s.inputs, s.expanded, 1, act=s.act))
        layers.append(conv_bn(s.expanded, s.expanded, s.kernel, s.stride, groups=s.expanded, act=s.act))
        if s.squeezed:
            layers.append(SqueezeExcite(s.expanded, s.squeezed, s.squeeze_act, s.gate))
        layers.append(conv_bn(s.expanded, s.outputs, 1, act=None))
        self.body = nn.Sequential(*layers)
        self.residual = s.stride == 1 and s.inputs == s.outputs
        self.drop_path = DropPath(s.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + self.drop_path(y) if self.residual else y


def divisible(value: float, by: int = 8) -> int:
    """Round a channel count to a multiple of `by`, never down by more than 10 % (the papers' reference code)."""
    rounded = max(by, int(value + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * value else rounded


# ---------------------------------------------------------------- EfficientNet (Tan and Le, ICML 2019)

# expansion, kernel, stride, inputs, outputs, blocks: table 1 of the paper (B0).
_EFFICIENTNET = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
_DROP_PATH = 0.2


class EfficientNet(Net):
    """B0 scaled by `width` and `depth`."""

    def __init__(self, classes: int, width: float, depth: float, dropout: float) -> None:
        last = divisible(320 * width)
        super().__init__(4 * last, classes, dropout)
        stages = _efficientnet_stages(width, depth)
        self.features = nn.Sequential(
            conv_bn(3, divisible(32 * width), 3, 2, act=nn.SiLU),
            *(_Inverted(s) for s in stages),
            conv_bn(last, 4 * last, 1, act=nn.SiLU),
        )

    def embed(self, x: Tensor) -> Tensor:
        return pooled(self.features(x))


def _efficientnet_stages(width: float, depth: float) -> list[_Stage]:
    counts = [math.ceil(row[5] * depth) for row in _EFFICIENTNET]
    stages: list[_Stage] = []
    for (expansion, kernel, stride, inputs, outputs, _), count in zip(_EFFICIENTNET, counts, strict=True):
        for i in range(count):
            a = divisible(inputs * width) if i == 0 else divisible(outputs * width)
            b, drop = divisible(outputs * width), _DROP_PATH * len(stages) / sum(counts)
            stages.append(
                _Stage(
                    kernel, a, divisible(a * expansion), b, stride if i == 0 else 1,
                    max(1, a // 4), nn.SiLU, nn.SiLU, nn.Sigmoid, drop,
                )
            )  # fmt: skip
    return stages


# ---------------------------------------------------------------- MobileNetV3 (Howard et al., ICCV 2019)

# kernel, expanded, outputs, squeeze-excite, h-swish, stride: tables 1 and 2 of the paper.
_LARGE = (
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
)  # fmt: skip
_SMALL = (
    (3, 16, 16, 1, 0, 2), (3, 72, 24, 0, 0, 2), (3, 88, 24, 0, 0, 1), (5, 96, 40, 1, 1, 2), (5, 240, 40, 1, 1, 1),
    (5, 240, 40, 1, 1, 1), (5, 120, 48, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 96, 1, 1, 2), (5, 576, 96, 1, 1, 1),
    (5, 576, 96, 1, 1, 1),
)  # fmt: skip


class MobileNetV3(Net):
    """Large or small. The embedding is the output of the wide layer after pooling."""

    def __init__(self, classes: int, rows: Sequence[tuple[int, int, int, int, int, int]], hidden: int) -> None:
        super().__init__(hidden, classes, dropout=0.2)
        blocks, inputs = [], 16
        for kernel, expanded, outputs, squeeze, swish, stride in rows:
            act: Activation = nn.Hardswish if swish else nn.ReLU
            squeezed = divisible(expanded / 4) if squeeze else 0
            stage = _Stage(kernel, inputs, expanded, outputs, stride, squeezed, act, nn.ReLU, nn.Hardsigmoid)
            blocks.append(_Inverted(stage))
            inputs = outputs
        stem, last = conv_bn(3, 16, 3, 2, act=nn.Hardswish), conv_bn(inputs, 6 * inputs, 1, act=nn.Hardswish)
        self.features = nn.Sequential(stem, *blocks, last)
        self.wide = nn.Sequential(nn.Linear(6 * inputs, hidden), nn.Hardswish())

    def embed(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(pooled(self.features(x)))
        return y


# ---------------------------------------------------------------- by name

ZOO: dict[str, Callable[[int], Net]] = {
    "convnet": ConvNet,
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "efficientnet_b0": partial(EfficientNet, width=1.0, depth=1.0, dropout=0.2),
    "efficientnet_b4": partial(EfficientNet, width=1.4, depth=1.8, dropout=0.4),
    "mobilenet_v3_large": partial(MobileNetV3, rows=_LARGE, hidden=1280),
    "mobilenet_v3_small": partial(MobileNetV3, rows=_SMALL, hidden=1024),
}


def build(name: str, classes: int) -> Net:
    """A freshly initialised net (He et al., ICCV 2015, for convolutions).

    Raises:
        ConfigError: no such net, or fewer than two classes.
    """
    if name not in ZOO:
        raise ConfigError(f"net {name!r} is unknown (known: {', '.join(sorted(ZOO))}). Nothing was started.")
    if classes < 2:
        raise ConfigError(f"a classifier needs at least two classes, the data has {classes}. Nothing was started.")
    net = ZOO[name](classes)
    net.apply(_initialise)
    return net


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def parameters(net: nn.Module) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in net.parameters())
