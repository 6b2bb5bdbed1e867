"""Drives the fleet to the desired state: starts, checks, restarts, adopts and retires replicas."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ExternalError
from tasks.cluster import Track
from tasks.cluster.node import processes, rolling
from tasks.cluster.node.fleet import Fleet, Health, Replica
from tasks.cluster.node.state import Desired, DesiredTrack, ReplicaRecord, utcnow
from tasks.cluster.node.store import Store
from tasks.cluster.node.upstream import BrokenError, Pool

log = logging.getLogger(__name__)

TICK_S = 0.1
_CHECK_TIMEOUT_S = 2.0
_SLOW_AFTER = 2  # health checks in a row without an answer
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
_STEADY_S = 60.0  # ready for this long: earlier deaths no longer count
_HOPELESS_DEATHS = 2
_HUNG_S = 30.0  # a replica that served and has failed its health checks for this long is started anew
_READY = b"GET /readyz HTTP/1.1\r\nHost: replica\r\n\r\n"
# Exit codes of `KhetError`s that may go away by themselves (an object store that was not there): keep trying.
_RETRYABLE_EXITS = (ExternalError.exit_code,)

Report = Callable[[str, str, str], None]


@dataclass(frozen=True, slots=True)
class Launch:
    """How replicas are started and ended. `command` gets `--host --port --name` appended."""

    command: tuple[str, ...]
    home: Path
    check_interval_s: float
    drain_s: float


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a track is as desired; where not: why, whether waiting is pointless, and what the failing one printed."""

    ready: bool
    hopeless: bool
    reason: str
    log_tail: tuple[str, ...] = ()


