"""What the supervisor knows of a part, whichever program it is."""

from __future__ import annotations

import signal
from typing import Protocol

from deployments.local.process import Launch


class Part(Protocol):
    """One server of the stack. Every method is idempotent and raises only `KhetError`s."""

    @property
    def name(self) -> str:
        """As people type it."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Parts that must be healthy before this one starts."""

    @property
    def ports(self) -> tuple[str, ...]:
        """Names of the ports it listens on."""

    @property
    def address(self) -> str:
        """Where people and programs reach it; without secrets."""

    @property
    def stop_signal(self) -> signal.Signals:
        """What asks it to end."""

    def prepare(self) -> None:
        """Write its files and create its data before the process starts."""

    def launch(self) -> Launch:
        """How to start it."""

    def check(self) -> str:
        """Ask it whether it is well; a short remark.

        Raises:
            ExternalError: it is not, or does not answer.
        """

    def furnish(self) -> None:
        """Create what must exist inside the running server before it counts as healthy (buckets, a database)."""
