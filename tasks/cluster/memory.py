"""What a cluster remembers of the versions it served, for the hour in which the registry does not answer. Pure.

Small on purpose: on Kubernetes it is an annotation, which has its limits.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Final, Literal, Self

from pydantic import AwareDatetime, BeforeValidator, Field

from configs.errors import SafetyError
from ml.results import Record
from ml.version import Version

VersionText = Annotated[str, Field(pattern=r"^v\d{1,6}\.\d{1,6}\.\d{1,6}$")]
REMEMBERED: Final = 20  # a rollback further back than this asks the registry
_LONGEST: Final = 200  # of a person's or a judge's words; all of them are in the journal
Words = Annotated[str, BeforeValidator(lambda text: str(text)[:_LONGEST])]


class Served(Record):
    """A version that served production, since `at`. `took_s`: seconds from the command until it had all traffic, where
    it came by a rollback; `warm`: on replicas that were kept."""

    version: VersionText
    at: AwareDatetime
    by: Words
    reason: Words
    took_s: float | None = None
    warm: bool | None = None


class Pending(Record):
    """A rollback that was begun: traffic, replicas or the registry may still have to follow."""

    run_id: str
    version: VersionText
    previous: VersionText | None
    by: Words
    reason: Words
    at: AwareDatetime


class Kept(Record):
    """The version before the one that serves, kept on replicas without traffic until a rollback needs it."""

    version: VersionText
    until: AwareDatetime


class Turn(Record):
    """Who changes the cluster: the run that took its turn last. Nobody else may until `until`, where that is set."""

    owner: str
    until: AwareDatetime | None = None


class Memory(Record):
    """All of it. `served` is newest first; `revision` counts the changes."""

    format: Literal[1] = 1
    revision: int = 0
    served: tuple[Served, ...] = ()
    pending: Pending | None = None
    kept: Kept | None = None
    turn: Turn | None = None

    def with_served(self, entry: Served) -> Self:
        """The same with one version more; one that is the newest already stays as it is."""
        if self.served and self.served[0].version == entry.version:
            return self
        return self.model_copy(update={"served": (entry, *self.served)[:REMEMBERED]})

    def without(self, done: Pending) -> Self:
        """The same once this rollback is done; one that was begun since stays."""
        if self.pending is None or self.pending.run_id != done.run_id:
            return self
        return self.model_copy(update={"pending": None})

    def before(self, current: Version | None) -> Version | None:
        """The version that served before `current`, None where none is known."""
        found = (Version.parse(entry.version) for entry in self.served)
        return next((version for version in found if version != current), None)

    def taken(self, owner: str, now: datetime, *, alone_s: float | None = None, force: bool = False) -> Self:
        """The same with the turn of `owner`; with `alone_s` nobody else gets one for so many seconds.

        Raises:
            SafetyError: another has it alone; `force` takes it all the same.
        """
        held = self.turn
        if held is not None and held.owner != owner and held.until is not None and held.until > now and not force:
            raise SafetyError(
                f"{held.owner} is rolling the service back (until {held.until:%H:%M:%S} UTC at the latest). Nothing "
                "was changed.\nNext: wait for it; if that run is dead, `khet rollback --force` takes over."
            )
        until = None if alone_s is None else now + timedelta(seconds=alone_s)
        return self.model_copy(update={"turn": Turn(owner=owner, until=until)})

    def given_back(self, owner: str) -> Self:
        """The same without the sole right of `owner`; who took a turn since keeps it."""
        if self.turn is None or self.turn.owner != owner:
            return self
        return self.model_copy(update={"turn": Turn(owner=owner)})

    def is_kept(self, version: Version, now: datetime) -> bool:
        """Whether this version is to be kept warm now."""
        return self.kept is not None and self.kept.version == str(version) and self.kept.until > now
