"""Which versions served production, newest first: for `khet rollback --history` and before a rollback."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from pydantic import AwareDatetime

from flows.books import Books
from flows.systems import Systems
from ml.results import Record
from ml.version import Version
from tasks.cluster import ClusterStatus, Kept, Pending, Served, Track
from tasks.cluster.memory import REMEMBERED
from tasks.registry import AliasMove

_READ_S: Final = 20.0
_VERIFY_S: Final = 120.0  # every stored byte of up to REMEMBERED versions
_AT_ONCE: Final = 4


class HistoryRow(Record):
    """A time that a version served. `kept_ready` of its replicas are warm until `kept_until`; `verifies` None: not
    known; `problem` says why it does not."""

    version: str
    at: AwareDatetime
    by: str
    reason: str
    took_s: float | None = None
    serves: bool = False
    kept_until: AwareDatetime | None = None
    kept_ready: int | None = None
    verifies: bool | None = None
    problem: str = ""


class History(Record):
    """The rows, newest first; `pending` is a rollback that is not finished; `registry` why it did not answer."""

    rows: tuple[HistoryRow, ...]
    pending: Pending | None = None
    registry: str = "answers"

    def lines(self) -> list[str]:
        """A line a row, for people."""
        return [_line(row) for row in self.rows]


def read_history(books: Books, *, verified: bool = True) -> History:
    """What the cluster remembers, and what the registry knows of the time before; `verified`: every version is held
    against its manifest.

    Raises:
        ExternalError: the cluster does not answer.
    """
    memory, status = books.systems.cluster.memory(), books.systems.cluster.status()
    moves = books.ask("reading its history", lambda s: s.registry.alias_history("production"), _READ_S) or ()
    entries = merged(memory.served, moves)[:REMEMBERED]
    checks: dict[str, str] | None = None
    if verified:
        versions = {entry.version for entry in entries}
        checks = books.ask("verifying the versions", lambda s: check_all(s, versions), _VERIFY_S)
    serving = status.versions.get(main_track(status))
    spare = spare_row(entries, memory.kept, status)
    rows = [
        _row(number, entry, memory.kept if number == spare else None, status, checks, serving)
        for number, entry in enumerate(entries)
    ]
    lost = "answers" if books.lost is None else str(books.lost).splitlines()[0]
    return History(rows=tuple(rows), pending=memory.pending, registry=lost)


def merged(remembered: Sequence[Served], moves: Sequence[AliasMove]) -> list[Served]:
    """What the cluster remembers, then the registry's older moves. Pure."""
    entries = list(remembered)
    for move in reversed(moves):
        older = not entries or move.at < entries[-1].at
        if move.to is None or not older or (entries and entries[-1].version == str(move.to)):
            continue
        entries.append(Served(version=str(move.to), at=move.at, by=move.by, reason=move.reason))
    return entries


def check_all(systems: Systems, versions: set[str]) -> dict[str, str]:
    """What is wrong with each version; empty where it verifies."""

    def check(name: str) -> str:
        found = systems.registry.verify(Version.parse(name))
        return "" if found.ok else "; ".join(found.problems) or "not signed by a trusted key"

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(versions, pool.map(check, versions), strict=True))


def main_track(status: ClusterStatus) -> Track:
    """The track of production's traffic."""
    return Track.previous if status.weights.get(Track.previous) else Track.stable


def spare_row(entries: Sequence[Served], kept: Kept | None, status: ClusterStatus) -> int | None:
    """The newest row of the version that is kept warm, and does not serve anyway."""
    there = status.versions.get(Track.previous)
    if kept is None or status.weights.get(Track.previous) or kept.version != str(there):
        return None
    return next((number for number, entry in enumerate(entries) if entry.version == kept.version), None)


def _row(
    number: int,
    entry: Served,
    kept: Kept | None,
    status: ClusterStatus,
    checks: dict[str, str] | None,
    serving: Version | None,
) -> HistoryRow:
    ready = sum(r.ready for r in status.replicas if r.track is Track.previous)
    problem = checks.get(entry.version) if checks is not None else None
    return HistoryRow(
        version=entry.version,
        at=entry.at,
        by=entry.by,
        reason=entry.reason,
        took_s=entry.took_s,
        serves=number == 0 and entry.version == str(serving),
        kept_until=kept.until if kept else None,
        kept_ready=ready if kept else None,
        verifies=None if problem is None else not problem,
        problem=problem or "",
    )


def _line(row: HistoryRow) -> str:
    marks = ["serves"] if row.serves else []
    if row.kept_until is not None:
        marks.append(f"{row.kept_ready} replica(s) kept warm until {row.kept_until:%H:%M} UTC")
    if row.verifies is False:
        marks.append(f"does not verify: {row.problem}")
    more = f" ({', '.join(marks)})" if marks else ""
    return f"{row.version} since {row.at:%Y-%m-%d %H:%M} UTC by {row.by}: {row.reason}{more}"
