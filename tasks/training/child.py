"""Run one of the model's own commands (`python -m ml.train` ...) and follow it.

The child dies with its parent: a flow that was killed must not leave a trainer behind that writes into the folder its
successor resumes from.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, ExternalError, GateError, IntegrityError, KhetError, SafetyError
from configs.settings import PROJECT_ROOT, home

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_POLL_S = 0.2
_STOP_S = 20.0
_BY_EXIT_CODE: dict[int, type[KhetError]] = {
    error.exit_code: error for error in (ConfigError, GateError, IntegrityError, SafetyError)
}


def run_child(
    arguments: Sequence[str], log: Path, *, progress: Path | None = None, on_line: Callable[[dict[str, Any]], None]
) -> None:
    """Run `python -m <arguments>` to its end; every JSON line it adds to `progress` goes to `on_line`.

    Raises:
        KhetError: the kind the child's exit code stands for, with the end of its log.
        ExternalError: it was killed or crashed; running it again resumes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=PROJECT_ROOT,
            env=_environment(),
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (one async-signal-safe system call, nothing else)
        )
    try:
        for line in _follow(child, progress):
            on_line(line)
    finally:
        _stop(child)
    if child.returncode != 0:
        raise _failure(arguments[0], child.returncode, log)


def _environment() -> dict[str, str]:
    # Spinning OpenMP threads starve everything else on shared cores (4-8x, measured).
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KHET_HOME": str(home()), "PYTHONUNBUFFERED": "1"}


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _follow(child: subprocess.Popen[bytes], progress: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the records appended to `progress` while the child runs, and those it wrote last."""
    offset = progress.stat().st_size if progress and progress.exists() else 0
    while True:
        ended = child.poll() is not None
        if progress is not None and progress.exists():
            offset, lines = _read_on(progress, offset)
            yield from lines
        if ended:
            return
        time.sleep(_POLL_S)


def _read_on(path: Path, offset: int) -> tuple[int, list[dict[str, Any]]]:
    """The whole lines after `offset`; a line that is still being written waits for the next look."""
    if path.stat().st_size < offset:
        offset = 0
    with path.open("rb") as file:
        file.seek(offset)
        added = file.read()
    whole = added[: added.rfind(b"\n") + 1]
    lines: list[dict[str, Any]] = []
    for line in whole.splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut: progress is only shown, never counted on
            lines.append(json.loads(line))
    return offset + len(whole), lines


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs because the flow was cancelled: it may save first."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _failure(command: str, code: int, log: Path) -> KhetError:
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
    said = "\n".join(tail) or "(it printed nothing)"
    message = (
        f"`python -m {command}` ended with exit code {code}; production is unchanged. Its log ({log}) ends:\n{said}"
    )
    if code in _BY_EXIT_CODE:
        return _BY_EXIT_CODE[code](message)
    return ExternalError(message, retryable=code < 0)
