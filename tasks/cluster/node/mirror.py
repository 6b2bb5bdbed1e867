"""Copies of requests to a track whose answers nobody sees, compared by class with the answers users got."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from tasks.cluster import Track
from tasks.cluster.node.answers import Prediction, read_prediction
from tasks.cluster.node.counters import Counters, Difference
from tasks.cluster.node.fleet import Fleet, Replica
from tasks.cluster.node.state import utcnow
from tasks.cluster.node.upstream import Answer, BrokenError

# The counters of a replica's version on a track; without a replica those of the version the track should run.
Book = Callable[[Track, Replica | None], Counters]

_AT_ONCE = 4  # copies under way on one track: users' requests need the processors more
_MAX_WAITING = 64
_MAX_WAITING_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Copy:
    """A request that a user got an answer to: version `served_by` said `served`. `head` and `body` as sent to the
    replica."""

    request_id: str
    head: bytes
    body: bytes
    served_by: str
    served: Prediction | None


class Mirror:
    """Sends copies in the background, few at a time; what does not fit is dropped and counted."""

    def __init__(self, fleet: Fleet, book: Book, timeout_s: float) -> None:
        self._fleet = fleet
        self._book = book
        self._timeout_s = timeout_s
        self._slots = {track: asyncio.Semaphore(_AT_ONCE) for track in Track}
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0

    def offer(self, track: Track, copy: Copy) -> None:
        """Send a copy when there is room; returns at once."""
        if len(self._tasks) >= _MAX_WAITING or self._bytes + len(copy.body) > _MAX_WAITING_BYTES:
            self._book(track, None).shadow_dropped += 1
        else:
            self._bytes += len(copy.body)
            task = asyncio.create_task(self._send(track, copy))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, track: Track, copy: Copy) -> None:
        try:
            async with self._slots[track]:
                if (replica := self._fleet.pick(track)) is not None:
                    await self._exchange(replica, copy)
                else:
                    self._book(track, None).shadow_errors += 1
        finally:
            self._bytes -= len(copy.body)

    async def _exchange(self, replica: Replica, copy: Copy) -> None:
        counters = self._book(replica.record.track, replica)
        clock = asyncio.get_running_loop().time
        replica.in_flight += 1
        began = clock()
        try:
            answer = await replica.pool.send(copy.head, copy.body, self._timeout_s)
        except BrokenError:
            counters.shadow_errors += 1
            replica.suspect()
        except TimeoutError:
            counters.shadow_errors += 1
            counters.shadow_latency.add((clock() - began) * 1e3)
        else:
            counters.shadow_latency.add((clock() - began) * 1e3)
            self._compare(counters, replica, copy, answer)
        finally:
            replica.in_flight -= 1

    def _compare(self, counters: Counters, replica: Replica, copy: Copy, answer: Answer) -> None:
        mirrored = read_prediction(answer.body) if answer.status == 200 else None
        if mirrored is None or copy.served is None:
            counters.shadow_errors += mirrored is None
        elif counters.compared(copy.served, mirrored):
            served, version = copy.served.named, replica.record.version
            difference = Difference(utcnow(), copy.request_id, copy.served_by, served, version, mirrored.named)
            counters.examples.append(difference)
