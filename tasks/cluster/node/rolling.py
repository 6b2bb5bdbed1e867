"""The next step from the replicas that run to those that should, without a moment of too little capacity. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """What a plan needs to know of one replica that is not retiring.

    `current`: of the desired version and generation. `served`: it has been ready at least once.
    """

    name: str
    current: bool
    ready: bool
    served: bool


@dataclass(frozen=True, slots=True)
class Step:
    """Replicas to start and to retire now."""

    start: int = 0
    retire: tuple[str, ...] = ()


def plan(wanted: int, surge: int, replicas: Sequence[View]) -> Step:
    """Return what to do next so that `wanted` current replicas run and no other.

    An old replica that served is retired only for a current one that is ready, so a version that never becomes ready
    takes nothing down. At most `surge` replicas run beyond `wanted` while old ones are left.
    """
    current = [r for r in replicas if r.current]
    old = [r for r in replicas if not r.current]
    kept, dropped = _split_old(old, wanted - sum(r.ready for r in current))
    surplus = _surplus(current, wanted)
    missing = wanted - len(current)
    room = wanted + surge - len(current) - len(kept)
    return Step(start=max(0, min(missing, room)), retire=tuple(r.name for r in (*dropped, *surplus)))


def _split_old(old: Sequence[View], needed: int) -> tuple[list[View], list[View]]:
    """The `needed` best old replicas to keep, and the rest; one that never served is of no use."""
    useful = sorted((r for r in old if r.served or r.ready), key=lambda r: (not r.ready, r.name))
    useless = [r for r in old if not (r.served or r.ready)]
    keep = max(0, needed)
    return useful[:keep], useful[keep:] + useless


def _surplus(current: Sequence[View], wanted: int) -> list[View]:
    """What a scale-down takes: replicas that are not ready first."""
    ranked = sorted(current, key=lambda r: (not r.ready, not r.served, r.name))
    return ranked[wanted:]
