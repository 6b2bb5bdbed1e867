"""Paint one leaf: geometry, background, disease, dirt. Pure functions of a random generator; see `ml.leaves`.

Everything on the leaf is a field in leaf coordinates: t runs along the midrib (0 stalk, 1 tip), v across it, both in
leaf lengths; r = |v| / half-width (0 midrib, 1 margin). Colours are float32 RGB in 0..1, before the camera.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]  # [px, px]
Colours = npt.NDArray[np.float32]  # [px, px, 3]
Rng = np.random.Generator
Rgb = tuple[float, float, float]

_FAR: Final = 9.0  # distance, in spot radii, of a pixel that no spot is near to
_DARK_GREEN: Final = np.array((0.13, 0.29, 0.10), dtype=np.float32)
_LIGHT_GREEN: Final = np.array((0.40, 0.56, 0.20), dtype=np.float32)
_BLUE_GREEN: Final = np.array((0.17, 0.33, 0.24), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Frame:
    """Geometry of one leaf: fields [px, px], and what turns (t, v) back into pixels."""

    px: int
    t: Field
    v: Field
    r: Field
    mask: Field
    veins: Field
    length: float
    angle: float
    centre: tuple[float, float]
    bend: float
    half_width: tuple[float, float, float]

    def pixel(self, t: float, q: float) -> tuple[float, float]:
        """Pixel (x, y) of the point at `t`, at share `q` (-1..1) of the half-width."""
        width, a, b = self.half_width
        v = q * width * _outline(np.float32(t), a, b) + self.bend * (t - 0.5) ** 2
        along, across = (t - 0.5) * self.length, float(v) * self.length
        x = self.centre[0] + along * np.cos(self.angle) - across * np.sin(self.angle)
        y = self.centre[1] + along * np.sin(self.angle) + across * np.cos(self.angle)
        return float(x + 1) * self.px / 2, float(y + 1) * self.px / 2


@functools.lru_cache(maxsize=4)
def _grid(px: int) -> tuple[Field, Field]:
    side = (np.arange(px, dtype=np.float32) + 0.5) * (2 / px) - 1
    x, y = np.meshgrid(side, side)
    return x, y


def noise(rng: Rng, px: int, cells: int) -> Field:
    """Smooth noise, about standard normal, with `cells` bumps across the image."""
    coarse = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    smooth = cv2.resize(coarse, (px, px), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth, dtype=np.float32)


def step(field: Field, low: float, high: float) -> Field:
    """0 below `low`, 1 above `high`, smooth between; with low > high the other way round."""
    x = np.clip((field - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return np.asarray(x * x * (3 - 2 * x), dtype=np.float32)


def blend(image: Colours, colour: Rgb | Colours | npt.NDArray[np.float32], alpha: Field) -> None:
    """Lay `colour` over `image` in place, `alpha` opaque."""
    image += alpha[..., None] * (np.asarray(colour, dtype=np.float32) - image)


def _outline(t: np.float32 | Field, a: float, b: float) -> np.float32 | Field:
    """Half-width along the midrib, t^a (1-t)^b with its maximum at 1."""
    peak = (a / (a + b)) ** a * (b / (a + b)) ** b
    return np.asarray(np.power(t, a) * np.power(1 - t, b) / peak, dtype=np.float32)


def frame(rng: Rng, px: int, *, distortion: float, other_cultivar: bool) -> Frame:
    """Draw the geometry of one leaf. `distortion` 0..1 crumples its outline (mosaic virus does)."""
    x, y = _grid(px)
    angle = float(rng.uniform(-np.pi, np.pi))
    length = float(rng.uniform(1.55, 2.0))
    centre = (float(rng.normal(0, 0.07)), float(rng.normal(0, 0.07)))
    bend = float(rng.normal(0, 0.16))
    width = float(rng.uniform(0.26, 0.37) if not other_cultivar else rng.uniform(0.17, 0.24))
    a, b = float(rng.uniform(0.5, 0.8)), float(rng.uniform(0.75, 1.15))
    dx, dy = x - centre[0], y - centre[1]
    cos, sin = np.float32(np.cos(angle) / length), np.float32(np.sin(angle) / length)
    t = dx * cos + dy * sin + np.float32(0.5)
    v = dy * cos - dx * sin - np.float32(bend) * (t - 0.5) ** 2
    inside = np.clip(t, 1e-4, 1 - 1e-4)
    half = np.float32(width) * _outline(inside, a, b) * _margin(rng, inside, v, distortion, other_cultivar)
    edge = (half - np.abs(v)) * np.float32(length * px / 2)
    mask = np.clip(edge + 0.5, 0, 1) * ((t > 0) & (t < 1))
    stalk = np.clip((np.float32(0.013) - np.abs(v)) * np.float32(length * px / 2) + 0.5, 0, 1)
    mask = np.maximum(mask, stalk * ((t > -0.14) & (t < 0.1)))
    r = np.abs(v) / np.maximum(half, 1e-3)
    veins = _veins(rng, t, v, r)
    return Frame(
        px, t, v, np.asarray(r), np.asarray(mask, np.float32), veins, length, angle, centre, bend, (width, a, b)
    )


def _margin(rng: Rng, t: Field, v: Field, distortion: float, other_cultivar: bool) -> Field:
    """Lobes and teeth as a factor on the half-width; both sides differ."""
    side = np.sign(v)
    lobes = rng.uniform(0.10, 0.22) if other_cultivar else rng.uniform(0.0, 0.12)
    lobe = np.abs(np.sin(np.pi * rng.integers(3, 6) * t + side * rng.uniform(0, 0.5)))
    teeth = np.abs((t * rng.uniform(14, 22) + side * rng.uniform(0, 0.4)) % 1 - 0.5)
    crumple = np.sin(t * rng.uniform(14, 20) + side * rng.uniform(0, 3)) * distortion * 0.13
    return np.asarray(1 - lobes * lobe - rng.uniform(0.02, 0.11) * teeth + crumple, dtype=np.float32)


def _veins(rng: Rng, t: Field, v: Field, r: Field) -> Field:
    """Midrib and paired side veins as ridges in 0..1."""
    width = np.abs(v)
    pairs, slope = rng.uniform(6, 10), rng.uniform(0.5, 1.0)
    phase = (t - np.float32(slope) * width) * np.float32(pairs) + np.sign(v) * np.float32(0.22)
    apart = np.abs(phase % 1 - 0.5) * np.float32(1 / pairs)
    side = np.exp(-((apart / np.float32(0.007)) ** 2)) * np.clip(1.1 - r, 0, 1)
    middle = np.exp(-((width / (0.011 * np.clip(1.3 - t, 0.3, 1.3))) ** 2))
    return np.asarray(np.maximum(0.6 * side, middle), dtype=np.float32)


def background(rng: Rng, px: int, *, only: tuple[int, ...] = (0, 1, 2, 3)) -> Colours:
    """Soil, other foliage, a bench, or straw; out of focus to a random degree."""
    kind = int(rng.choice(only))
    image = (_soil, _foliage, _bench, _straw)[kind](rng, px)
    sigma = float(rng.uniform(0.3, 2.2)) * px / 128
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)


def _tinted(rng: Rng, base: Rgb, spread: float, light: Field) -> Colours:
    hue = rng.normal(0, 0.35 * spread, 3) + rng.normal(0, spread)
    colour = np.clip(np.asarray(base, dtype=np.float32) + hue.astype(np.float32), 0.03, 0.9)
    return np.asarray(colour * (1 + light[..., None]), dtype=np.float32)


def _soil(rng: Rng, px: int) -> Colours:
    crumbs = 0.20 * noise(rng, px, 6) + 0.20 * noise(rng, px, 22) + 0.22 * noise(rng, px, 60)
    return _tinted(rng, (0.32, 0.24, 0.17), 0.035, crumbs)


def _foliage(rng: Rng, px: int) -> Colours:
    image = _tinted(rng, (0.20, 0.32, 0.13), 0.04, 0.35 * noise(rng, px, 5) + 0.2 * noise(rng, px, 14))
    patches = noise(rng, px, 7)
    blend(image, (0.36, 0.46, 0.20), 0.6 * step(patches, 0.5, 0.9))
    blend(image, (0.05, 0.10, 0.05), 0.7 * step(patches, -0.6, -1.1))
    return image


def _bench(rng: Rng, px: int) -> Colours:
    x, y = _grid(px)
    angle = rng.uniform(0, np.pi)
    across = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    grain = 0.05 * np.sin(across * np.float32(rng.uniform(40, 90)) + 2 * noise(rng, px, 4))
    gaps = np.exp(-((((across * rng.uniform(1.0, 2.2) + rng.uniform(0, 1)) % 1 - 0.5) / 0.018) ** 2))
    base: Rgb = (0.55, 0.50, 0.44) if rng.random() < 0.5 else (0.62, 0.62, 0.62)
    return _tinted(rng, base, 0.04, np.asarray(grain + 0.07 * noise(rng, px, 5) - 0.6 * gaps, dtype=np.float32))


def _straw(rng: Rng, px: int) -> Colours:
    image = _tinted(rng, (0.42, 0.35, 0.19), 0.03, 0.3 * noise(rng, px, 10))
    ends = rng.uniform(-0.2, 1.2, (60, 2)) * px
    turn = rng.uniform(0, np.pi, 60)
    reach = rng.uniform(0.2, 0.6, 60) * px
    shade = rng.uniform(0.7, 1.35, 60)
    for (x, y), angle, size, light in zip(ends, turn, reach, shade, strict=True):
        end = (int(x + size * np.cos(angle)), int(y + size * np.sin(angle)))
        cv2.line(
            image, (int(x), int(y)), end, (0.66 * light, 0.56 * light, 0.32 * light), max(1, px // 64), cv2.LINE_AA
        )
    return image


def tissue(rng: Rng, leaf: Frame, *, other_cultivar: bool) -> Colours:
    """A sound leaf blade: green of its own shade, veins, relief, a fold along the midrib, a bit of ageing."""
    px = leaf.px
    shade = float(rng.beta(2, 2))
    green = (1 - shade) * _DARK_GREEN + shade * (_BLUE_GREEN if other_cultivar else _LIGHT_GREEN)
    green = green * (1 + rng.normal(0, 0.06, 3).astype(np.float32))
    grain = 0.06 * noise(rng, px, 5) + 0.05 * noise(rng, px, 40)
    image = np.asarray(green * (1 + grain[..., None]), dtype=np.float32)
    pale = np.array((0.55, 0.45, 0.42) if other_cultivar else (0.52, 0.62, 0.36), dtype=np.float32)
    blend(image, pale, np.asarray(leaf.veins * np.float32(rng.uniform(0.25, 0.6)), np.float32))
    age = float(rng.beta(1.2, 6)) * step(leaf.r + 0.25 * noise(rng, px, 4), 0.55, 1.15)
    blend(image, (0.62, 0.60, 0.20), np.asarray(age, dtype=np.float32))
    image *= _relief(rng, leaf)[..., None]
    return image


def _relief(rng: Rng, leaf: Frame) -> Field:
    """Light and shade from the blade's bumps, veins and fold, as a factor."""
    height = 0.5 * noise(rng, leaf.px, 7) - 0.55 * leaf.veins
    slope_x, slope_y = cv2.Sobel(height, cv2.CV_32F, 1, 0), cv2.Sobel(height, cv2.CV_32F, 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (slope_x * np.float32(np.cos(angle)) + slope_y * np.float32(np.sin(angle))) * np.float32(leaf.px / 128)
    fold = rng.normal(0, 0.11) * np.tanh(leaf.v * 40)
    return np.asarray(np.clip(1 + 0.16 * slope + fold, 0.4, 1.7), dtype=np.float32)


def spots(
    rng: Rng, leaf: Frame, count: int, radius: tuple[float, float], *, ragged: float = 0.0, where: str = "anywhere"
) -> Field:
    """Distance to the nearest of `count` spots, in radii of that spot (1 is its margin), [px, px].

    `radius`: range in leaf lengths. `ragged`: how far margins wander, in radii. `where`: anywhere, margin, midrib.
    """
    distance = np.full((leaf.px, leaf.px), _FAR, dtype=np.float32)
    wander = ragged * noise(rng, leaf.px, 18) if ragged else None
    sizes = rng.uniform(*radius, count) * leaf.length * leaf.px / 2
    for (x, y), size, stretch in zip(
        _places(rng, leaf, count, where), sizes, rng.uniform(0.75, 1.33, count), strict=True
    ):
        _stamp(distance, x, y, max(0.8, float(size)), float(stretch))
    if wander is not None:
        distance += wander * (distance < _FAR)
    return distance


def _places(rng: Rng, leaf: Frame, count: int, where: str) -> list[tuple[float, float]]:
    along = rng.uniform(0.08, 0.94, count)
    across = rng.uniform(-0.88, 0.88, count)
    if where == "margin":
        across = np.sign(across) * rng.beta(4, 1.6, count) * 0.95
    elif where == "midrib":
        across = np.sign(across) * rng.beta(1.3, 3, count)
    return [leaf.pixel(float(t), float(q)) for t, q in zip(along, across, strict=True)]


def _stamp(distance: Field, x: float, y: float, size: float, stretch: float) -> None:
    """Lower `distance` to that of one elliptic spot, in a window of four radii."""
    px = len(distance)
    reach = int(4 * size) + 2
    x0, x1 = max(0, int(x) - reach), min(px, int(x) + reach)
    y0, y1 = max(0, int(y) - reach), min(px, int(y) + reach)
    if x0 >= x1 or y0 >= y1:
        return
    across = (np.arange(x0, x1, dtype=np.float32) + 0.5 - x) / (size * stretch)
    down = (np.arange(y0, y1, dtype=np.float32) + 0.5 - y) * stretch / size
    window = distance[y0:y1, x0:x1]
    np.minimum(window, np.sqrt(across[None, :] ** 2 + down[:, None] ** 2, dtype=np.float32), out=window)
