"""One way from bytes to pixels, shared by import, training and serving; and cheap numbers about an image.

Colours are taken as sRGB (embedded profiles are ignored), transparency lies on white, EXIF orientation is applied.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Final, Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from configs.errors import IntegrityError

# Images are worked on by several threads and processes of ours; OpenCV's own pool would only get in their way.
cv2.setNumThreads(1)

Pixels = npt.NDArray[np.uint8]
Reason = Literal["empty", "not_an_image", "truncated", "too_small", "too_many_pixels"]

# Part of a model's contract: a model is only run on pixels made by the function it was trained with. The photo is
# squashed to a square: JPEG by the codec's scaled decoding to the smallest size that still covers it, the rest by area.
DECODE_CONTRACT: Final = "rgb-squash-area-v1"

STATISTICS: Final = (
    "brightness",
    "contrast",
    "sharpness",
    "saturation",
    "red_green",
    "yellow_blue",
    "shadows",
    "highlights",
)

_JPEG_MAGIC: Final = b"\xff\xd8\xff"
# A progressive JPEG may revisit all its pixels in each of thousands of tiny scans: encoders write about ten.
_MAX_SCANS: Final = 16
# Warnings of the codec about files that are nevertheless whole (Samsung phones write such scan headers).
_HARMLESS: Final = "Invalid SOS parameters"
_OTHER_FORMATS: Final = ("PNG", "WEBP", "BMP")
# What Pillow's parsers raise on hostile bytes, beside its own OSError and SyntaxError.
_PILLOW_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageRejected(IntegrityError):  # noqa: N818  (reads as what happened)
    """These bytes are not an image this project accepts. `reason` is for machines, the message for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[object, ...]:  # decoded in other processes
        return (ImageRejected, (self.reason, str(self)))


@dataclass(frozen=True, slots=True)
class _Header:
    """Facts known before any pixel is decoded. `fast`: simplejpeg reads it."""

    width: int
    height: int
    fast: bool


