"""Labels in Postgres: stored once, counted for a review."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from configs.areas import DatabaseSettings
from configs.errors import IntegrityError
from tasks.database import connect
from tasks.feedback.labels import Answer

if TYPE_CHECKING:
    import psycopg

SCHEMA: Final = Path(__file__).with_name("schema.sql")
_LOCK: Final = 7_146_204  # any number: two writers wait for each other, so that what they check still holds
_SHOWN_CONFLICTS: Final = 20


@dataclass(frozen=True, slots=True)
class Feedback:
    """A label and the answer it is about. Times are aware."""

    request_id: str
    source: str
    label: str
    answer: Answer
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Added:
    """What became of labels: stored, known before, corrected."""

    new: int
    known: int
    corrected: int


@dataclass(frozen=True, slots=True)
class Tally:
    """Labelled predictions of one version: (wrong, all) by true class. `disputed` ones are in none of them: people
    disagree about what the photo shows."""

    by_class: Mapping[str, tuple[int, int]]
    disputed: int


class FeedbackStore:
    """The table `feedback`. psycopg's errors end here."""

    def __init__(self, database: DatabaseSettings) -> None:
        self._database = database

    def add(self, feedback: Sequence[Feedback], *, correct: bool = False) -> Added:
        """Store all or nothing; what is there already is left alone, so it may be repeated.

        `correct`: a label that its source gave before is replaced.

        Raises:
            IntegrityError: a source has given another label before, or the answer differs from the stored one.
            ExternalError: the database does not answer.
        """
        with connect(self._database, "feedback") as connection:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
            stored = _stored(connection, [item.request_id for item in feedback])
            _refuse_conflicts(feedback, stored, correct=correct)
            new = [item for item in feedback if item.source not in stored.get(item.request_id, {})]
            corrected = [item for item in feedback if _changes(item, stored.get(item.request_id, {}))]
            _write(connection, [*new, *corrected])
        return Added(len(new), len(feedback) - len(new) - len(corrected), len(corrected))

    def tally(self, version: str, start: datetime, end: datetime) -> Tally:
        """Count the labelled predictions that `version` made from `start` to before `end`, each once.

        Raises:
            ExternalError: the database does not answer.
        """
        statement = (
            "SELECT label, count(*), count(*) FILTER (WHERE predicted <> label) FROM ("
            "  SELECT min(predicted) AS predicted, CASE WHEN min(label) = max(label) THEN min(label) END AS label"
            "  FROM feedback WHERE version = %s AND predicted_at >= %s AND predicted_at < %s GROUP BY request_id"
            ") AS prediction GROUP BY label"
        )
        with connect(self._database, "feedback") as connection:
            rows = connection.execute(statement, [version, start, end]).fetchall()
        by_class = {label: (int(wrong), int(total)) for label, total, wrong in rows if label is not None}
        return Tally(by_class, sum(int(total) for label, total, _ in rows if label is None))


def ensure_schema(dsn: str, connect_timeout_s: int = 5) -> None:
    """Create the table where it is missing. May be run again, and by several at once.

    Raises:
        ConfigError: the DSN is wrong.
        ExternalError: the database does not answer.
    """
    database = DatabaseSettings(dsn=SecretStr(dsn), connect_timeout_s=connect_timeout_s)
    with connect(database, "feedback") as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        connection.execute(SCHEMA.read_bytes())


@dataclass(frozen=True, slots=True)
class _Stored:
    label: str
    answer: Answer


def _stored(connection: psycopg.Connection[Any], request_ids: Sequence[str]) -> dict[str, dict[str, _Stored]]:
    """What is known of these predictions, by id and source."""
    statement = (
        "SELECT request_id, source, label, version, predicted, predicted_at FROM feedback WHERE request_id = ANY(%s)"
    )
    found: dict[str, dict[str, _Stored]] = {}
    for request_id, source, label, *answer in connection.execute(statement, [list(request_ids)]):
        found.setdefault(request_id, {})[source] = _Stored(label, Answer(*answer))
    return found


def _changes(item: Feedback, stored: Mapping[str, _Stored]) -> bool:
    mine = stored.get(item.source)
    return mine is not None and mine.label != item.label


def _refuse_conflicts(
    feedback: Sequence[Feedback], stored: Mapping[str, Mapping[str, _Stored]], *, correct: bool
) -> None:
    conflicts = [text for item in feedback if (text := _conflict(item, stored.get(item.request_id, {}), correct))]
    if conflicts:
        more = [f"and {len(conflicts) - _SHOWN_CONFLICTS} more"] if len(conflicts) > _SHOWN_CONFLICTS else []
        lines = "\n".join(f"  {text}" for text in [*conflicts[:_SHOWN_CONFLICTS], *more])
        raise IntegrityError(
            f"Labels contradict what is stored, and nothing was imported.\n{lines}\n"
            "Next: correct the file, or replace labels of the same source with `--correct`."
        )


def _conflict(item: Feedback, stored: Mapping[str, _Stored], correct: bool) -> str:
    """What speaks against an item; empty: nothing."""
    for source, known in stored.items():
        if known.answer != item.answer:
            answered = f"{known.answer.version} answered {known.answer.predicted} at {known.answer.predicted_at}"
            return f"{item.request_id}: by what {source} labelled, {answered}"
    if _changes(item, stored) and not correct:
        return f"{item.request_id}: {item.source} labelled it {stored[item.source].label} before, now {item.label}"
    return ""


def _write(connection: psycopg.Connection[Any], feedback: Sequence[Feedback]) -> None:
    statement = (
        "INSERT INTO feedback (request_id, source, label, version, predicted, predicted_at, received_at) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (request_id, source) "
        "DO UPDATE SET label = EXCLUDED.label, received_at = EXCLUDED.received_at, stored_at = clock_timestamp()"
    )
    rows = [
        (f.request_id, f.source, f.label, f.answer.version, f.answer.predicted, f.answer.predicted_at, f.received_at)
        for f in feedback
    ]
    with connection.cursor() as cursor:
        cursor.executemany(statement, rows)
