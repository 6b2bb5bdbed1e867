"""Random changes of a batch of images, in torch, on whatever device the batch lies."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.training import AugmentConfig


def draw(px: int, config: AugmentConfig, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Draw what the images of a batch share: source rows, source columns, and whether to swap the two.

    It uses the CPU's generator, so nothing waits for the device.
    """
    rows, columns = (_line(px, config).to(device, non_blocking=True) for _ in range(2))
    return rows, columns, config.transpose and _coin()


def augment(
    images: Tensor, rows: Tensor, columns: Tensor, transpose: bool, gain: float, white_balance: float
) -> Tensor:
    """Change pixels [N, px, px, 3] uint8; returns float pixels in [0, 255] of the same shape.

    Randomness comes from torch's default generators, which the trainer seeds by step: a resumed run repeats it.
    A batch shares its geometry, which moves bytes and costs a tenth of drawing it for each image (the batches
    themselves are random); exposure and colour differ between images.
    """
    moved = images.index_select(1, rows).index_select(2, columns)
    coloured = _colour(moved, gain, white_balance)
    return coloured.transpose(1, 2) if transpose else coloured


def _line(px: int, config: AugmentConfig) -> Tensor:
    """Source indices of a line of pixels: shifted, reflected at the borders, and backwards half of the time."""
    reach, last = int(px * config.shift), px - 1
    offset = int(torch.randint(-reach, reach + 1, ()))
    line = last - (last - (torch.arange(px) + offset).abs()).abs()
    return line.flip(0) if config.flips and _coin() else line


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)


def _colour(images: Tensor, gain: float, white_balance: float) -> Tensor:
    """Exposure by image and white balance by channel; what leaves [0, 255] is clipped, as a sensor does."""
    n, px = images.shape[0], images.shape[2]
    exposure = 1.0 + gain * (2.0 * torch.rand(n, 1, device=images.device) - 1.0)
    balance = 1.0 + white_balance * (2.0 * torch.rand(n, 3, device=images.device) - 1.0)
    # Whole lines as the last axis: a factor a channel would give the processor vectors of three.
    factor = (exposure * balance).repeat(1, px).unsqueeze(1)
    return images.flatten(2).float().mul_(factor).clamp_(0.0, 255.0).reshape(images.shape)
