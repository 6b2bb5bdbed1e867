"""Batches on disk until the object store has them. Outlives the process: the next replica on the machine delivers them.

Every process has a folder of its own below the spool's root, locked with flock as long as it lives; the kernel frees
the lock of a killed one. Whoever gets the lock of another's folder moves its files into its own and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

from ml.serving.rows import Batch, object_key

logger = logging.getLogger(__name__)
_LOCK: Final = "lock"
# <nanoseconds since 1970>_<rows>_<day>_<name of the object>: sorts by age, and says all without being opened.
_NAME: Final = re.compile(r"(\d{20})_(\d+)_(\d{4}-\d\d-\d\d)_([A-Za-z0-9][A-Za-z0-9._-]*\.parquet)")


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A file of the spool."""

    file: str
    rows: int
    size_bytes: int
    key: str


def parse_entry(file: str, size: int) -> Entry | None:
    """What a file name says; None for files that are none of ours."""
    match = _NAME.fullmatch(file)
    if match is None:
        return None
    return Entry(file, int(match[2]), size, object_key(date.fromisoformat(match[3]), match[4]))


class Spool:
    """This process's folder, oldest first, at most `max_bytes`. Thread-safe. Methods raise OSError as the disk does."""

    def __init__(self, root: Path, max_bytes: int, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._root = root
        self._folder = root / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._max_bytes = max_bytes
        self._clock_ns = clock_ns
        self._guard = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._lent: str | None = None
        self._lock_fd: int | None = None

    @property
    def rows(self) -> int:
        """Rows that wait here."""
        return sum(entry.rows for entry in list(self._entries.values()))

    @property
    def used_bytes(self) -> int:
        """Disk used."""
        return sum(entry.size_bytes for entry in list(self._entries.values()))

    def add(self, batch: Batch) -> int:
        """Write a batch; returns the rows that had to go for it, oldest first (its own, if it is too large itself)."""
        if len(batch.data) > self._max_bytes:
            return batch.rows
        with self._guard:
            self._open()
            dropped = self._make_room(len(batch.data))
            file = f"{self._clock_ns():020d}_{batch.rows}_{batch.day.isoformat()}_{batch.name}"
            _write(self._folder / file, batch.data)
            self._entries[file] = Entry(file, batch.rows, len(batch.data), batch.key)
        return dropped

    def oldest(self) -> Entry | None:
        """What has waited longest."""
        with self._guard:
            return self._entries[min(self._entries)] if self._entries else None

    def borrow(self, entry: Entry) -> bytes:
        """Its content. It is not dropped to make room until `give_back` or `remove`."""
        with self._guard:
            self._lent = entry.file
        return (self._folder / entry.file).read_bytes()

    def give_back(self, entry: Entry) -> None:
        """It was not delivered."""
        with self._guard:
            if self._lent == entry.file:
                self._lent = None

    def remove(self, entry: Entry) -> None:
        """The batch is delivered."""
        with self._guard:
            self._lent = None
            self._entries.pop(entry.file, None)
            (self._folder / entry.file).unlink(missing_ok=True)

    def adopt(self) -> tuple[int, int]:
        """Take over what dead processes left; returns rows taken and rows dropped (the oldest, over the limit)."""
        taken = dropped = 0
        if not self._root.is_dir():
            return taken, dropped
        for folder in sorted(self._root.iterdir()):
            if folder != self._folder and not folder.name.startswith(".") and folder.is_dir():
                with _abandoned(folder) as ours:
                    more = self._take_from(folder) if ours else (0, 0)
                taken, dropped = taken + more[0], dropped + more[1]
        return taken, dropped

    def close(self) -> None:
        """Let go of the folder: what is left in it can be adopted at once."""
        with self._guard:
            if self._lock_fd is None:
                return
            if not self._entries:
                _remove_folder(self._folder)
            os.close(self._lock_fd)
            self._lock_fd = None

    def _open(self) -> None:
        """Make the folder under a hidden name, lock it, then show it: nobody can take it for an abandoned one."""
        if self._lock_fd is not None:
            return
        hidden = self._folder.with_name(f".{self._folder.name}")
        hidden.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(hidden / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(self._folder)
        except OSError:
            os.close(descriptor)
            raise
        self._lock_fd = descriptor

    def _make_room(self, size: int) -> int:
        dropped = 0
        used = self.used_bytes
        for file in sorted(self._entries):
            if used + size <= self._max_bytes:
                break
            if file != self._lent:
                entry = self._entries.pop(file)
                (self._folder / file).unlink(missing_ok=True)
                used -= entry.size_bytes
                dropped += entry.rows
        return dropped

    def _take_from(self, folder: Path) -> tuple[int, int]:
        taken = dropped = 0
        with self._guard:
            self._open()
            used = self.used_bytes
            for path in sorted(folder.iterdir(), reverse=True):  # the youngest first: the limit drops the oldest
                entry = parse_entry(path.name, path.stat().st_size)
                if entry is None:
                    continue
                if used + entry.size_bytes > self._max_bytes:
                    dropped += entry.rows
                    continue
                path.rename(self._folder / path.name)
                self._entries[entry.file] = entry
                used += entry.size_bytes
                taken += entry.rows
            _remove_folder(folder)
        return taken, dropped


@contextlib.contextmanager
def _abandoned(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock if its owner is dead; yields whether it is."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # just adopted by another replica
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield _is_current(descriptor, folder / _LOCK)
    finally:
        os.close(descriptor)


def _is_current(descriptor: int, lock: Path) -> bool:
    """Whether the file we locked is still the one of that name: another adopter may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _remove_folder(folder: Path) -> None:
    """Remove an emptied folder: cut files of a killed process and the lock, which goes last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _LOCK):
        path.unlink(missing_ok=True)
    folder.rmdir()


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, also on a full disk."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
