"""Pure decisions of the registry: which version comes next, and which entries a move of an alias needs."""

from __future__ import annotations

from collections.abc import Collection

from ml.version import FIRST, Bump, Version
from tasks.registry.records import AliasMove, AliasName


def next_version(taken: Collection[Version], bump: Bump) -> Version:
    """The version after the highest that was ever taken; the first is v1.0.0."""
    return max(taken).next(bump) if taken else FIRST


def needs_move(last: AliasMove | None, target: Version | None) -> bool:
    """Whether an alias whose last entry is `last` has to move to reach `target` (None: point nowhere)."""
    return (last.to if last else None) != target


def displaced(name: AliasName, current: Version | None, target: Version) -> Version | None:
    """The version that `previous` has to name before `name` moves from `current` to `target`; None: leave it."""
    return current if name == "production" and current != target else None
