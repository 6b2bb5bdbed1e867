"""Who did what, by which plan, with which outcome: append-only records in Postgres, or in a spool until it is there.

Writing a record never fails a step because the database is down. The spool (`<home>/audit/spool.jsonl`, mode 0600,
synced to the disk) is delivered in order before the next record, each exactly once by its id.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, Field, SecretStr, ValidationError

from configs.areas import DatabaseSettings
from configs.errors import ExternalError, KhetError
from configs.settings import Settings, home
from ml.results import Record
from tasks.database import HIDDEN, connect, plain_text

Outcome = Literal["intended", "done", "failed", "undone"]
SCHEMA = Path(__file__).with_name("schema.sql")
_SCHEMA_LOCK = 7_146_203  # any number: two `ensure_schema` at once wait for each other
_SECRET_KEY = re.compile(
    r"pass(word|wd|phrase)?$|secret|token|credential|(api|private|access)_?key|^dsn$|^auth$|auth_?string|authorization",
    re.IGNORECASE,
)
_log = logging.getLogger(__name__)


class AuditRecord(Record):
    """One line of the log. `plan` is JSON without secrets; `at` is the writer's clock."""

    id: uuid.UUID = Field(default_factory=uuid.uuid4)
    at: AwareDatetime
    actor: str
    action: str
    subject: str
    plan: dict[str, Any]
    outcome: Outcome
    detail: str = ""
    run_id: str | None = None


def audit(settings: Settings) -> AuditLog:
    """The audit log that the settings describe. Nothing is contacted yet."""
    return AuditLog(settings.database, home() / "audit" / "spool.jsonl")


def actor() -> str:
    """Who acts: the flow run's id under a Prefect worker, the job's name in CI, else `user@host`."""
    if job := os.environ.get("CI_JOB_NAME") or os.environ.get("GITHUB_WORKFLOW"):
        return f"ci {job}"
    if run := os.environ.get("PREFECT__FLOW_RUN_ID"):
        return f"flow run {run}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


