"""The replicas of this moment, and which of them answers next."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from tasks.cluster import Track
from tasks.cluster.node.processes import Handle
from tasks.cluster.node.state import ReplicaRecord
from tasks.cluster.node.upstream import Pool


class Health(enum.StrEnum):
    """starting: never ready yet. ready. slow: does not answer its health check in time. down: refuses, or says so."""

    starting = "starting"
    ready = "ready"
    slow = "slow"
    down = "down"


@dataclass(slots=True, eq=False)
class Replica:
    """One replica while the node runs. `record` is what the disk knows of it."""

    record: ReplicaRecord
    pool: Pool
    handle: Handle | None = None
    health: Health = Health.starting
    in_flight: int = 0
    failed_checks: int = 0
    last_exit: int | None = None
    deaths: int = 0
    ready_since: float = 0.0
    unwell_since: float = 0.0
    start_at: float = 0.0
    check_now: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def takes_requests(self) -> bool:
        return self.health is Health.ready and not self.record.retiring

    def suspect(self) -> None:
        """A connection broke: send nothing more until a health check, due at once, finds it well."""
        if self.health in (Health.ready, Health.slow):
            self.health = Health.down
        self.check_now.set()


class Fleet:
    """All replicas. Tells waiting requests when one becomes ready."""

    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._by_track: dict[Track, list[Replica]] = {track: [] for track in Track}
        self._news = asyncio.Event()

    def __iter__(self) -> Iterator[Replica]:
        return iter(tuple(self._replicas.values()))

    def __contains__(self, replica: Replica) -> bool:
        return self._replicas.get(replica.name) is replica

    def add(self, replica: Replica) -> None:
        self._replicas[replica.name] = replica
        self._by_track[replica.record.track].append(replica)

    def discard(self, replica: Replica) -> None:
        if self._replicas.pop(replica.name, None):
            self._by_track[replica.record.track].remove(replica)

    def on(self, track: Track) -> tuple[Replica, ...]:
        return tuple(self._by_track[track])

    def ports(self) -> set[int]:
        return {replica.record.port for replica in self._replicas.values()}

    def pick(self, track: Track, avoid: Replica | None = None) -> Replica | None:
        """The ready replica with the fewest requests in flight, another than `avoid`.

        When none is ready, one that was too slow for its health checks: under overload every replica is, and sending
        nothing to any of them would make an outage of it.
        """
        best: Replica | None = None
        for replica in self._by_track[track]:
            if replica is avoid or replica.record.retiring or replica.health not in (Health.ready, Health.slow):
                continue
            if best is None or _rank(replica) < _rank(best):
                best = replica
        return best

    def ready_count(self, track: Track) -> int:
        return sum(replica.takes_requests for replica in self._by_track[track])

    def announce(self) -> None:
        """A replica became ready: wake the requests that wait for one."""
        self._news.set()
        self._news = asyncio.Event()

    async def wait_for(self, track: Track, timeout_s: float) -> Replica | None:
        """A replica of the track as soon as there is one, None after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while (found := self.pick(track)) is None:
                    await self._news.wait()
                return found
        except TimeoutError:
            return None


def _rank(replica: Replica) -> tuple[bool, int]:
    return replica.health is not Health.ready, replica.in_flight
