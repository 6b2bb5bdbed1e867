"""Numbers and names as people read them. A missing or undefined number is a dash, never `nan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tasks.report.model import Bound, GateRow, Unit

DASH = "–"
# Odds above this tell nobody more.
MOST_ODDS = 1_000_000
_MOST_LOG_ODDS = math.log(MOST_ODDS)
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


def difference_allowed(limit: float | None, reference: float | None, unit: Unit) -> str:
    """How far above the other side's value a limit lies, `+1.0 pts` or `2.0 ×`; empty where nothing is compared."""
    if limit is None or reference is None or not (known(limit) and known(reference)):
        return ""
    if unit == "share":
        return points(limit - reference)
    return f"{limit / reference:.1f} ×" if reference > 0 else ""


def gate_state(row: GateRow) -> tuple[str, str]:
    """What a gate says, and its mood: `good`, `bad`, `warn` or `calm`. Silence is not called health."""
    if row.dry_run:
        return ("– only reported: harm" if row.ok is False else "– only reported"), "calm"
    if row.ok is None:
        return "– too few samples", "calm"
    if not row.by_evidence:
        return ("✓ passed", "good") if row.ok else ("✕ broken", "bad")
    if row.ok:
        return "✓ no harm shown", "good"
    return ("✕ harm", "bad") if row.critical else ("! harm, not critical", "warn")


def gate_evidence(row: GateRow) -> str:
    """A gate's odds for harm; a dash where it has none to give."""
    return odds(row.log_evidence) if row.by_evidence and row.samples else DASH


def interval(low: float | None, high: float | None, unit: Unit) -> str:
    """`2.8 to 5.7 %`; open where an end is not known."""
    if known(low) and known(high):
        first, last = in_unit(low, unit), in_unit(high, unit)
        shared = first.removesuffix(" %") if last.endswith(" %") else first
        return f"{shared} to {last}".replace("-", "\N{MINUS SIGN}")
    if known(low):
        return f"from {in_unit(low, unit)}"
    return f"up to {in_unit(high, unit)}" if known(high) else DASH


def odds(log: float | None) -> str:
    """Evidence, given as a natural logarithm, as `412:1`. Less than even is no evidence for harm."""
    if log is None or math.isnan(log) or log < 0:
        return "below 1:1"
    if log >= _MOST_LOG_ODDS:
        return f"over {MOST_ODDS:,}:1"
    value = math.exp(log)
    return f"{value:,.0f}:1" if value >= 10 else f"{value:.1f}:1".replace(".0:", ":")


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
