"""The values the registry hands out, and the records it keeps beside the versions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from pydantic import AwareDatetime

from ml.bundle import VersionField
from ml.results import Record
from ml.version import Version

AliasName = Literal["production", "previous", "candidate"]
ALIASES: tuple[AliasName, ...] = get_args(AliasName)


class Reservation(Record):
    """Who took a version number. It stays for good, so that a number is never used twice."""

    version: VersionField
    owner: str
    at: AwareDatetime
    discarded_at: AwareDatetime | None = None


class Claim(Record):
    """The way back from an owner to the version it reserved."""

    owner: str
    version: VersionField


class AliasMove(Record):
    """One entry of an alias's history. `to` None: the alias was taken away. `seq` counts from 1."""

    name: AliasName
    seq: int
    moved_from: VersionField | None
    to: VersionField | None
    at: AwareDatetime
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class AliasState:
    """Where an alias points, since when, by whom, and where it pointed before."""

    name: AliasName
    version: Version
    since: datetime
    by: str
    reason: str
    seq: int
    moved_from: Version | None


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A published version, from the listing alone: `size_bytes` and `files` count all that is stored under it."""

    version: Version
    published_at: datetime
    size_bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class FileCheck:
    """One file against the manifest; `problem` is None when it is what was signed."""

    name: str
    size_bytes: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A version, file by file. `signed_by` None: the manifest itself is not trusted, `problems` says why.

    `unlisted` are objects that the manifest does not know (reports written later); they are never loaded.
    """

    version: Version
    signed_by: str | None
    files: tuple[FileCheck, ...]
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is what was signed."""
        return self.signed_by is not None and not self.problems
