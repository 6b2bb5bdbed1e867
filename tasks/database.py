"""Connections to PostgreSQL: time limits, and errors that are the project's own and quote no password."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from configs.areas import DatabaseSettings
from configs.errors import ConfigError, ExternalError, IntegrityError

if TYPE_CHECKING:
    import psycopg

HIDDEN: Final = "**********"
_STATEMENT_TIMEOUT_MS: Final = 10_000
_SECRET_TEXT = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@/]+@|(?P<word>password=)\S+", re.IGNORECASE)


@contextlib.contextmanager
def connect(database: DatabaseSettings, table: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection with time limits; committed at the end, undone after an exception. psycopg's exceptions end here.

    Raises:
        ConfigError: no DSN is set.
        IntegrityError: the database does not hold `table` as it should be.
        ExternalError: it does not answer.
    """
    import psycopg

    if database.dsn is None:
        raise ConfigError("database.dsn is not set. Next: `khet up`, or set KHET_DATABASE__DSN.")
    dsn = database.dsn.get_secret_value()
    limits = f"-c statement_timeout={_STATEMENT_TIMEOUT_MS} -c lock_timeout={_STATEMENT_TIMEOUT_MS}"
    try:
        own = psycopg.conninfo.conninfo_to_dict(dsn).get("options") or ""
        with psycopg.connect(
            dsn, connect_timeout=database.connect_timeout_s, options=f"{own} {limits}".strip()
        ) as connection:
            yield connection
    except psycopg.ProgrammingError as error:
        raise IntegrityError(f"{table} cannot be used: {_first_line(error)}. Next: `khet up` makes it.") from None
    except psycopg.Error as error:
        # Not chained: a connection error may quote the connection string.
        raise ExternalError(f"PostgreSQL did not take it: {_first_line(error)}. Next: `khet status`.") from None


def plain_text(text: str) -> str:
    """Passwords in addresses are hidden; what Postgres cannot store (NUL, half characters) is replaced."""
    hidden = _SECRET_TEXT.sub(lambda m: f"{m['head'] or m['word']}{HIDDEN}{'@' if m['head'] else ''}", text)
    return hidden.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")


def _first_line(error: Exception) -> str:
    return plain_text(str(error).strip().partition("\n")[0])
