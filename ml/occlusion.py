"""Which parts of a photo a prediction rests on, by hiding them one after the other. Runs on the deployed file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ml.predictor import Predictor

Floats = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]
_PATCHES = 8  # the patch is an eighth of the side ...
_STRIDES = 2  # ... and moves by half of itself
_BATCH = 32


def occlusion(predictor: Predictor, image: Image, target: int) -> Floats:
    """Drop of the probability of class `target` when a place is hidden, [px, px], from `image` uint8 [px, px, 3].

    Positive: the place speaks for the class. Hidden means the photo's mean colour, softened at the patch's edge so that
    the edge itself is no clue. Source: Zeiler and Fergus, ECCV 2014.
    """
    px = image.shape[0]
    masks = _masks(px)
    base = float(predictor.run(image[None]).probs[0, target])
    drops = np.concatenate(
        [
            base - predictor.run(_hidden(image, masks[i : i + _BATCH])).probs[:, target]
            for i in range(0, len(masks), _BATCH)
        ]
    )
    weight = masks.sum(axis=0)
    total = np.tensordot(drops, masks, axes=1)
    return np.asarray(total / np.maximum(weight, 1e-6), dtype=np.float32)


def _masks(px: int) -> Floats:
    """Soft square windows [windows, px, px] in [0, 1] that cover the photo."""
    patch = max(2, px // _PATCHES)
    centres = np.arange(0, px + 1, max(1, patch // _STRIDES))
    line = np.arange(px) + 0.5
    # 1 inside the patch, falling to 0 over a quarter of it
    windows = np.clip((patch / 2 - np.abs(line[None] - centres[:, None])) / (patch / 4) + 1.0, 0.0, 1.0)
    return np.asarray(np.einsum("ax,by->abxy", windows, windows).reshape(-1, px, px), dtype=np.float32)


def _hidden(image: Image, masks: Floats) -> Image:
    mean = image.reshape(-1, 3).mean(axis=0)
    mixed = image[None] * (1.0 - masks[..., None]) + mean * masks[..., None]
    return np.asarray(np.round(mixed), dtype=np.uint8)