class AuditLog:
    """Append-only. Processes may share the spool; a file lock orders them."""

    def __init__(
        self,
        database: DatabaseSettings,
        spool: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._spool = spool
        self._now = now
        self._pause_until = 0.0

    def __repr__(self) -> str:
        return f"AuditLog(spool={self._spool})"

    def record(
        self,
        actor: str,
        action: str,
        subject: str,
        plan: Mapping[str, Any],
        outcome: Outcome,
        detail: str = "",
        run_id: str | None = None,
    ) -> AuditRecord:
        """Add a record. It is on the disk, and where possible in Postgres, when this returns.

        Raises:
            ExternalError: the spool cannot be written. An action that cannot be recorded should not be done.
        """
        entry = AuditRecord(
            at=self._now(),
            actor=plain_text(actor),
            action=plain_text(action),
            subject=plain_text(subject),
            plan=redact(dict(plan)),
            outcome=outcome,
            detail=plain_text(detail),
            run_id=run_id,
        )
        with self._locked():
            self._append(entry)
            if time.monotonic() >= self._pause_until:
                self._deliver()
        return entry

    def flush(self) -> int:
        """Deliver what the spool holds; returns how many records are still waiting."""
        with self._locked():
            return self._deliver()

    def tail(self, n: int) -> list[AuditRecord]:
        """The last `n` records, newest last: those in Postgres, and those still waiting."""
        with self._locked():
            self._deliver()
            waiting = self._waiting()
        stored: Sequence[AuditRecord] = ()
        if self._database.dsn is not None:
            try:
                stored = self._select(n)
            except KhetError as error:
                _log.warning("only records of this machine's spool are shown: %s", error)
        known = {entry.id for entry in stored}
        merged = sorted([*stored, *(entry for entry in waiting if entry.id not in known)], key=lambda entry: entry.at)
        return merged[-n:] if n > 0 else []

    # Spool --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._spool.with_name(self._spool.name + ".lock")
        try:
            self._spool.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _append(self, entry: AuditRecord) -> None:
        line = entry.model_dump_json().encode() + b"\n"
        try:
            handle = os.open(self._spool, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "r+b") as file:
                os.fchmod(handle, 0o600)
                if _cut_short(file.fileno()):  # a writer was killed in the middle of a line
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(handle)
        except OSError as error:
            raise self._unwritable(error) from error

    def _waiting(self) -> list[AuditRecord]:
        try:
            lines = self._spool.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unwritable(error) from error
        entries = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entries.append(AuditRecord.model_validate_json(line))
            except ValidationError:
                _log.error("%s: line %d is not an audit record; it stays in %s", self._spool, number, self._rejects())
                self._keep_reject(line)
        return entries

    def _deliver(self) -> int:
        """Send the spool, oldest first; returns how many wait."""
        waiting = self._waiting()
        if not waiting or self._database.dsn is None:
            return len(waiting)
        began = time.monotonic()
        try:
            self._insert(waiting)
        except KhetError as error:
            # A database that hangs may not slow every record down: it gets a tenth of the time at most.
            self._pause_until = time.monotonic() + 10 * (time.monotonic() - began)
            _log.warning("%d audit records wait in %s: %s", len(waiting), self._spool, error)
            return len(waiting)
        # Killed here, the records are sent once more and their ids are already known.
        try:
            self._spool.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        return 0

    def _rejects(self) -> Path:
        return self._spool.with_name("rejected.jsonl")

    def _keep_reject(self, line: bytes) -> None:
        handle = os.open(self._rejects(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(line + b"\n")

    def _unwritable(self, error: OSError) -> ExternalError:
        return ExternalError(
            f"The audit spool {self._spool} cannot be written: {error.strerror or error}. The action was not recorded, "
            "so it is not done.\nNext: make room or correct the folder's owner, then run the same again.",
            retryable=False,
        )

    # Postgres -----------------------------------------------------------------------------------------------------

    def _insert(self, entries: Sequence[AuditRecord]) -> None:
        statement = (
            "INSERT INTO audit_log (id, at, actor, action, subject, plan, outcome, detail, run_id) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (id) DO NOTHING"
        )
        rows = [
            (e.id, e.at, e.actor, e.action, e.subject, json.dumps(e.plan), e.outcome, e.detail, e.run_id)
            for e in entries
        ]
        with connect(self._database, "audit_log") as connection, connection.cursor() as cursor:
            cursor.executemany(statement, rows)

    def _select(self, n: int) -> list[AuditRecord]:
        statement = (
            "SELECT id, at, actor, action, subject, plan, outcome, detail, run_id FROM audit_log "
            "ORDER BY at DESC, stored_at DESC LIMIT %s"
        )
        names = list(AuditRecord.model_fields)
        with connect(self._database, "audit_log") as connection:
            rows = connection.execute(statement, [max(n, 0)]).fetchall()
        return [AuditRecord.model_validate(dict(zip(names, row, strict=True))) for row in reversed(rows)]


def ensure_schema(dsn: str, connect_timeout_s: int = 5) -> None:
    """Create the audit table where it is missing. May be run again, and by several at once.

    Raises:
        ConfigError: the DSN is wrong.
        ExternalError: the database does not answer.
    """
    database = DatabaseSettings(dsn=SecretStr(dsn), connect_timeout_s=connect_timeout_s)
    with connect(database, "audit_log") as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_SCHEMA_LOCK])
        connection.execute(SCHEMA.read_bytes())


def redact(value: Any) -> Any:
    """`value` as JSON holds it, without secrets: SecretStr, keys that name a secret, passwords inside addresses."""
    if isinstance(value, BaseModel):
        return redact(value.model_dump())
    if isinstance(value, Mapping):
        return {plain_text(str(key)): _redact_under(str(key), inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redact(inner) for inner in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)  # JSON has no NaN
    return plain_text(str(value))


def _redact_under(key: str, value: Any) -> Any:
    hidden = value is not None and not isinstance(value, (bool, Mapping)) and _SECRET_KEY.search(key)
    return HIDDEN if hidden else redact(value)


def _cut_short(handle: int) -> bool:
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"
