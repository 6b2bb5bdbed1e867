"""Decoded images as one uint8 file mapped into memory: decode once, then an epoch reads pixels at disk speed."""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from configs.errors import ExternalError

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
In = TypeVar("In")
Out = TypeVar("Out")
_CHUNK = 64  # images one thread decodes between two reports of progress


def mapped(
    path: Path,
    count: int,
    px: int,
    load: Callable[[int], Pixels],
    on_progress: Progress | None = None,
) -> Pixels:
    """Return `path` as a read-only map of shape [count, px, px, 3], decoding it with `load(index)` if it is not there.

    The file appears under its name only when it is whole, so a process killed while writing leaves nothing to trust.
    Of two processes that need it at once, one decodes and the other waits.

    Raises:
        ExternalError: the folder cannot be written (full, read-only); nothing else was changed.
        KhetError: whatever `load` raises.
    """
    shape = (count, px, px, 3)
    if count == 0:  # an empty file cannot be mapped
        return np.zeros(shape, dtype=np.uint8)
    try:
        if (ready := _open(path, shape)) is not None:
            return ready
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            if (ready := _open(path, shape)) is None:
                _write(path, shape, load, on_progress)
    except OSError as error:
        raise ExternalError(
            f"Decoded images cannot be kept in {path.parent}: {error}. The dataset itself was not touched. "
            f"Next: free {np.prod(shape) / 1e6:.0f} MB there, or make the folder writable.",
            retryable=False,
        ) from error
    if (ready := _open(path, shape)) is None:
        raise ExternalError(f"{path} vanished while it was in use. Next: run the step again.")
    return ready


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel frees it when the process dies."""
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _open(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """The map, or None if the file is missing or not what it should be (another size, cut by a full disk)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def _write(path: Path, shape: tuple[int, ...], load: Callable[[int], Pixels], on_progress: Progress | None) -> None:
    partial = path.with_suffix(".partial")  # one name: the lock is held, and a leftover is overwritten
    try:
        with partial.open("wb") as handle:
            np.lib.format.write_array_header_1_0(handle, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for chunk in _decoded(shape[0], load, on_progress):
                chunk.tofile(handle)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _decoded(count: int, load: Callable[[int], Pixels], on_progress: Progress | None) -> Iterator[Pixels]:
    """Stacks of decoded images in order, a few ahead of the writer. Threads suffice: the codec releases the GIL."""
    ranges = [range(at, min(at + _CHUNK, count)) for at in range(0, count, _CHUNK)]
    for done, chunk in zip(ranges, parallel(lambda r: np.stack([load(i) for i in r]), ranges), strict=True):
        yield chunk
        if on_progress is not None:
            on_progress(done.stop, count)


def parallel(work: Callable[[In], Out], items: Iterable[In], workers: int | None = None) -> Iterator[Out]:
    """`map` over threads, in order, with a bounded number of results waiting: memory stays flat, errors stop it."""
    workers = workers or threads()
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def threads() -> int:
    """Threads worth having for decoding: the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
