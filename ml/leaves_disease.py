"""What eight conditions look like on a tomato leaf, by severity in 0..1. Paints in place on the blade's colours.

Appearance after the field guides: early blight (Alternaria) target rings, late blight (Phytophthora) water-soaked
blotches, leaf mold (Passalora) diffuse yellow over olive, septoria small grey-centred spots, bacterial spot dark
angular specks with halos, two-spotted spider mite stippling, mosaic virus mottling bounded by veins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from ml.leaves_render import Colours, Field, Frame, Rng, blend, noise, spots, step


def _times(field: Field, factor: float) -> Field:
    return np.asarray(field * np.float32(factor), dtype=np.float32)


def _seen(severity: float, opaque: float) -> float:
    """How opaque a lesion is: young ones are paler."""
    return opaque * min(1.0, 0.72 + 1.2 * severity)


def _sound(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    """A healthy leaf has no lesions; dirt, holes and ageing are drawn for every class alike."""


def _early_blight(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    count = 1 + int(rng.poisson(0.6 + 4.5 * severity))
    d = spots(rng, leaf, count, (0.028 + 0.02 * severity, 0.05 + 0.055 * severity), ragged=0.10)
    blend(blade, (0.66, 0.60, 0.18), _times(step(d, 2.1, 0.9), 0.65))
    blend(blade, (0.34, 0.21, 0.11), _times(step(d, 1.12, 0.92), _seen(severity, 0.93)))
    rings = np.asarray(0.5 + 0.5 * np.cos(d * np.float32(rng.uniform(15, 19))), dtype=np.float32)
    blend(blade, (0.55, 0.40, 0.24), _times(rings * step(d, 1.0, 0.8), 0.65))


def _late_blight(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    count = 1 + int(rng.poisson(0.3 + 1.5 * severity))
    d = spots(rng, leaf, count, (0.06 + 0.04 * severity, 0.09 + 0.12 * severity), ragged=0.30, where="margin")
    blend(blade, (0.52, 0.58, 0.36), _times(step(d, 1.7, 1.05), 0.72))
    blend(blade, (0.20, 0.19, 0.13), _times(step(d, 1.15, 0.8), _seen(severity, 0.88)))
    blend(blade, (0.36, 0.28, 0.19), _times(step(d + 0.3 * noise(rng, leaf.px, 14), 0.75, 0.35), 0.7))


def _leaf_mold(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    count = 2 + int(rng.poisson(1.5 + 5 * severity))
    d = spots(rng, leaf, count, (0.04, 0.06 + 0.06 * severity), ragged=0.35)
    blend(blade, (0.71, 0.70, 0.25), _times(step(d, 1.7, 0.4), 0.38 + 0.46 * severity))
    fuzz = step(d + 0.35 * noise(rng, leaf.px, 34), 0.85, 0.2)
    blend(blade, (0.44, 0.42, 0.20), _times(fuzz, 0.28 + 0.46 * severity))


def _septoria(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    count = 4 + int(rng.poisson(3 + 38 * severity))
    d = spots(rng, leaf, count, (0.010, 0.018 + 0.006 * severity))
    blend(blade, (0.24, 0.14, 0.08), _times(step(d, 1.5, 1.0), _seen(severity, 0.9)))
    blend(blade, (0.74, 0.70, 0.60), _times(step(d, 0.95, 0.5), _seen(severity, 0.95)))
    blend(blade, (0.60, 0.58, 0.22), _times(step(noise(rng, leaf.px, 5), 0.4, 1.6), 0.4 * severity))


def _bacterial_spot(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    count = 4 + int(rng.poisson(3 + 32 * severity))
    d = spots(rng, leaf, count, (0.009, 0.020 + 0.008 * severity), ragged=0.45, where="margin")
    blend(blade, (0.74, 0.70, 0.22), _times(step(d, 3.2, 1.2), 0.35 + 0.38 * severity))
    blend(blade, (0.10, 0.07, 0.05), _times(step(d, 1.5, 0.8), _seen(severity, 0.92)))


def _spider_mites(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    px = leaf.px
    where = step(0.8 * noise(rng, px, 4) - 1.1 * leaf.r + np.float32(0.9 + 1.1 * severity), 0.0, 1.4)
    dots = rng.random((px, px), dtype=np.float32) < (0.045 + 0.225 * severity) * where
    soft = np.asarray(dots, dtype=np.float32)
    blend(blade, (0.82, 0.82, 0.56), _times(soft, _seen(severity, 0.75)))
    blend(blade, (0.58, 0.47, 0.22), _times(where, 0.06 + 0.43 * severity))


def _mosaic_virus(rng: Rng, leaf: Frame, blade: Colours, severity: float) -> None:
    mottle = noise(rng, leaf.px, 11) - 1.4 * leaf.veins + 0.35 * noise(rng, leaf.px, 24)
    blend(blade, (0.66, 0.74, 0.32), _times(step(mottle, 0.0, 0.5), 0.17 + 0.54 * severity))
    blend(blade, (0.09, 0.22, 0.08), _times(step(mottle, -0.3, -0.9), 0.14 + 0.43 * severity))


PAINTERS: Final[dict[str, Callable[[Rng, Frame, Colours, float], None]]] = {
    "healthy": _sound,
    "early_blight": _early_blight,
    "late_blight": _late_blight,
    "leaf_mold": _leaf_mold,
    "septoria_spot": _septoria,
    "bacterial_spot": _bacterial_spot,
    "spider_mites": _spider_mites,
    "mosaic_virus": _mosaic_virus,
}


def soil_and_damage(rng: Rng, leaf: Frame, blade: Colours) -> Field:
    """Nuisances of every class: dirt, droplets, a burnt tip. Returns where insect holes show the background, 0..1."""
    if rng.random() < 0.45:
        d = spots(rng, leaf, int(rng.integers(1, 9)), (0.006, 0.022), ragged=0.5)
        blend(blade, (0.30, 0.23, 0.16), _times(step(d, 1.2, 0.7), float(rng.uniform(0.4, 0.85))))
    if rng.random() < 0.25:
        d = spots(rng, leaf, int(rng.integers(2, 10)), (0.010, 0.026))
        blade *= (1 - 0.25 * step(d, 1.05, 0.9))[..., None]
        blend(blade, (0.95, 0.97, 1.0), _times(step(d, 0.45, 0.2), 0.85))
    if rng.random() < 0.2:
        burnt = step(leaf.t + 0.05 * noise(rng, leaf.px, 8), 0.93 - 0.1 * rng.random(), 1.0)
        blend(blade, (0.45, 0.33, 0.17), _times(burnt, 0.8))
    if rng.random() < 0.3:
        d = spots(rng, leaf, int(rng.integers(1, 5)), (0.012, 0.045), ragged=0.3)
        blend(blade, (0.36, 0.30, 0.14), _times(step(d, 1.35, 1.05), 0.5))
        return step(d, 1.05, 0.95)
    return np.zeros((leaf.px, leaf.px), dtype=np.float32)
