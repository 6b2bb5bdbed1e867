"""What the stack tells about itself: values that people read and programs parse."""

from __future__ import annotations

import enum
from datetime import datetime

from pydantic import BaseModel, ConfigDict


class Phase(enum.StrEnum):
    """Life of a part."""

    stopped = "stopped"
    waiting = "waiting"  # for the parts it needs
    starting = "starting"
    running = "running"
    failed = "failed"  # died too often; still tried now and then


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PartState(_Value):
    """One part. `detail` is the last health remark or why it is not well; `error` names the class of a KhetError."""

    name: str
    state: Phase
    address: str
    pid: int | None = None
    since: datetime | None = None
    restarts: int = 0
    adopted: bool = False
    checked_at: datetime | None = None
    detail: str = ""
    error: str | None = None


class SupervisorState(_Value):
    """The process that watches the parts. `stopping` is set from the moment it was asked to end."""

    pid: int
    since: datetime
    stopping: bool = False


class StackState(_Value):
    """The whole stack. `supervisor` is None when nobody watches: parts may still run (after a kill -9)."""

    home: str
    supervisor: SupervisorState | None = None
    parts: tuple[PartState, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether everything that belongs to the stack runs and is watched."""
        return self.supervisor is not None and all(p.state is Phase.running for p in self.parts) and bool(self.parts)

    def part(self, name: str) -> PartState | None:
        """The part of that name."""
        return next((p for p in self.parts if p.name == name), None)


class PartEvent(_Value):
    """Something happened to a part; `elapsed_s` counts from the beginning of the command that shows it."""

    part: str
    state: Phase
    detail: str
    elapsed_s: float


class Check(_Value):
    """One of the doctor's questions. `fix` says what to do when it is not ok."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
