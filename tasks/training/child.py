"""Run one of the model's own commands (`python -m ml.train` ...) and follow it.

The child dies with its parent: a flow that was killed must not leave a trainer behind that writes into the folder its
successor resumes from.
"""

from __future__ import annotations

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
_WARNING = b"WARNING "  # as `python -m ml.train` and its like print the level
_BY_EXIT_CODE: dict[int, type[KhetError]] = {
    error.exit_code: error for error in (ConfigError, GateError, IntegrityError, SafetyError)
}


def run_child(
    arguments: Sequence[str],
    log: Path,
    *,
    progress: Path | None = None,
    on_line: Callable[[dict[str, Any]], None],
    stop_s: float = 20.0,
) -> None:
    """Run `python -m <arguments>` to its end; every JSON line it adds to `progress` goes to `on_line`.

    So does, as `{"warning": text}`, each warning in its log, which nobody else reads while it goes well.
    When the caller is interrupted the child is asked to end, and killed after `stop_s` seconds.

    Raises:
        KhetError: the kind the child's exit code stands for, with the end of its log.
        ExternalError: it was killed or crashed; running it again resumes.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    progress_lines, log_lines = _Tail(progress), _Tail(log)
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
        for line in _follow(child, progress_lines, log_lines):
            on_line(line)
    finally:
        _stop(child, stop_s)
    if child.returncode != 0:
        raise _failure(arguments[0], child.returncode, log)


def _environment() -> dict[str, str]:
    # Spinning OpenMP threads starve everything else on shared cores (4-8x, measured).
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "KHET_HOME": str(home()), "PYTHONUNBUFFERED": "1"}


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _follow(child: subprocess.Popen[bytes], progress: _Tail, log: _Tail) -> Iterator[dict[str, Any]]:
    """Yield what is added to `progress` and the warnings in `log` while the child runs, and what it wrote last."""
    while True:
        ended = child.poll() is not None
        yield from filter(None, map(_parsed, progress.added()))
        for line in log.added():
            if line.startswith(_WARNING):
                yield {"warning": line.removeprefix(_WARNING).decode("utf-8", errors="replace")}
        if ended:
            return
        time.sleep(_POLL_S)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that a kill cut: progress is only shown, never counted on."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None


class _Tail:
    """The whole lines that are added to a file from now on; one that is still being written waits for the next look."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._offset = path.stat().st_size if path and path.exists() else 0

    def added(self) -> list[bytes]:
        """Those since the last call."""
        if self._path is None or not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:  # written anew
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


def _stop(child: subprocess.Popen[bytes], stop_s: float) -> None:
    """End a child that still runs because the flow was cancelled: it may save first."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(stop_s)
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
    # Killed, or a system was away for longer than the child's own patience: what it had done by then is kept.
    return ExternalError(message, retryable=code < 0 or code == ExternalError.exit_code)
