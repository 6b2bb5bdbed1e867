"""The node's state folder. Every write is atomic and synced: a kill -9 or a power cut leaves the old file or the new.

desired.json, desired.json.bak   what should run, twice
replicas/<name>.json             what was started
logs/<name>.log                  what replicas print, bounded
events.jsonl                     what the node did, bounded
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from pydantic import ValidationError

from configs.errors import ConfigError, ExternalError, IntegrityError
from ml.results import Record
from tasks.cluster.node import policy
from tasks.cluster.node.state import Desired, Event, ReplicaRecord

RecordT = TypeVar("RecordT", bound=Record)
MAX_LOG_BYTES = 4_000_000  # a replica prints some 100 bytes a request at most: about the last hour at 10 requests/s
MAX_EVENTS_BYTES = 1_000_000
MAX_EVENTS = 1_000


class Store:
    """Reads and writes the folder. Methods block for a disk sync: call them from a thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.replicas = root / "replicas"
        self.logs = root / "logs"
        self._desired = root / "desired.json"
        self._backup = root / "desired.json.bak"
        self._events = root / "events.jsonl"
        for folder in (root, self.replicas, self.logs):
            _make(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go when the process dies.

        Raises:
            ConfigError: another node holds it.
        """
        with (self.root / "node.lock").open("a") as lock:
            _claim(lock, self.root)
            yield

    def load_desired(self) -> tuple[Desired, str | None]:
        """The desired state, and what was wrong where it came from the copy.

        The copy may be one change behind, so all traffic goes to stable when it is used.

        Raises:
            IntegrityError: neither file can be read.
        """
        if not self._desired.exists() and not self._backup.exists():
            return Desired(), None
        try:
            return Desired.read(self._desired), None
        except IntegrityError as error:
            return policy.to_stable(self._from_backup(error)), str(error)

    def _from_backup(self, error: IntegrityError) -> Desired:
        try:
            desired = Desired.read(self._backup)
        except IntegrityError:
            raise IntegrityError(
                f"{self._desired} cannot be read, and neither can its copy {self._backup.name}: {error}\n"
                "The node did not start; replicas that run were left running.\n"
                "Next: restore one of the two files, or remove both and deploy again."
            ) from error
        if self._desired.exists():
            self._desired.replace(self.root / "desired.json.damaged")
        return desired

    def save_desired(self, desired: Desired) -> None:
        """Write the state and its copy; both are on disk before either replaces its predecessor.

        Raises:
            ExternalError: the disk did not take it; the old state stands.
        """
        _write(desired, self._desired, self._backup)

    def load_replicas(self) -> tuple[list[ReplicaRecord], list[Path]]:
        """The replicas that were started, and files that cannot be read."""
        good: list[ReplicaRecord] = []
        bad: list[Path] = []
        for path in sorted(self.replicas.glob("*.json")):
            try:
                good.append(ReplicaRecord.read(path))
            except IntegrityError:
                bad.append(path)
        return good, bad

    def save_replica(self, record: ReplicaRecord) -> None:
        """Write one replica's record. Raises ExternalError as `save_desired`."""
        _write(record, self.replicas / f"{record.name}.json")

    def forget_replica(self, name: str) -> None:
        """Remove a replica's record; its log stays until `prune_logs`."""
        (self.replicas / f"{name}.json").unlink(missing_ok=True)

    def log_path(self, name: str) -> Path:
        """Where a replica prints to."""
        return self.logs / f"{name}.log"

    def log_tail(self, name: str, lines: int) -> list[str]:
        """The last lines a replica printed."""
        try:
            with self.log_path(name).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 400 * lines - 4096))
                return log.read().decode("utf-8", "replace").splitlines()[-lines:]
        except FileNotFoundError:
            return []

    def bound_logs(self) -> None:
        """Cut long logs in place: replicas append, so they need not know, and the node may die meanwhile."""
        for path in self.logs.glob("*.log"):
            if path.stat().st_size > MAX_LOG_BYTES:
                tail = _last_bytes(path, MAX_LOG_BYTES // 4)
                path.with_suffix(".log.1").write_bytes(tail)
                os.truncate(path, 0)

    def prune_logs(self, keep: int = 40) -> None:
        """Remove the logs of replicas long gone, oldest first."""
        alive = {path.stem for path in self.replicas.glob("*.json")}
        gone = [p for p in self.logs.glob("*.log") if p.stem not in alive]
        for path in sorted(gone, key=lambda p: p.stat().st_mtime)[:-keep]:
            path.unlink(missing_ok=True)
            path.with_suffix(".log.1").unlink(missing_ok=True)

    def append_event(self, event: Event) -> None:
        """Add a line to the event file, starting it anew with the latest half when it is full."""
        if self._events.exists() and self._events.stat().st_size > MAX_EVENTS_BYTES:
            kept = _last_bytes(self._events, MAX_EVENTS_BYTES // 2).split(b"\n", 1)[-1]
            _replace(kept, self._events)
        with self._events.open("a", encoding="utf-8") as file:
            file.write(event.model_dump_json() + "\n")

    def load_events(self) -> deque[Event]:
        """The latest events, oldest first; a line cut by a crash is left out."""
        events: deque[Event] = deque(maxlen=MAX_EVENTS)
        if self._events.exists():
            for line in self._events.read_bytes().splitlines()[-MAX_EVENTS:]:
                with contextlib.suppress(ValidationError):
                    events.append(Event.model_validate_json(line))
        return events


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{folder}: the node cannot keep its state there: {error}. Nothing was started.") from error


def _claim(lock: TextIO, root: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another node runs on {root}. Nothing was started; it was left running.") from error


def _write(record: Record, *paths: Path) -> None:
    content = record.model_dump_json(indent=2).encode() + b"\n"
    try:
        _replace(content, *paths)
    except OSError as error:
        raise ExternalError(f"{paths[0]}: cannot be written: {error}. The earlier state stands.") from error


def _replace(content: bytes, *paths: Path) -> None:
    """Give files of one folder this content, atomically and synced."""
    partials = [path.with_name(path.name + ".partial") for path in paths]
    for partial in partials:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for partial, path in zip(partials, paths, strict=True):
        partial.replace(path)
    folder = os.open(paths[0].parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _last_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read()
