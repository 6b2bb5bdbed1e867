"""Aliases: small pointers with a history. `aliases/<name>.json` is for people and tools, the history is the truth.

A move first adds the next numbered entry with `If-None-Match: *`, so of two movers one wins, then rewrites the pointer.
A process killed between the two leaves a pointer that is one entry behind; readers look one entry ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from pydantic import ValidationError

from configs.errors import ExternalError, IntegrityError
from ml.objects import ObjectMissing, ObjectStore
from ml.version import Version
from tasks.registry.policy import needs_move
from tasks.registry.records import AliasMove, AliasName, AliasState

_TRIES = 20


class Aliases:
    """The pointers of one bucket."""

    def __init__(self, store: ObjectStore, bucket: str, now: Callable[[], datetime]) -> None:
        self._store = store
        self._bucket = bucket
        self._now = now

    def get(self, name: AliasName) -> AliasState | None:
        """Where the alias points; None: nowhere."""
        return _state(self._last(name))

    def history(self, name: AliasName) -> Sequence[AliasMove]:
        """Every move, oldest first."""
        keys = [info.key for info in self._store.list(self._bucket, f"aliases/history/{name}/")]
        return [self._read(key) for key in keys]

    def move(self, name: AliasName, target: Version | None, *, by: str, reason: str) -> AliasMove | None:
        """Point the alias at `target`. Moving to where it points adds nothing, but mends the pointer."""
        for _ in range(_TRIES):
            last = self._last(name)
            if not needs_move(last, target):
                self._mend(name, last)
                return last
            move = AliasMove(
                name=name,
                seq=last.seq + 1 if last else 1,
                moved_from=last.to if last else None,
                to=target,
                at=self._now(),
                by=by,
                reason=reason,
            )
            if self._store.put(self._bucket, _entry(name, move.seq), _json(move), if_absent=True):
                self._store.put(self._bucket, _pointer(name), _json(move), content_type="application/json")
                return move
        raise ExternalError(f"Alias {name} was moved by others {_TRIES} times in a row. It was not moved to {target}.")

    def _mend(self, name: AliasName, last: AliasMove | None) -> None:
        if last is not None and self._pointed(name) != last:
            self._store.put(self._bucket, _pointer(name), _json(last), content_type="application/json")

    def _last(self, name: AliasName) -> AliasMove | None:
        pointed = self._pointed(name)
        if not self._store.exists(self._bucket, _entry(name, pointed.seq + 1 if pointed else 1)):
            return pointed
        return self.history(name)[-1]

    def _pointed(self, name: AliasName) -> AliasMove | None:
        try:
            return self._read(_pointer(name))
        except ObjectMissing:
            return None

    def _read(self, key: str) -> AliasMove:
        try:
            return AliasMove.model_validate_json(self._store.get(self._bucket, key))
        except ValidationError as error:
            raise IntegrityError(
                f"s3://{self._bucket}/{key} is not an alias: {error}. Traffic is untouched.\n"
                "Next: look at aliases/history/ and restore the object from a backup."
            ) from error


def _state(move: AliasMove | None) -> AliasState | None:
    if move is None or move.to is None:
        return None
    return AliasState(move.name, move.to, move.at, move.by, move.reason, move.seq, move.moved_from)


def _pointer(name: AliasName) -> str:
    return f"aliases/{name}.json"


def _entry(name: AliasName, seq: int) -> str:
    return f"aliases/history/{name}/{seq:08d}.json"


def _json(move: AliasMove) -> bytes:
    return (move.model_dump_json(indent=2) + "\n").encode()
