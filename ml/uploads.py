"""Many uploads at once: bytes are counted, the first failure stops the rest, the message tells what is stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, ExternalError

Progress = Callable[[int, int], None]
"""Called in the caller's thread with (bytes done, bytes in all)."""


class Tally:
    """Bytes done, added up by upload threads and read by the caller's."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.total = sum(sizes)
        self.done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes that are stored."""
        with self._lock:
            self.done += count


def follow(jobs: Mapping[Future[Any], str], tally: Tally | None, on_progress: Progress | None) -> None:
    """Wait for the jobs; after the first failure those not begun are cancelled. Reports in the caller's thread."""
    pending = set(jobs)
    try:
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            if on_progress is not None and tally is not None:
                on_progress(tally.done, tally.total)
            if any(job.exception() is not None for job in done if not job.cancelled()):
                pending = {job for job in pending if not job.cancel()}
    finally:  # the caller was interrupted, or its callback failed: begin nothing new
        for job in pending:
            job.cancel()


def raise_first(jobs: Mapping[Future[Any], str], place: str) -> None:
    """Raise the first failure of finished jobs; an ExternalError also tells which were stored and which were not."""
    errors = [error for job in jobs if not job.cancelled() and (error := job.exception()) is not None]
    if not errors:
        return
    # A wrong setting explains more than the outages beside it.
    error = next((e for e in errors if not isinstance(e, ExternalError)), errors[0])
    if not isinstance(error, ExternalError):
        raise error
    missing = [name for job, name in jobs.items() if job.cancelled() or job.exception() is not None]
    stored = [name for name in jobs.values() if name not in set(missing)]
    raise ExternalError(
        f"{error}\nOf {len(jobs)} for {place}, {len(stored)} were stored ({_names(stored)}), "
        f"{len(missing)} were not ({_names(missing)}).",
        retryable=error.retryable,
    ) from error


def _names(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def size_of(item: Path | bytes) -> int:
    """Bytes of a file or buffer. Raises ConfigError when the file cannot be read."""
    try:
        return item.stat().st_size if isinstance(item, Path) else len(item)
    except OSError as error:
        raise ConfigError(f"{item!s} cannot be read: {error.strerror or error}. Nothing was written.") from error
