"""Generated photos of tomato leaves: sample data with known labels, severities and shifts, the same for every seed.

One seed an image: leaf, disease, surroundings and camera come from generators of their own below it, so that the same
seed under another `shift` shows the same leaf in other conditions.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

from configs.errors import ConfigError, ExternalError
from ml import leaves_render as paint
from ml.leaves_disease import PAINTERS, soil_and_damage
from ml.leaves_render import Colours, Frame, Rng

Shift = Literal["base", "mild_light", "overexposed", "new_cultivar", "new_camera", "dusk", "blur"]
SHIFTS: Final[tuple[Shift, ...]] = (
    "base",
    "mild_light",
    "overexposed",
    "new_cultivar",
    "new_camera",
    "dusk",
    "blur",
)
# Raised whenever the same seed gives other pixels: old sample sets are then made anew.
GENERATOR: Final = "leaves-v1"
LABELS: Final = tuple(PAINTERS)
FOLDERS: Final = {label: f"Tomato___{label if label == 'healthy' else label.capitalize()}" for label in LABELS}
_SEEDS_PER_SET: Final = 1 << 32
_CHUNK: Final = 40  # images one process makes between two reports of progress


@dataclass(frozen=True, slots=True)
class Leaf:
    """One photo: rgb uint8 [px, px, 3]; label (see LABELS); severity 0..1, None when healthy; quality of its JPEG."""

    rgb: npt.NDArray[np.uint8]
    label: str
    severity: float | None
    jpeg_quality: int

    def jpeg(self) -> bytes:
        """The photo as its camera stores it."""
        bgr = cv2.cvtColor(self.rgb, cv2.COLOR_RGB2BGR)
        _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])
        return data.tobytes()


@dataclass(frozen=True, slots=True)
class _Camera:
    """Exposure as a factor, white balance as factors on red and blue, contrast exponent; blur and noise at 128 px."""

    gain: float
    red: float
    blue: float
    gamma: float
    blur_px: float
    noise: float
    sharpen: float
    jpeg_quality: int


def render(seed: int, px: int = 128, shift: Shift = "base") -> Leaf:
    """Draw the photo of `seed`, `px` wide and high. The label is `LABELS[seed % 8]`."""
    geometry, disease, scene, camera = _streams(seed)
    label = LABELS[seed % len(LABELS)]
    severity = _severity(disease)
    other = shift == "new_cultivar"
    distortion = severity if label == "mosaic_virus" else 0.0
    leaf = paint.frame(geometry, px, distortion=distortion, other_cultivar=other)
    blade = paint.tissue(geometry, leaf, other_cultivar=other)
    PAINTERS[label](disease, leaf, blade, severity)
    image = _compose(scene, leaf, blade)
    optics = _camera(camera, shift)
    return Leaf(_expose(camera, image, optics), label, None if label == "healthy" else severity, optics.jpeg_quality)


def _streams(seed: int) -> list[Rng]:
    """Independent generators for geometry, disease, scene and camera."""
    return [np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(4)]


def _severity(disease: Rng) -> float:
    """The first draw of the disease's generator: many moderate cases, some early and some late ones."""
    return float(disease.beta(1.7, 2.0))


def _compose(rng: Rng, leaf: Frame, blade: Colours) -> Colours:
    """Blade on background, with its cast shadow, holes, and shade falling over both."""
    holes = soil_and_damage(rng, leaf, blade)
    image = paint.background(rng, leaf.px)
    offset = rng.normal(0, 0.035, 2) * leaf.px
    move = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], dtype=np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(leaf.mask, move, (leaf.px, leaf.px)), (0, 0), leaf.px / 40)
    image *= (1 - np.float32(rng.uniform(0.2, 0.6)) * shadow)[..., None]
    paint.blend(image, blade, np.asarray(leaf.mask * (1 - holes), dtype=np.float32))
    if rng.random() < 0.35:
        shade = paint.step(paint.noise(rng, leaf.px, 2), -0.2, 0.35)
        image *= (1 - np.float32(rng.uniform(0.15, 0.5)) * shade)[..., None]
    return image


def _camera(rng: Rng, shift: Shift) -> _Camera:
    """Draw a camera and light. Each shift changes what its name says and leaves the rest alone."""
    gain, red, blue = (float(v) for v in np.exp(rng.normal((0.12, 0, 0), (0.16, 0.05, 0.06))))
    gamma, blur = float(np.exp(rng.normal(0, 0.08))), float(abs(rng.normal(0, 0.45)))
    noise, sharpen, quality = float(rng.uniform(0.004, 0.020)), 0.0, int(rng.integers(72, 95))
    extra = float(rng.random())
    if shift == "mild_light":
        gain, red, blue = gain * (1.12 + 0.1 * extra), red * 1.07, blue * 0.92
    elif shift == "overexposed":
        gain *= 1.5 + 0.5 * extra
    elif shift == "dusk":
        gain, red, blue, noise = gain * (0.30 + 0.12 * extra), red * 0.86, blue * 1.22, noise + 0.022
    elif shift == "blur":
        blur += 1.7 + 1.3 * extra
    elif shift == "new_camera":
        red, blue, gamma, noise = red * 0.88, blue * 1.16, gamma * 1.28, noise + 0.02
        sharpen, quality = 0.9, int(30 + 15 * extra)
    return _Camera(gain, red, blue, gamma, blur, noise, sharpen, quality)


