"""Model versions: `vMAJOR.MINOR.PATCH` (https://semver.org, without pre-release and build parts)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError

Bump = Literal["major", "minor", "patch"]
_PATTERN = re.compile(r"v(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})\.(0|[1-9]\d{0,5})")


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """An immutable model version; orders as semantic versioning does."""

    major: int
    minor: int
    patch: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `v1.3.0`.

        Raises:
            ConfigError: `text` is not a version.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(f"{text!r} is not a model version; versions look like v1.3.0.")
        return cls(*(int(part) for part in match.groups()))

    def next(self, bump: Bump) -> Version:
        """The version after this one."""
        if bump == "major":
            return Version(self.major + 1, 0, 0)
        if bump == "minor":
            return Version(self.major, self.minor + 1, 0)
        return Version(self.major, self.minor, self.patch + 1)

    def __str__(self) -> str:
        return f"v{self.major}.{self.minor}.{self.patch}"


FIRST = Version(1, 0, 0)


def is_version(text: str) -> bool:
    """Whether `text` is written as a version."""
    return _PATTERN.fullmatch(text) is not None
