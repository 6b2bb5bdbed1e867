"""Sends a training's newest state to the object store, in a thread of its own: training never waits for the network."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from configs.errors import KhetError
from ml.checkpoint_store import BEST, LAST, TrainingStore
from ml.progress import TrainingInterrupted

# A call that got no answer for so long has failed, if the settings are not less patient: a newer state may be waiting.
PATIENCE_S = 30.0
_AGAIN_S = 5.0
# torchrun kills its processes 30 s after it was asked to stop, and saving has taken some of that.
_FAREWELL_S = 20.0
_IN_FLIGHT_S = 10 * PATIENCE_S
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _State:
    """A state as it was offered: hard links, which stay as they are when the next state replaces the files."""

    step: int
    epoch: int
    folder: Path

    @property
    def files(self) -> dict[str, Path]:
        return {path.name: path for path in sorted(self.folder.iterdir())}

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Courier:
    """The way of checkpoints from `out` to the store. Only the newest waits: one that is overtaken is never sent.

    An outage of the store costs nothing but the checkpoints of its time, and is said once. As a context manager: after
    a clean end what still waits is dropped, for the result is stored next; after an interruption it is sent, as far as
    the time allows.
    """

    def __init__(self, store: TrainingStore, out: Path, every_s: float, patience_s: float = PATIENCE_S) -> None:
        self._store = store.patient(patience_s)
        self._out = out
        self._every_s = every_s
        self._folder = out / ".sending"
        self._changed = threading.Condition()
        self._waiting: _State | None = None
        self._closing = self._dropping = False
        self._number = itertools.count()
        self._away = False
        self._sent_at = -every_s
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._closing, self._dropping = True, kind is None
            if self._dropping:
                self._waiting = None
            self._changed.notify()
        self._thread.join(_IN_FLIGHT_S if kind is None else _FAREWELL_S)
        if self._thread.is_alive() and kind is TrainingInterrupted:
            _log.warning("The last state is not in %s: time is up. An earlier one is.", self._store.address)
        shutil.rmtree(self._folder, ignore_errors=True)

    def offer(self, step: int, epoch: int) -> None:
        """Take last.ckpt and best.ckpt as they are now; returns at once."""
        state = _State(step, epoch, self._folder / str(next(self._number)))
        state.folder.mkdir(parents=True)
        for name in (LAST, BEST):
            if (self._out / name).exists():
                _link(self._out / name, state.folder / name)
        with self._changed:
            if self._waiting is not None:
                self._waiting.drop()
            self._waiting = state
            self._changed.notify()

    def _work(self) -> None:
        while (state := self._next()) is not None:
            if self._send(state) or not self._put_back(state):
                state.drop()

    def _next(self) -> _State | None:
        """The state to send now; None at the end. Waits until there is one, and its time has come."""
        with self._changed:
            while not self._closing:
                wait_s = self._sent_at + self._every_s - time.monotonic()
                if self._waiting is not None and wait_s <= 0:
                    break
                self._changed.wait(wait_s if self._waiting is not None else None)
            state, self._waiting = self._waiting, None
            return state

    def _send(self, state: _State) -> bool:
        try:
            self._store.keep(state.step, state.epoch, state.files)
        except (KhetError, OSError) as error:
            if not self._away:
                _log.warning("Checkpoints are not being stored; training goes on. %s", error)
            self._away = True
            return False
        if self._away:
            _log.info("Checkpoints are being stored again, from step %d on.", state.step)
        self._away, self._sent_at = False, time.monotonic()
        return True

    def _put_back(self, state: _State) -> bool:
        """Try again soon, unless a newer one has come meanwhile, or this was the last try."""
        with self._changed:
            tried_last = self._closing
            self._changed.wait_for(lambda: self._waiting is not None or self._closing, _AGAIN_S)
            if self._waiting is not None or self._dropping or tried_last:
                return False
            self._waiting = state
            return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
