"""Numbers and names as people read them. A missing or undefined number is a dash, never `nan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tasks.report.model import Bound, Unit

DASH = "–"
_KIB = 1024.0


def known(value: float | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as `94.5 %`. What is not quite all or nothing never reads as 100 % or 0 %."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value * 100:.{digits}f}"
    edge = 10**-digits
    if value < 1 and float(text) >= 100:
        text = f"> {100 - edge:.{digits}f}"
    elif value > 0 and float(text) == 0:
        text = f"< {edge:.{digits}f}"
    return f"{text} %"


def points(value: float | None) -> str:
    """A difference of shares as percentage points, `+1.3 pts`."""
    return DASH if value is None or not math.isfinite(value) else f"{_signed(value * 100, 1)} pts"


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return f"{'+' if value > 0 else '−'}{text}"


def millis(value: float | None) -> str:
    """A latency as `3.2 ms`, with two or three significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{_short(value)} ms" if value < 10_000 else f"{_short(value / 1000)} s"


def _short(value: float) -> str:
    if value and abs(value) < 0.1:
        return f"{value:.3f}"
    if abs(value) < 1:
        return f"{value:.2f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes as `412 KiB`."""
    if value is None or not math.isfinite(value):
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < _KIB or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= _KIB
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds as `0.4 s`, `42 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None) -> str:
    """A plain number, with as many digits as it deserves."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def count(value: int, noun: str, plural: str = "") -> str:
    """`1 look`, `1,204 requests`."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def in_unit(value: float | None, unit: Unit) -> str:
    """A gate's value in its unit."""
    if unit == "share":
        return percent(value)
    if unit == "ms":
        return millis(value)
    return size(value) if unit == "bytes" else number(value)


_SIGNS: Mapping[Bound, str] = {"at_least": "≥", "at_most": "≤", "equal": "="}


def limit(value: float | None, bound: Bound, unit: Unit) -> str:
    """A gate's limit, `≥ 80.0 %`."""
    return f"{_SIGNS[bound]} {in_unit(value, unit)}" if known(value) else DASH


def moment(at: datetime) -> str:
    """`2026-11-23 07:30:18 UTC`."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def clock(at: datetime) -> str:
    """`07:30:18`, for lines that stand under a date."""
    return at.astimezone(UTC).strftime("%H:%M:%S")


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys and readable values, in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        rows += flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, plain(value))]
    return rows


def plain(value: Any) -> str:
    """Any configuration value as text."""
    if value is None or value == "" or (isinstance(value, (Mapping, list, tuple)) and not value):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else DASH
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value)
    return str(value)
