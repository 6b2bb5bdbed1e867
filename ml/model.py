"""The net together with its preprocessing: one module for training, validation and export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ml.net import Net

# Channel means and deviations of ImageNet in [0, 255]: published weights expect them.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Preprocess(nn.Module):
    """Pixels [N, H, W, 3] in [0, 255], uint8 or float, to normalised float images [N, 3, H, W]."""

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        scale = 1.0 / torch.tensor(STD)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", (-torch.tensor(MEAN) * scale).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """A permuted NHWC tensor already has the strides of channels_last: no copy is made."""
        return torch.addcmul(self.offset, images.permute(0, 3, 1, 2).float(), self.scale)


class ImageModel(nn.Module):
    """Logits of pixels. Its state dict holds the net's under `net.`; the preprocessing has no weights."""

    def __init__(self, net: Net, *, channels_last: bool = True) -> None:
        super().__init__()
        self.preprocess = Preprocess()
        self.net = net
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # stubs lack the keyword form

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of pixels [N, H, W, 3]."""
        x = self.preprocess(images).contiguous(memory_format=self.memory_format)
        logits: Tensor = self.net(x)
        return logits
