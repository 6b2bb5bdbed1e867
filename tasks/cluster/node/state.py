"""What the node writes to disk and what its control API accepts: frozen, validated records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field

from configs.base import Probability
from ml.results import Record
from tasks.cluster import Track
from tasks.cluster.memory import Memory, VersionText

ReplicaCount = Annotated[int, Field(ge=1, le=64)]
# A lease is a dead man's switch: one that lasts for hours would guard nobody.
LeaseSeconds = Annotated[float, Field(gt=0, le=3600)]


class DesiredTrack(Record):
    """What one track should run.

    `generation` grows with every restart, so that replicas started before it are replaced; `restart_key` is the key of
    the restart that was counted last; `fast` starts all new replicas at once instead of one after the other.
    """

    version: VersionText
    replicas: ReplicaCount
    generation: int = 0
    restart_key: str | None = None
    fast: bool = False


class Desired(Record):
    """The whole desired state. `lease_lost_at`: when a lease last expired without renewal."""

    format: Literal[1] = 1
    tracks: dict[Track, DesiredTrack] = Field(default_factory=dict)
    weights: dict[Track, Probability] = Field(default_factory=dict)
    mirror: dict[Track, Probability] = Field(default_factory=dict)
    lease_expires_at: datetime | None = None
    lease_lost_at: datetime | None = None
    memory: Memory = Memory()


class ReplicaRecord(Record):
    """One replica on disk. `pid` 0: about to be started; `created` is the process's start time, in Unix seconds."""

    name: str
    track: Track
    version: VersionText
    generation: int
    port: int
    pid: int = 0
    created: float = 0.0
    started_at: datetime
    restarts: int = 0
    served: bool = False
    retiring: bool = False


class Event(Record):
    """Something the node did, for timelines."""

    at: datetime
    kind: str
    subject: str
    detail: str


class DeployCall(Record):
    """Body of POST /v1/deploy."""

    track: Track
    version: VersionText
    replicas: ReplicaCount


class WeightsCall(Record):
    """Body of POST /v1/weights."""

    weights: dict[Track, Probability]
    mirror: dict[Track, Probability] = Field(default_factory=dict)
    lease_s: LeaseSeconds | None = None


class LeaseCall(Record):
    """Body of POST /v1/lease."""

    lease_s: LeaseSeconds


class ScaleCall(Record):
    """Body of POST /v1/scale."""

    track: Track
    replicas: ReplicaCount


class RestartCall(Record):
    """Body of POST /v1/restart. The same `key` twice restarts once."""

    track: Track
    key: Annotated[str, Field(min_length=1, max_length=64)]


class RemoveCall(Record):
    """Body of POST /v1/remove."""

    track: Track


class RollbackCall(Record):
    """Body of POST /v1/rollback."""

    version: VersionText
    replicas: ReplicaCount


def utcnow() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)
