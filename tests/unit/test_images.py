"""Bytes to pixels: what is decoded, what is refused, and that nothing large is allocated for a refusal."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ml import images
from ml.images import ImageRejected, decode, image_size, phash, statistics

Pixels = npt.NDArray[np.uint8]


def scene(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth random picture, as photos are."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode(data, 32, **limits)
    return caught.value.reason


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 95}),
        ("BMP", {}),
    ],
    ids=str,
)
def test_every_accepted_format_gives_the_same_square(kind, options):
    photo = scene()
    pixels = decode(encode(photo, kind, **options), 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    expected = np.asarray(photo.resize((32, 32), Image.Resampling.BOX), dtype=int)
    assert np.abs(expected - pixels).mean() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (31, 32), (33, 32), (500, 20)], ids=str)
def test_any_proportion_is_squashed_to_the_square(size):
    assert decode(encode(scene(*size)), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "LA", "RGBA", "I;16"])
def test_every_colour_mode_becomes_rgb(mode):
    kind = "JPEG" if mode in ("CMYK",) else "PNG"
    grey = scene().convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    else:
        image = (scene() if mode == "CMYK" else grey).convert(mode)
    pixels = decode(encode(image, kind), 32)
    expected = np.asarray(scene().convert("RGB" if mode == "CMYK" else "L").resize((32, 32)).convert("RGB"), dtype=int)
    assert pixels.shape == (32, 32, 3)
    assert np.abs(expected - pixels).mean() < (25 if mode == "1" else 12)  # one bit a pixel is dithered


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode(encode(clear, "PNG"), 32) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(scene(), quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(upright, dtype=int) - decode(data, 32)).mean() < 3


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(min_size=0, max_size=60))
def test_a_nonsense_exif_block_is_passed_over(noise):
    plain = encode(scene())
    block = b"Exif\0\0" + noise
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert decode(plain[:2] + segment + plain[2:], 32).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.995])
def test_a_file_that_is_cut_short_is_refused_wherever_it_is_cut(kind, share):
    data = encode(scene(200, 150), kind)
    assert reason(data[: int(len(data) * share)]) == "truncated"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cut_progressive_jpeg_is_refused(share):
    data = encode(scene(200, 150), progressive=True)
    assert reason(data[: int(len(data) * share)]) == "truncated"


def test_a_jpeg_whose_tail_was_never_written_is_refused():
    data = encode(scene(200, 150))
    assert reason(data[: len(data) // 2] + bytes(len(data) // 2)) == "truncated"


@pytest.mark.parametrize(
    "data", [b"x", b"hello " * 100, b"%PDF-1.7 ...", b"GIF89a" + bytes(50), bytes(4000), b"<html></html>"]
)
def test_what_is_no_image_is_called_so(data):
    assert reason(data) == "not_an_image"


def test_nothing_is_called_empty():
    assert reason(b"") == "empty"
    with pytest.raises(ImageRejected, match="empty"):
        image_size(b"")


def test_a_short_side_is_refused_before_decoding():
    assert reason(encode(scene(100, 30)), min_side_px=31) == "too_small"
    assert decode(encode(scene(100, 31)), 32, min_side_px=31).shape == (32, 32, 3)


def bomb_png(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def bomb_webp(side: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def bomb_jpeg(side: int) -> bytes:
    """A small JPEG whose frame header is rewritten to promise side x side pixels."""
    data = bytearray(encode(scene()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.parametrize("make", [bomb_png, bomb_webp, bomb_jpeg])
@pytest.mark.parametrize("side", [8_000, 16_000])
def test_a_decompression_bomb_is_refused_by_its_header(make, side):
    assert reason(make(side)) == "too_many_pixels"
    assert reason(make(8_000), max_pixels=63_999_999) == "too_many_pixels"


def test_a_progressive_jpeg_with_thousands_of_scans_is_refused():
    data = encode(scene(400, 400), progressive=True)
    at = data.rindex(b"\xff\xda")
    many = data[:at] + data[at:-2] * 400 + data[-2:]
    assert decode(data, 32, max_pixels=200_000).shape == (32, 32, 3)
    assert reason(many, max_pixels=200_000) == "too_many_pixels"


def test_the_size_comes_from_the_header_alone():
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        data = encode(scene(321, 123), kind)
        assert image_size(data) == (321, 123)
    assert image_size(encode(scene(321, 123))[:700]) == (321, 123)
    assert image_size(encode(scene(321, 123), "WEBP", lossless=True)) == (321, 123)


def test_a_refusal_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(ImageRejected("truncated", "cut")))  # noqa: S301
    assert (error.reason, str(error), error.exit_code) == ("truncated", "cut", 4)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_pixels_or_a_refusal_and_nothing_else(kind, flips):
    data = bytearray(encode(scene(48, 40), kind))
    for where, value in flips:
        data[int(where * len(data))] ^= value
    try:
        assert decode(bytes(data), 16, max_pixels=1_000_000).shape == (16, 16, 3)
    except ImageRejected as error:
        assert str(error)


def test_threads_decode_the_same_pixels():
    data = encode(scene(300, 200))
    expected = decode(data, 48)
    with ThreadPoolExecutor(4) as pool:
        assert all((decoded == expected).all() for decoded in pool.map(lambda _: decode(data, 48), range(40)))


def test_the_pixels_of_the_contract_do_not_change():
    """Models are bound to DECODE_CONTRACT: whoever changes these pixels changes its name."""
    assert images.DECODE_CONTRACT == "rgb-squash-area-v1"
    ramp = np.arange(48 * 32 * 3, dtype=np.uint32).reshape(32, 48, 3) * 7 % 256
    pixels = decode(encode(Image.fromarray(ramp.astype(np.uint8)), "PNG"), 8)
    expected = cv2.resize(ramp.astype(np.uint8), (8, 8), interpolation=cv2.INTER_AREA)
    assert (pixels == expected).all()


def photo(seed: int = 3) -> Pixels:
    return np.asarray(scene(64, 64, seed))


def test_statistics_are_named_and_finite():
    numbers = statistics(photo())
    assert tuple(numbers) == images.STATISTICS
    assert len(numbers) == 8
    assert all(np.isfinite(value) for value in numbers.values())


@pytest.mark.parametrize("value", [0, 128, 255])
def test_statistics_of_a_flat_picture(value):
    numbers = statistics(np.full((64, 64, 3), value, dtype=np.uint8))
    assert numbers["brightness"] == pytest.approx(value / 255, abs=0.005)
    assert numbers["contrast"] == numbers["sharpness"] == numbers["saturation"] == 0
    assert (numbers["red_green"], numbers["yellow_blue"]) == (0.5, 0.5)
    assert (numbers["shadows"], numbers["highlights"]) == (float(value == 0), float(value == 255))


def test_each_change_of_a_photo_moves_its_statistic():
    before = statistics(photo())
    darker = statistics((photo() * 0.5).astype(np.uint8))
    blurred = statistics(np.asarray(cv2.GaussianBlur(photo(), (0, 0), 3)))
    warmer = statistics(np.clip(photo() * np.array([1.2, 1.0, 0.7]), 0, 255).astype(np.uint8))
    grey = statistics(np.repeat(photo().mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8))
    assert darker["brightness"] < 0.6 * before["brightness"]
    assert darker["contrast"] < 0.6 * before["contrast"]
    assert blurred["sharpness"] < before["sharpness"]
    assert warmer["red_green"] > before["red_green"]
    assert warmer["yellow_blue"] > before["yellow_blue"]
    assert grey["saturation"] < 0.05 < before["saturation"]


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("seed", range(6))
def test_the_hash_of_a_copy_is_near_and_that_of_another_photo_far(seed):
    original = scene(300, 240, seed)
    data = encode(original, quality=95)
    copies = {
        "recompressed": encode(original, quality=40),
        "smaller": encode(original.resize((150, 120)), quality=85),
        "brighter": encode(Image.fromarray(np.clip(np.asarray(original) * 1.15, 0, 255).astype(np.uint8))),
    }
    known = phash(decode(data, 128))
    assert 0 <= known < 2**64
    for name, copy in copies.items():
        assert distance(known, phash(decode(copy, 128))) <= 8, name
    assert distance(known, phash(decode(encode(scene(300, 240, seed + 100)), 128))) > 12


def test_the_hash_takes_grey_and_colour():
    grey = cv2.cvtColor(photo(), cv2.COLOR_RGB2GRAY)
    assert phash(photo()) == phash(np.asarray(grey))
