"""The release journal: what a release is about to do, written down in the object store before it does it.

The journal, not the orchestrator's database, says how far a release came: the next run, or `khet doctor --fix`, reads
it after a kill and finishes or undoes what was begun.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError

from configs.errors import ConfigError, IntegrityError
from ml.results import Record

Outcome = Literal["running", "promoted", "gated", "rolled_back", "declined", "failed", "done", "dry_run"]
# `release` and `rollback` are those of models; the others are the runbook's deployment procedures.
Kind = Literal["release", "rollback", "rolling_update", "blue_green", "ab_test", "scale", "restart"]
Action = Literal["canary", "promote", "rollback", "update", "scale", "restart"]
Severity = Literal["info", "warning", "error"]
StageState = Literal["done", "cached", "failed", "skipped"]
PREFIX = "releases/"
_ID = re.compile(r"[0-9a-z][0-9a-z-]{3,40}")


class Blobs(Protocol):
    """The two calls the journal needs of an object store."""

    def put(
        self, bucket: str, key: str, data: bytes, *, if_absent: bool = False, content_type: str | None = None
    ) -> bool:
        """Write an object; False when `if_absent` and it was there."""

    def get(self, bucket: str, key: str) -> bytes:
        """Read an object."""

    def prefixes(self, bucket: str, prefix: str = "") -> Iterator[str]:
        """The folders right below `prefix`."""

    def exists(self, bucket: str, key: str) -> bool:
        """Whether the object is there."""


class Intent(Record):
    """The change in progress. `canary` and `update`: undo it after a crash; the others: finish it.

    `details` is what that takes beside the versions: replicas and images before and after, the track.
    """

    action: Action
    version: str
    previous: str | None
    at: datetime
    details: dict[str, Any] = Field(default={})


class StageRecord(Record):
    """One finished stage."""

    name: str
    state: StageState
    started_at: datetime
    duration_s: float
    note: str = ""


class Event(Record):
    """One line of the timeline."""

    at: datetime
    text: str
    severity: Severity = "info"


class Process(Record):
    """The process that works on a release; `started_at` tells it from a later one with the same pid."""

    host: str
    pid: int
    started_at: float


class ReleaseRecord(Record):
    """Everything a release knows about itself.

    `parameters` are the flow's own, so that a resume repeats them; `stage` is the one in progress. `diff`: what the
    change made of the cluster's objects, as `kubectl diff` shows it.
    """

    release_id: str
    kind: Kind = "release"
    outcome: Outcome = "running"
    started_at: datetime
    finished_at: datetime | None = None
    requested_by: str
    process: Process | None = None
    parameters: dict[str, Any]
    version: str | None = None
    champion: str | None = None
    intent: Intent | None = None
    stage: str | None = None
    reasons: tuple[str, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    looks: tuple[dict[str, Any], ...] = ()
    events: tuple[Event, ...] = ()
    diff: str = ""


def utc_now() -> datetime:
    """Now, aware."""
    return datetime.now(UTC)


class Journal:
    """One release's record. Every change is on the object store before the call returns."""

    def __init__(self, store: Blobs, bucket: str, record: ReleaseRecord, now: Callable[[], datetime] = utc_now) -> None:
        self._store, self._bucket, self._now = store, bucket, now
        self.record = record

    @classmethod
    def start(cls, store: Blobs, bucket: str, record: ReleaseRecord) -> Journal:
        """Open a new record.

        Raises:
            IntegrityError: a release of that id exists.
        """
        journal = cls(store, bucket, record)
        if not store.put(bucket, key(record.release_id), _bytes(record), if_absent=True):
            raise IntegrityError(f"release {record.release_id} exists already. Nothing was started; resume it instead.")
        return journal

    @classmethod
    def open(cls, store: Blobs, bucket: str, release_id: str) -> Journal:
        """Read an existing record.

        Raises:
            ConfigError: no such release.
            IntegrityError: its record cannot be read.
        """
        return cls(store, bucket, read(store, bucket, release_id))

    def change(self, **values: Any) -> ReleaseRecord:
        """Replace fields of the record and write it."""
        record = self.record.model_copy(update=values)
        self._store.put(self._bucket, key(record.release_id), _bytes(record), content_type="application/json")
        self.record = record
        return record

    def intend(self, action: Action, version: str, previous: str | None, **details: Any) -> None:
        """Write down what is about to change, before it does."""
        self.change(intent=Intent(action=action, version=version, previous=previous, at=self._now(), details=details))

    def say(self, text: str, severity: Severity = "info") -> None:
        """Add a line to the timeline."""
        self.change(events=(*self.record.events, Event(at=self._now(), text=text, severity=severity)))

    def close(self, outcome: Outcome, reasons: tuple[str, ...]) -> ReleaseRecord:
        """End the release: no intent is left open."""
        return self.change(outcome=outcome, reasons=reasons, intent=None, stage=None, finished_at=self._now())


def key(release_id: str) -> str:
    """Where the record of a release lies in the models bucket.

    Raises:
        ConfigError: `release_id` cannot be one.
    """
    if not _ID.fullmatch(release_id):
        raise ConfigError(f"{release_id!r} is not a release id. `khet releases` lists them.")
    return f"{PREFIX}{release_id}/journal.json"


def read(store: Blobs, bucket: str, release_id: str) -> ReleaseRecord:
    """One record. Raises as `Journal.open` does."""
    name = key(release_id)
    if not store.exists(bucket, name):
        raise ConfigError(f"there is no release {release_id}. `khet releases` lists them.")
    try:
        return ReleaseRecord.model_validate_json(store.get(bucket, name))
    except ValidationError as error:
        raise IntegrityError(f"s3://{bucket}/{name} is not a readable release record: {error}") from error


def releases(store: Blobs, bucket: str) -> list[ReleaseRecord]:
    """Every release, oldest first."""
    ids = [prefix.removeprefix(PREFIX).rstrip("/") for prefix in store.prefixes(bucket, PREFIX)]
    found = [read(store, bucket, release_id) for release_id in ids if store.exists(bucket, key(release_id))]
    return sorted(found, key=lambda record: record.started_at)


def unfinished(store: Blobs, bucket: str) -> list[ReleaseRecord]:
    """Releases that were begun and neither ended nor undone."""
    return [record for record in releases(store, bucket) if record.outcome == "running"]


def _bytes(record: ReleaseRecord) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()