def decode(data: bytes, px: int, *, max_pixels: int = 50_000_000, min_side_px: int = 1) -> Pixels:
    """Decode a JPEG, PNG, WebP or BMP to RGB of shape [px, px, 3], squashed to the square.

    Size limits are checked on the header, before anything is allocated. Threads run in parallel: the codec and the
    resize release the GIL.

    Raises:
        ImageRejected: empty, no image, cut short or damaged, a side under `min_side_px`, over `max_pixels`.
    """
    header = _header(data)
    _check_limits(data, header, max_pixels, min_side_px)
    rgb = _decode_jpeg(data, px) if header.fast else _decode_other(data)
    return _orient(_squash(rgb, px), _orientation(data))


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels as stored (before EXIF orientation), from the header only.

    Raises:
        ImageRejected: empty, not an image, or its header is cut.
    """
    header = _header(data)
    return header.width, header.height


def _header(data: bytes) -> _Header:
    if not data:
        raise ImageRejected("empty", "The file is empty (0 bytes).")
    if not data.startswith(_JPEG_MAGIC):
        return _other_header(data)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # rare subsamplings and lossless files, which Pillow may read; or a cut header
        return _other_header(data, formats=("JPEG",))
    return _Header(width, height, fast=colours not in ("CMYK", "YCCK"))


def _other_header(data: bytes, formats: tuple[str, ...] = _OTHER_FORMATS) -> _Header:
    if size := _webp_size(data):  # Pillow allocates WebP's whole canvas when it opens one
        return _Header(*size, fast=False)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            return _Header(image.width, image.height, fast=False)
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_many_pixels", f"The header promises too many pixels: {error}.") from error
    except _PILLOW_ERRORS as error:
        raise _unreadable(data, error) from error


def _unreadable(data: bytes, error: BaseException) -> ImageRejected:
    known = (_JPEG_MAGIC, b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM")
    if data.startswith(known):
        return ImageRejected("truncated", f"The image is cut short or damaged: {error}.")
    return ImageRejected("not_an_image", "The bytes are no JPEG, PNG, WebP or BMP image.")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas of a WebP (RFC 9649, sections 2.4-2.7); None for other bytes."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _check_limits(data: bytes, header: _Header, max_pixels: int, min_side_px: int) -> None:
    width, height = header.width, header.height
    if min(width, height) < min_side_px:
        raise ImageRejected("too_small", f"{width} x {height} pixels: a side is under {min_side_px}.")
    if width * height > max_pixels:
        raise ImageRejected("too_many_pixels", f"{width} x {height} pixels are more than {max_pixels:,}.")
    if data.startswith(_JPEG_MAGIC) and width * height * (scans := data.count(b"\xff\xda")) > _MAX_SCANS * max_pixels:
        raise ImageRejected("too_many_pixels", f"{width} x {height} pixels in {scans} scans are too much work.")


def _decode_jpeg(data: bytes, px: int) -> Pixels:
    try:
        return _simplejpeg(data, px, strict=True)
    except ValueError as error:
        whole = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
        if not (str(error).startswith(_HARMLESS) and whole):
            raise ImageRejected("truncated", f"The image is cut short or damaged: {error}.") from error
    return _simplejpeg(data, px, strict=False)


def _simplejpeg(data: bytes, px: int, *, strict: bool) -> Pixels:
    # min_* asks for the smallest of the codec's scales (1/8 steps) that still covers the square.
    return np.asarray(simplejpeg.decode_jpeg(data, "RGB", min_height=px, min_width=px, strict=strict), dtype=np.uint8)


def _decode_other(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=(*_OTHER_FORMATS, "JPEG")) as image:
            image.load()
            return np.asarray(_to_rgb(image), dtype=np.uint8)
    except Image.DecompressionBombError as error:
        raise ImageRejected("too_many_pixels", f"The header promises too many pixels: {error}.") from error
    except _PILLOW_ERRORS as error:
        raise _unreadable(data, error) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip instead of scaling
        deep = np.asarray(image, dtype=np.uint32) >> 8
        return Image.fromarray(np.minimum(deep, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _squash(rgb: Pixels, px: int) -> Pixels:
    height, width = rgb.shape[:2]
    if (height, width) == (px, px):
        return rgb
    # Area averages when shrinking; where a side must grow it would repeat pixels, so interpolate there.
    how = cv2.INTER_AREA if min(height, width) >= px else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(rgb, (px, px), interpolation=how), dtype=np.uint8)


def _orient(rgb: Pixels, orientation: int) -> Pixels:
    """Turn a square as EXIF orientation 1-8 says (Exif 2.32, tag 0x0112)."""
    if orientation == 1:
        return rgb
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG; 1 (upright) when it states none, or nonsense. Other formats are taken as upright."""
    tiff = _exif(data) if data.startswith(_JPEG_MAGIC) else b""
    if len(tiff) < 14 or tiff[:2] not in (b"II", b"MM"):
        return 1
    order = "<" if tiff[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == 0x0112:
            return value if 1 <= value <= 8 else 1
    return 1


def _exif(data: bytes) -> bytes:
    """The TIFF block of a JPEG's EXIF segment, or nothing."""
    at = 2
    while at + 10 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 10 : at + 2 + length]
        at += 2 + length
    return b""


def statistics(rgb: Pixels) -> dict[str, float]:
    """Eight numbers in 0..1 (sharpness: open-ended) that light, focus, camera and colour shifts move.

    brightness and contrast: mean and deviation of grey; sharpness: deviation of the Laplacian; saturation: mean of
    max - min; red_green and yellow_blue: opponent colour means (0.5 is neutral); shadows and highlights: share of grey
    under 20 and over 235 of 255. `rgb`: [height, width, 3]; comparable only between images of one size.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    mean, deviation = cv2.meanStdDev(grey)
    _, edges = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    red, green, blue, _ = cv2.mean(rgb)
    r, g, b = cv2.split(rgb)
    spread = cv2.subtract(cv2.max(cv2.max(r, g), b), cv2.min(cv2.min(r, g), b))
    return {
        "brightness": float(mean[0, 0]) / 255,
        "contrast": float(deviation[0, 0]) / 255,
        "sharpness": float(edges[0, 0]) / 255,
        "saturation": cv2.mean(spread)[0] / 255,
        "red_green": 0.5 + (red - green) / 510,
        "yellow_blue": 0.5 + ((red + green) / 2 - blue) / 510,
        "shadows": float(np.count_nonzero(grey < 20)) / grey.size,
        "highlights": float(np.count_nonzero(grey > 235)) / grey.size,
    }


def phash(image: Pixels) -> int:
    """64-bit perceptual hash of RGB or grey pixels: signs of the 8 x 8 lowest DCT terms of a 32 x 32 grey thumbnail,
    against their median. Re-encoded, resized and relit copies differ in a few bits (Zauner, 2010, section 3.2.1).
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = np.asarray(cv2.dct(small))[:8, :8]
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
