"""A CSV file of labels, checked strictly: every bad line is named, and a file with one is refused as a whole.

Columns: `request_id`, `label` and `source` (who says so); `received_at` where it was not just now; `version`,
`predicted` and `predicted_at` where the answer is known, else all three are looked up. Times are ISO 8601 with an
offset.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from configs.errors import ConfigError
from ml.version import is_version

REQUIRED: Final = ("request_id", "label", "source")
ANSWER: Final = ("version", "predicted", "predicted_at")
OPTIONAL: Final = ("received_at", *ANSWER)
# What the service accepts or makes as an id.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_MAX_TEXT: Final = 200
_CLOCK_SKEW: Final = timedelta(minutes=5)
_SHOWN_PROBLEMS: Final = 20


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service answered: which version, which class, when."""

    version: str
    predicted: str
    predicted_at: datetime


@dataclass(frozen=True, slots=True)
class Label:
    """One line of a file. `answer` None: the file does not say, the inference log does."""

    line: int
    request_id: str
    label: str
    source: str
    received_at: datetime
    answer: Answer | None = None


class _LineError(ValueError):
    """What is wrong with a line."""


def read_labels(path: Path, now: datetime) -> list[Label]:
    """Read every line; `now` is when labels without `received_at` arrived.

    Raises:
        ConfigError: the file cannot be read, or lines are wrong; it names them.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            labels, problems = _parse(csv.DictReader(file, strict=True), now)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV: {error}. Nothing was imported.") from error
    refuse(path, [*problems, *_repeated(labels)])
    if not labels:
        raise ConfigError(f"{path} holds no labels. Nothing was imported.")
    return labels


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raise ConfigError that lists the problems, if there are any."""
    if not problems:
        return
    shown = list(problems[:_SHOWN_PROBLEMS])
    if more := len(problems) - len(shown):
        shown.append(f"and {more} more")
    raise ConfigError(f"{path}: nothing was imported.\n" + "\n".join(f"  {problem}" for problem in shown))


def _parse(reader: csv.DictReader[str], now: datetime) -> tuple[list[Label], list[str]]:
    columns = list(reader.fieldnames or ())
    if wrong := list(_wrong_columns(columns)):
        return [], wrong
    labels, problems = [], []
    for cells in reader:
        try:
            labels.append(_label(reader.line_num, cells, now))
        except _LineError as error:
            problems.append(f"line {reader.line_num}: {error}")
    return labels, problems


def _wrong_columns(columns: Sequence[str]) -> Iterator[str]:
    known = (*REQUIRED, *OPTIONAL)
    if missing := [name for name in REQUIRED if name not in columns]:
        yield f"line 1: the column {', '.join(missing)} is missing (columns: {', '.join(known)})"
    if strange := [name for name in columns if name not in known]:
        yield f"line 1: unknown column {', '.join(strange)} (columns: {', '.join(known)})"
    if len(set(columns)) != len(columns):
        yield "line 1: a column is there twice"
    if any(name in columns for name in ANSWER) and not all(name in columns for name in ANSWER):
        yield f"line 1: {', '.join(ANSWER)} belong together"


def _label(line: int, cells: dict[str, str], now: datetime) -> Label:
    if None in cells or None in cells.values():
        raise _LineError("it has more or fewer cells than the header")
    texts = {name: cells[name].strip() for name in cells}
    for name in REQUIRED:
        if not texts[name] or len(texts[name]) > _MAX_TEXT or not texts[name].isprintable():
            raise _LineError(f"{name} must be 1 to {_MAX_TEXT} printable characters")
    if not _REQUEST_ID.fullmatch(texts["request_id"]):
        raise _LineError(f"{texts['request_id']!r} is not a request id")
    received_at = _time("received_at", texts["received_at"]) if texts.get("received_at") else now
    if received_at > now + _CLOCK_SKEW:
        raise _LineError(f"received_at {received_at.isoformat()} lies in the future")
    return Label(line, texts["request_id"], texts["label"], texts["source"], received_at, _answer(texts, received_at))


def _answer(texts: dict[str, str], received_at: datetime) -> Answer | None:
    given = [name for name in ANSWER if texts.get(name)]
    if not given:
        return None
    if len(given) < len(ANSWER):
        raise _LineError(f"{', '.join(ANSWER)} belong together: give all or none")
    if not is_version(texts["version"]):
        raise _LineError(f"{texts['version']!r} is not a model version; versions look like v1.3.0")
    answer = Answer(texts["version"], texts["predicted"], _time("predicted_at", texts["predicted_at"]))
    if answer.predicted_at > received_at + _CLOCK_SKEW:
        raise _LineError("predicted_at lies after received_at: nobody labels an answer before it is given")
    return answer


def _time(name: str, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise _LineError(f"{name} {text!r} is not a time such as 2026-01-31T12:00:00+05:30") from None
    if time.tzinfo is None:
        raise _LineError(f"{name} {text!r} has no offset from UTC; write it as 2026-01-31T12:00:00+05:30")
    return time


def _repeated(labels: Sequence[Label]) -> Iterator[str]:
    first: dict[tuple[str, str], int] = {}
    for label in labels:
        line = first.setdefault((label.request_id, label.source), label.line)
        if line != label.line:
            yield f"line {label.line}: {label.source} has labelled {label.request_id} in line {line} already"