class Supervisor:
    """Owns the replicas. `report(kind, subject, detail)` records an event."""

    def __init__(self, store: Store, fleet: Fleet, launch: Launch, report: Report) -> None:
        self._store = store
        self._fleet = fleet
        self._launch = launch
        self._report = report
        self._tasks: set[asyncio.Task[None]] = set()
        self._disk = asyncio.Lock()
        self._now = asyncio.get_running_loop().time
        self.wake = asyncio.Event()
        self.stopping = False

    # Adoption

    async def adopt(self) -> None:
        """Take over what an earlier node started: running replicas go on untouched, dead ones are started again by the
        first pass, and processes that nobody recorded are ended."""
        records, damaged = await asyncio.to_thread(self._store.load_replicas)
        running = await asyncio.to_thread(processes.find, self._store.root)
        for path in damaged:
            self._report("damaged", path.stem, "the record cannot be read; its process is ended")
            await asyncio.to_thread(path.unlink)
        for record in records:
            self._adopt_one(record, running.pop(record.name, None))
        for name, handle in running.items():
            self._report("orphan", name, f"process {handle.pid} is on no record; it is ended")
            self._spawn_task(self._end(handle, name))

    def _adopt_one(self, record: ReplicaRecord, handle: processes.Handle | None) -> None:
        replica = Replica(record, Pool(record.port))
        if handle is not None:
            replica.handle = handle
            replica.record = record.model_copy(update={"pid": handle.pid, "created": handle.created})
            self._report("adopted", record.name, f"process {handle.pid}")
        self._enlist(replica)
        if record.retiring:
            self._spawn_task(self._retire(replica))

    def _enlist(self, replica: Replica) -> None:
        self._fleet.add(replica)
        self._spawn_task(self._watch_health(replica))

    # The loop

    async def tick(self, desired: Desired) -> None:
        """One pass: notice deaths, restart, then take the next step of every track."""
        for replica in self._fleet:
            self._notice_death(replica)
            self._end_hung(replica)
        for track in Track:
            await self._step(track, desired.tracks.get(track))
        for replica in self._fleet:
            if replica.handle is None and not replica.record.retiring and self._now() >= replica.start_at:
                await self._start(replica)

    def _notice_death(self, replica: Replica) -> None:
        if replica.handle is None or (code := replica.handle.exit_code()) is None:
            return
        replica.handle, replica.last_exit = None, code
        was_steady = replica.ready_since and self._now() - replica.ready_since > _STEADY_S
        replica.health, replica.ready_since, replica.unwell_since = Health.down, 0.0, 0.0
        replica.pool.abort()
        if replica.record.retiring:
            return
        replica.deaths = 1 if was_steady else replica.deaths + 1
        pause = _BACKOFF_S[min(replica.deaths - 1, len(_BACKOFF_S) - 1)]
        replica.start_at = self._now() + pause
        replica.record = replica.record.model_copy(update={"restarts": replica.record.restarts + 1, "pid": 0})
        self._report("died", replica.name, f"{_ended(code)}; started again in {pause:g} s")

    def _end_hung(self, replica: Replica) -> None:
        if not replica.unwell_since or replica.handle is None or not replica.record.served:
            return
        if self._now() - replica.unwell_since > _HUNG_S and not replica.record.retiring:
            self._report("killed", replica.name, f"failed its health checks for {_HUNG_S:g} s")
            replica.unwell_since = 0.0
            replica.handle.signal(signal.SIGKILL)

    async def _step(self, track: Track, wanted: DesiredTrack | None) -> None:
        replicas = {r.name: r for r in self._fleet.on(track) if not r.record.retiring}
        views = [_view(replica, wanted) for replica in replicas.values()]
        count = wanted.replicas if wanted else 0
        step = rolling.plan(count, count if wanted and wanted.fast else 1, views)
        for name in step.retire:
            await self._begin_retiring(replicas[name])
        for _ in range(step.start):
            if wanted is not None:
                await self._add(track, wanted)

    async def _add(self, track: Track, wanted: DesiredTrack) -> None:
        name = f"{track}-{wanted.version}-{uuid.uuid4().hex[:6]}"
        port = processes.free_port(self._fleet.ports())
        record = ReplicaRecord(
            name=name,
            track=track,
            version=wanted.version,
            generation=wanted.generation,
            port=port,
            started_at=utcnow(),
        )
        replica = Replica(record, Pool(port))
        self._enlist(replica)
        await self._start(replica)

    async def _start(self, replica: Replica) -> None:
        """Start the process. On record first: a node killed in between finds it by its marks."""
        try:
            replica.record = replica.record.model_copy(update=self._fresh(replica))
            replica.pool = Pool(replica.record.port)
            await self._save(replica)
            replica.handle = await asyncio.to_thread(self._launch_process, replica.record)
            replica.record = replica.record.model_copy(
                update={"pid": replica.handle.pid, "created": replica.handle.created}
            )
            replica.health = Health.starting
            self._report("started", replica.name, f"process {replica.record.pid}, port {replica.record.port}")
            await self._save(replica)
        except ExternalError as error:
            replica.start_at = self._now() + 1.0
            self._report("failed", replica.name, str(error))

    def _fresh(self, replica: Replica) -> dict[str, Any]:
        """A restart gets a port of its own: something else may have taken the old one."""
        port = processes.free_port(self._fleet.ports()) if replica.record.restarts else replica.record.port
        return {"port": port, "pid": 0, "started_at": utcnow()}

    def _launch_process(self, record: ReplicaRecord) -> processes.Handle:
        command = [*self._launch.command, "--host", "127.0.0.1", "--port", str(record.port), "--name", record.name]
        environment = {
            **os.environ,
            **processes.marks(self._store.root, record.name),
            "KHET_HOME": str(self._launch.home),
            "MODEL_VERSION": record.version,
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
        }
        return processes.start(command, environment, self._store.log_path(record.name))

    # Health

    async def _watch_health(self, replica: Replica) -> None:
        """Check /readyz until the replica is gone; at once when a request found it broken."""
        while replica in self._fleet:
            if replica.handle is not None and not replica.record.retiring:
                await self._check(replica)
            pause = self._launch.check_interval_s if replica.health is Health.ready else TICK_S
            try:
                async with asyncio.timeout(pause):
                    await replica.check_now.wait()
            except TimeoutError:
                continue
            replica.check_now.clear()

    async def _check(self, replica: Replica) -> None:
        handle = replica.handle
        try:
            answer = await replica.pool.send(_READY, b"", _CHECK_TIMEOUT_S)
        except BrokenError:
            found = Health.down
        except TimeoutError:
            found = Health.slow
        else:
            found = Health.ready if answer.status == 200 else Health.down
        if replica.handle is handle and not replica.record.retiring:  # else it died or was replaced meanwhile
            self._judge(replica, found)

    def _judge(self, replica: Replica, found: Health) -> None:
        before = replica.health
        if found is Health.slow:
            replica.failed_checks += 1
            if before is not Health.ready or replica.failed_checks < _SLOW_AFTER:
                return
        else:
            replica.failed_checks = 0
        if before is Health.starting and found is Health.down:
            return
        replica.health = found
        if found is not before:
            self._changed(replica, before)

    def _changed(self, replica: Replica, before: Health) -> None:
        self._report(replica.health.value, replica.name, f"was {before}")
        replica.unwell_since = 0.0 if replica.health is Health.ready else self._now()
        if replica.health is Health.ready:
            replica.ready_since = self._now()
            self._mark_served(replica)
            self._fleet.announce()
        elif replica.health is Health.slow and self._has_stand_in(replica):
            replica.pool.abort()  # a stopped process never answers: let its requests go to another replica
        self.wake.set()

    def _has_stand_in(self, replica: Replica) -> bool:
        return any(self._fleet.ready_count(track) for track in {replica.record.track, Track.stable})

    def _mark_served(self, replica: Replica) -> None:
        if not replica.record.served:
            replica.record = replica.record.model_copy(update={"served": True})
            self._spawn_task(self._try_save(replica))

    async def _save(self, replica: Replica) -> None:
        """Write the record as it is when its turn comes, so that no older one overtakes a newer one."""
        async with self._disk:
            if replica in self._fleet:
                await asyncio.to_thread(self._store.save_replica, replica.record)

    async def _try_save(self, replica: Replica) -> None:
        """Where the process already runs: it is found by its marks when the record is behind."""
        try:
            await self._save(replica)
        except ExternalError as error:
            self._report("failed", replica.name, str(error))

    # Retiring

    async def _begin_retiring(self, replica: Replica) -> None:
        """No new requests from this moment; the rest happens beside the loop."""
        replica.record = replica.record.model_copy(update={"retiring": True})
        self._report("retiring", replica.name, f"{replica.in_flight} requests in flight")
        await self._try_save(replica)
        self._spawn_task(self._retire(replica))

    async def _retire(self, replica: Replica) -> None:
        deadline = self._now() + self._launch.drain_s
        while replica.in_flight and replica.handle is not None and self._now() < deadline and not self.stopping:
            await asyncio.sleep(0.02)
        if replica.handle is not None:
            await self._end(replica.handle, replica.name)
        self._fleet.discard(replica)
        replica.pool.abort()
        replica.check_now.set()
        async with self._disk:
            await asyncio.to_thread(self._store.forget_replica, replica.name)
        self._report("stopped", replica.name, "drained")
        self.wake.set()

    async def _end(self, handle: processes.Handle, name: str, patience_s: float | None = None) -> None:
        """SIGTERM, and SIGKILL when that is not enough."""
        handle.signal(signal.SIGTERM)
        deadline = self._now() + (self._launch.drain_s if patience_s is None else patience_s)
        while handle.exit_code() is None:
            if self._now() >= deadline:
                self._report("killed", name, "did not end when asked to")
                handle.signal(signal.SIGKILL)
                deadline = float("inf")
            await asyncio.sleep(0.02)

    async def stop_all(self, patience_s: float) -> None:
        """End every replica; for the shutdown of the whole node. Those retiring already are not waited for longer."""
        self.stopping = True
        running = [(r.handle, r.name) for r in self._fleet if r.handle is not None]
        await asyncio.gather(*(self._end(handle, name, patience_s) for handle, name in running))
        for replica in self._fleet:
            await asyncio.to_thread(self._store.forget_replica, replica.name)

    async def close(self) -> None:
        """Stop watching; the processes are left as they are."""
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a background step of the node failed", exc_info=error)

    # Reading

    def readiness(self, track: Track, wanted: DesiredTrack) -> Readiness:
        """Whether exactly the desired replicas serve the track."""
        replicas = self._fleet.on(track)
        current = [r for r in replicas if _is_current(r, wanted) and not r.record.retiring]
        ready = sum(r.takes_requests for r in current)
        if ready == wanted.replicas == len(replicas):
            return Readiness(True, False, f"{ready} replicas of {wanted.version} are ready on {track}")
        reason = f"{ready} of {wanted.replicas} replicas of {wanted.version} are ready on {track}"
        worst = max(current, key=lambda r: (not r.takes_requests, r.deaths), default=None)
        if worst is None or worst.takes_requests:
            others = len(replicas) - len(current)
            return Readiness(False, False, f"{reason}; {others} others are still being replaced")
        if worst.last_exit is not None:
            reason += f"; {worst.name} {_ended(worst.last_exit)} ({worst.deaths} times)"
        return Readiness(False, _is_hopeless(worst), reason, tuple(self._store.log_tail(worst.name, 15)))


def _view(replica: Replica, wanted: DesiredTrack | None) -> rolling.View:
    return rolling.View(
        name=replica.name,
        current=wanted is not None and _is_current(replica, wanted),
        ready=replica.takes_requests,
        served=replica.record.served,
    )


def _is_current(replica: Replica, wanted: DesiredTrack) -> bool:
    return (replica.record.version, replica.record.generation) == (wanted.version, wanted.generation)


def _is_hopeless(replica: Replica) -> bool:
    """It never served and ends by itself each time, with a reason that trying again will not change."""
    code = replica.last_exit
    own = code is not None and code > 0 and code not in _RETRYABLE_EXITS
    return own and not replica.record.served and replica.deaths >= _HOPELESS_DEATHS


def _ended(code: int) -> str:
    if code == processes.EXIT_UNKNOWN:
        return "ended"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
