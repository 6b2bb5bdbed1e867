"""Where long work says how far it is: whoever runs the flow decides what becomes of it (a terminal, a test, nobody)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["running", "done", "cached", "failed", "skipped", "note"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage is. `fraction` in [0, 1]; None: not known."""

    stage: str
    state: State
    text: str = ""
    fraction: float | None = None


Listener = Callable[[Progress], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener` on every report of this process, until the returned function is called."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def report(stage: str, state: State, text: str = "", fraction: float | None = None) -> None:
    """Tell every listener."""
    for listener in tuple(_listeners):
        listener(Progress(stage, state, text, fraction))
