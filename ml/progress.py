"""How far a training is: progress.jsonl for machines, a bar or plain lines for people. No torch here.

Each line of the file is `{"tick": {...}}` (about one a second) or `{"epoch": {...}}` (one a validated epoch).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from configs.errors import KhetError
from ml.results import Epoch, Record

FILE = "progress.jsonl"


class TrainingInterrupted(KhetError):  # noqa: N818  (a state people ask for, not a fault)
    """A signal asked the training to stop; its state is saved. The exit code is the shell's for SIGTERM."""

    exit_code = 143


class Tick(Record):
    """Where a running epoch is. `fraction` of the budget in [0, 1]; loss of the last batch in nats."""

    epoch: int
    step: int
    fraction: float
    loss: float
    images_per_s: float
    elapsed_s: float


def read(path: Path) -> tuple[list[Epoch], Tick | None]:
    """The epochs so far and the last tick. A line that is being written, or was cut by a kill, is left out."""
    epochs: list[Epoch] = []
    tick: Tick | None = None
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if "epoch" in entry:
                epochs.append(Epoch.model_validate(entry["epoch"]))
            else:
                tick = Tick.model_validate(entry["tick"])
        except (ValueError, KeyError, TypeError, ValidationError):
            continue
    return epochs, tick


class ProgressLog:
    """Writes progress.jsonl, starting with the epochs of the run that is resumed."""

    def __init__(self, path: Path, history: Iterable[Epoch]) -> None:
        path.write_text("".join(_line("epoch", epoch) for epoch in history), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def tick(self, tick: Tick) -> None:
        """Add a line."""
        self._file.write(_line("tick", tick))

    def epoch(self, epoch: Epoch) -> None:
        """Add a line."""
        self._file.write(_line("epoch", epoch))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(kind: str, record: Record) -> str:
    return json.dumps({kind: record.model_dump(mode="json")}) + "\n"


class Display:
    """A rich bar on a terminal; elsewhere a plain line an epoch, at most one every few seconds."""

    def __init__(self, title: str, *, quiet_s: float = 5.0) -> None:
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task(title, total=1.0, text="starting") if self._bar else None
        self._title, self._quiet_s, self._last = title, quiet_s, time.monotonic() - quiet_s

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def tick(self, tick: Tick, last: Epoch | None) -> None:
        """Move the bar."""
        if self._bar and self._task is not None:
            accuracy = f"{last.val_accuracy:.1%}" if last else "-"
            text = f"epoch {tick.epoch}  loss {tick.loss:.3f}  validation {accuracy}  {tick.images_per_s:.0f} images/s"
            self._bar.update(self._task, completed=tick.fraction, text=text)

    def epoch(self, epoch: Epoch, fraction: float) -> None:
        """Move the bar, or print a line."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=fraction)
        elif time.monotonic() - self._last >= self._quiet_s or (fraction >= 1.0 and self._quiet_s < float("inf")):
            self._last = time.monotonic()
            print(
                f"{self._title}: {fraction:4.0%}  epoch {epoch.epoch}  loss {epoch.train_loss:.3f}  "
                f"validation loss {epoch.val_loss:.3f} accuracy {epoch.val_accuracy:.1%}  "
                f"{epoch.images_per_s:.0f} images/s",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def _bar() -> Progress:
    from rich.console import Console

    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[text]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=Console(stderr=True))
