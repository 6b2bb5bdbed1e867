"""Read a folder of labelled photos: one sub-folder a class, and optional sidecar tables at the top.

`severity.csv` (columns file, severity in 0..1) and `groups.csv` (columns file, group: images of one plant or session
that must stay in one split) name files relative to the folder, with forward slashes.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import ConfigError
from ml.quarantine import Quarantined

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jfif"))
_LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
_SHAPE = "Expected one sub-folder a class, each with the photos of that class, as in FOLDER/Apple___healthy/1.jpg."


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the source. `name`: path relative to the folder, as text that any file format can hold."""

    path: Path
    name: str
    label: str


@dataclass(slots=True)
class Source:
    """What a folder holds. `refused`: files that belong to no class, or are links (which are never followed)."""

    files: list[SourceFile] = field(default_factory=list)
    refused: list[Quarantined] = field(default_factory=list)
    severity: dict[str, float] = field(default_factory=dict)
    group: dict[str, str] = field(default_factory=dict)
    empty_classes: list[str] = field(default_factory=list)


def scan(folder: Path) -> Source:
    """List the photos of `folder`, in a fixed order. Hidden files and the litter of file managers are passed over.

    Raises:
        ConfigError: no such folder, or not of the expected shape; the message says what was found instead.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}. {_SHAPE} Nothing was imported.")
    if (folder / "dataset.json").exists() and (folder / "images").is_dir():
        raise ConfigError(f"{folder} is an imported dataset. Import {folder / 'images'} instead. Nothing was imported.")
    folder = folder.resolve()
    source = Source(severity=_severities(folder / "severity.csv"), group=_groups(folder / "groups.csv"))
    labels: dict[str, str] = {}
    for entry in _visible(folder):
        if entry.is_symlink():
            source.refused.append(_link(entry, folder))
        elif entry.is_dir():
            _scan_class(entry, folder, _label(entry, labels), source)
        elif entry.suffix.lower() in IMAGE_SUFFIXES:
            detail = "The photo lies beside the class folders: its class is unknown."
            source.refused.append(Quarantined(path=entry_name(entry, folder), reason="no_class", detail=detail))
    _check_shape(folder, source, labels)
    return source


def entry_name(path: Path, folder: Path) -> str:
    """`path` relative to `folder` with forward slashes; bytes that are no UTF-8 are replaced."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "replace")


def _visible(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda p: os.fsencode(p.name))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed: {error}. Nothing was imported.") from error
    return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in _LITTER]


def _label(folder: Path, known: dict[str, str]) -> str:
    label = unicodedata.normalize("NFC", os.fsencode(folder.name).decode("utf-8", "replace"))
    twin = known.setdefault(label.casefold(), label)
    if twin != label or "\ufffd" in label or not label.isprintable():
        problem = f"is the same as {twin!r} but for its case" if twin != label else "is not readable text"
        raise ConfigError(f"{folder}: the class name {label!r} {problem}. Rename the folder. Nothing was imported.")
    return label


def _scan_class(class_folder: Path, root: Path, label: str, source: Source) -> None:
    before = len(source.files)
    for path in _walk(class_folder):
        if path.is_symlink():
            source.refused.append(_link(path, root))
        elif path.is_file():
            source.files.append(SourceFile(path, entry_name(path, root), label))
    if len(source.files) == before:
        source.empty_classes.append(label)


def _walk(folder: Path) -> Iterator[Path]:
    for entry in _visible(folder):
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def _link(path: Path, root: Path) -> Quarantined:
    detail = f"A link to {path.readlink()}: links are not followed. Copy the file or folder instead."
    return Quarantined(path=entry_name(path, root), reason="link", detail=detail)


def _check_shape(folder: Path, source: Source, labels: dict[str, str]) -> None:
    classes = sorted({f.label for f in source.files})
    if len(classes) >= 2:
        return
    hint = ""
    if source.refused and not labels:
        hint = f"It holds {len(source.refused)} photos or links but no folders. "
    elif not labels:
        hint = "It is empty. "
    elif len(classes) == 1 and (inner := _nested_classes(folder / classes[0])):
        hint = f"The only folder, {classes[0]!r}, holds the folders {', '.join(inner[:4])}: did you mean that one? "
    elif len(classes) == 1:
        hint = f"Only the class {classes[0]!r} has files; a classifier needs at least two. "
    else:
        hint = f"The folders {', '.join(sorted(labels.values())[:4])} hold no files. "
    raise ConfigError(f"{folder}: {hint}{_SHAPE} Nothing was imported.")


def _nested_classes(folder: Path) -> list[str]:
    return [e.name for e in _visible(folder) if e.is_dir()] if folder.is_dir() else []


def _severities(path: Path) -> dict[str, float]:
    values: dict[str, float] = {}
    for line, name, text in _sidecar(path, "severity"):
        if not text:
            continue
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = -1.0
        if not 0.0 <= values[name] <= 1.0:
            raise ConfigError(f"{path}, line {line}: severity {text!r} is no number from 0 to 1. Nothing was imported.")
    return values


def _groups(path: Path) -> dict[str, str]:
    return {name: text for _, name, text in _sidecar(path, "group") if text}


def _sidecar(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Rows of a sidecar as (line, file, value); none if the file does not exist."""
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            if not {"file", column} <= set(reader.fieldnames or ()):
                raise ConfigError(f"{path}: needs the columns file,{column} in its first line. Nothing was imported.")
            for row in reader:
                yield reader.line_num, row["file"] or "", (row[column] or "").strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as CSV: {error}. Nothing was imported.") from error