def _expose(rng: Rng, image: Colours, optics: _Camera) -> npt.NDArray[np.uint8]:
    px = len(image)
    if (sigma := optics.blur_px * px / 128) > 0.2:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), dtype=np.float32)
    image = image * (np.array((optics.red, 1, optics.blue), dtype=np.float32) * np.float32(optics.gain))
    image = np.power(np.clip(image, 0, 1), np.float32(optics.gamma))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(optics.noise)
    if optics.sharpen:
        soft = cv2.GaussianBlur(image, (0, 0), 1.2 * px / 128)
        image += np.float32(optics.sharpen) * (image - soft)
    return np.asarray(np.clip(image * 255 + 0.5, 0, 255), dtype=np.uint8)


def generate(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    px: int = 128,
    shift: Shift = "base",
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `count` photos into class folders below `folder`, and their severities to `severity.csv`.

    The same arguments write the same bytes. A call that was cut short is finished by the same call: photos that are
    there already are kept. `workers`: processes, by default one a core.

    Raises:
        ConfigError: an argument makes no sense, or `folder` holds photos made with other arguments.
        ExternalError: the disk is full or not writable.
    """
    if count < 1 or px < 16:
        raise ConfigError(f"Cannot generate {count} photos of {px} px: at least 1 of 16 px are needed.")
    try:
        _claim(folder, recipe(count, seed=seed, px=px, shift=shift))
        _run_workers(folder, seed, count, px, shift, workers or os.cpu_count() or 1, on_progress)
        _write_severities(folder, seed, count)
    except OSError as error:
        raise ExternalError(
            f"Photos cannot be written to {folder}: {error}. Those already there are kept. "
            "Next: free disk space or make the folder writable, then run it again.",
            retryable=False,
        ) from error


def recipe(count: int, *, seed: int = 0, px: int = 128, shift: Shift = "base") -> str:
    """What names a generated set: equal text, equal photos."""
    return f"{GENERATOR} count={count} seed={seed} px={px} shift={shift}"


def _claim(folder: Path, made_by: str) -> None:
    """Note what the folder's photos are made by, once; refuse to mix them."""
    for label in FOLDERS.values():
        (folder / label).mkdir(parents=True, exist_ok=True)
    note = folder / ".generated"
    if not note.exists():
        note.write_text(made_by + "\n", encoding="utf-8")
    elif (before := note.read_text(encoding="utf-8").strip()) != made_by:
        raise ConfigError(f"{folder} holds photos of {before}; these would be {made_by}. Nothing was written.")


def _run_workers(
    folder: Path,
    seed: int,
    count: int,
    px: int,
    shift: Shift,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Share the photos among processes of their own: multiprocessing would import the caller's main module in each."""
    done, lock = 0, Lock()

    def advance(photos: int) -> None:
        nonlocal done
        with lock:
            done += photos
            if on_progress is not None:
                on_progress(done, count)

    workers = max(1, min(workers, count // _CHUNK))
    with ThreadPoolExecutor(workers) as pool:
        arguments = [str(value) for value in (folder, seed, count, px, shift, workers)]
        for finished in [pool.submit(_worker, [*arguments, str(part)], advance) for part in range(workers)]:
            finished.result()


def _worker(arguments: list[str], advance: Callable[[int], None]) -> None:
    """Run `main` below with these arguments, passing on its progress."""
    command = [sys.executable, "-m", "ml.leaves", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                advance(int(line))
            failure = process.stderr.read().strip() if process.stderr else ""
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
    if process.returncode:
        reason = failure.splitlines()[-1] if failure else f"a worker ended with {process.returncode}"
        raise OSError(reason)


def main(folder: str, seed: str, count: str, px: str, shift: Shift, workers: str, part: str) -> None:
    """Write every `workers`-th chunk of photos from chunk `part` on; prints how many after each chunk."""
    for start in range(int(part) * _CHUNK, int(count), int(workers) * _CHUNK):
        numbers = range(start, min(start + _CHUNK, int(count)))
        for number in numbers:
            _write(Path(folder), int(seed), number, int(px), shift)
        print(len(numbers), flush=True)


def _write(folder: Path, seed: int, number: int, px: int, shift: Shift) -> None:
    """Write one photo unless it is there; a photo appears whole or not at all."""
    path = folder / _name(number)
    if not path.exists():
        partial = path.with_name(f".{path.name}")
        partial.write_bytes(render(_photo_seed(seed, number), px, shift).jpeg())
        partial.replace(path)


def _photo_seed(seed: int, number: int) -> int:
    return seed * _SEEDS_PER_SET + number


def _name(number: int) -> str:
    return f"{FOLDERS[LABELS[number % len(LABELS)]]}/{number:06d}.jpg"


def _write_severities(folder: Path, seed: int, count: int) -> None:
    partial = folder / ".severity.csv"
    with partial.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("file", "severity"))
        for number in range(count):
            if LABELS[number % len(LABELS)] != "healthy":
                severity = _severity(_streams(_photo_seed(seed, number))[1])
                writer.writerow((_name(number), f"{severity:.4f}"))
    partial.replace(folder / "severity.csv")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
