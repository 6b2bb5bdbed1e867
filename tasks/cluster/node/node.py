"""The node: desired state, lease, gateway and supervisor as one."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, ExternalError, KhetError
from configs.settings import Settings
from ml import hardware
from tasks.cluster import Track
from tasks.cluster.memory import Memory
from tasks.cluster.node import metrics, policy, processes
from tasks.cluster.node.counters import Counters, Ledger
from tasks.cluster.node.fleet import Fleet, Replica
from tasks.cluster.node.gateway import Gateway, Limits
from tasks.cluster.node.mirror import Mirror
from tasks.cluster.node.routing import Router
from tasks.cluster.node.state import Desired, Event, ReplicaRecord, utcnow
from tasks.cluster.node.store import Store
from tasks.cluster.node.supervisor import TICK_S, Launch, Readiness, Supervisor

log = logging.getLogger(__name__)

_HOUSEKEEPING_S = 10.0
_SHUTDOWN_PATIENCE_S = 4.0  # `khet down` promises to be done in 8


@dataclass(frozen=True, slots=True)
class Options:
    """What the node takes from the settings."""

    token: str
    launch: Launch
    limits: Limits

    @classmethod
    def from_settings(cls, settings: Settings, home: Path) -> Options:
        """Read the options.

        Raises:
            ConfigError: no token is set.
        """
        if settings.cluster.node_token is None:
            raise ConfigError("cluster.node_token is not set: the node would be open to everyone. Nothing was started.")
        cluster, serving = settings.cluster, settings.serving
        command = cluster.replica_command or (sys.executable, "-m", "ml.serve")
        return cls(
            token=settings.cluster.node_token.get_secret_value(),
            launch=Launch(tuple(command), home, cluster.health_interval_s, serving.drain_s),
            limits=Limits(
                serving.max_body_bytes, serving.body_timeout_s, cluster.request_timeout_s, cluster.max_in_flight
            ),
        )


class Node:
    """All of it. Make it inside a running event loop; `clock` is the wall clock that leases are measured by."""

    def __init__(self, store: Store, options: Options, clock: Callable[[], datetime] = utcnow) -> None:
        self._store = store
        self._clock = clock
        self._events = store.load_events()
        self._lock = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self.desired = Desired()
        self.fleet = Fleet()
        self.ledger = Ledger()
        self.router = Router()
        self.supervisor = Supervisor(store, self.fleet, options.launch, self.report)
        self._mirror = Mirror(self.fleet, self._book, options.limits.request_timeout_s)
        self.gateway = Gateway(
            self.fleet, self.router, self._book, self._mirror, options.limits, options.token, self.metrics
        )

    async def start(self, *, reconciling: bool = True) -> None:
        """Read the state, adopt what runs, begin to reconcile (or leave that to calls of `reconcile`).

        Raises:
            IntegrityError: the desired state cannot be read.
        """
        desired, damage = await asyncio.to_thread(self._store.load_desired)
        if damage:
            self.report("recovered", "desired.json", f"its copy is used, all traffic on stable: {damage}")
            await asyncio.to_thread(self._store.save_desired, desired)
        self._use(desired)
        await self._expire_if_due()
        await self.supervisor.adopt()
        if reconciling:
            self._tasks = [asyncio.create_task(self._reconcile_forever()), asyncio.create_task(self._keep_house())]

    async def run_until(self, asked: asyncio.Event) -> None:
        """Return when `asked` is set. A loop that died ends the process instead: a node that no longer reconciles must
        not look alive, and the next one adopts the replicas."""
        waiting = asyncio.create_task(asked.wait())
        done, _ = await asyncio.wait({waiting, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():  # else `stop` ended it, and `asked` will be set when it is done
                task.result()
        await waiting

    async def stop(self, *, replicas: bool) -> None:
        """Stop; with `replicas` they are ended too, else they run on for the next node to adopt."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._mirror.close()
        if replicas:
            await self.supervisor.stop_all(_SHUTDOWN_PATIENCE_S)
            self.report("shutdown", "node", "all replicas were stopped")
        await self.supervisor.close()

    # Control

    async def deploy(self, track: Track, version: str, replicas: int) -> None:
        """See `tasks.cluster.Cluster`."""
        await self._change("deploy", track, lambda old: policy.deploy(old, track, version, replicas))

    async def set_weights(self, weights: dict[Track, float], mirror: dict[Track, float], lease_s: float | None) -> None:
        """See `tasks.cluster.Cluster`.

        Raises:
            ExternalError: a track other than stable has no ready replica now.
        """

        def change(old: Desired) -> Desired:
            new = policy.set_weights(old, weights, mirror, self._lease_end(lease_s))
            for track in new.weights:
                if track is not Track.stable and not self.fleet.ready_count(track):
                    raise ExternalError(f"{track} has no ready replica; the traffic is as it was. Next: wait for it.")
            return new

        await self._change("weights", "gateway", change)

    async def renew_lease(self, lease_s: float) -> None:
        """See `tasks.cluster.Cluster`. Not an event: it comes every few seconds."""
        now = self._clock()
        until = now + timedelta(seconds=lease_s)
        await self._change(None, "lease", lambda old: policy.renew(old, until, now))

    async def scale(self, track: Track, replicas: int) -> None:
        """See `tasks.cluster.Cluster`."""
        await self._change("scale", track, lambda old: policy.scale(old, track, replicas))

    async def restart(self, track: Track, key: str) -> None:
        """See `tasks.cluster.Cluster`."""
        await self._change("restart", track, lambda old: policy.restart(old, track, key))

    async def remove(self, track: Track) -> None:
        """See `tasks.cluster.Cluster`."""
        await self._change("remove", track, lambda old: policy.remove(old, track))

    async def rollback(self, version: str, replicas: int) -> None:
        """See `tasks.cluster.Cluster`."""
        await self._change("rollback", Track.stable, lambda old: policy.rollback(old, version, replicas))

    async def remember(self, memory: Memory) -> bool:
        """Keep the next revision of the memory; False where another was kept since."""
        await self._change(None, "memory", lambda old: policy.remember(old, memory))
        return self.desired.memory == memory

    def readiness(self, track: Track) -> Readiness:
        """Whether the track is as desired.

        Raises:
            ConfigError: it is not deployed.
        """
        wanted = self.desired.tracks.get(track)
        if wanted is None:
            raise ConfigError(f"track {track} is not deployed. Next: deploy it.")
        return self.supervisor.readiness(track, wanted)

    def logs(self, track: Track, lines: int) -> str:
        """The last lines of every replica of the track, each part under its name."""
        parts = []
        for replica in self.fleet.on(track):
            tail = self._store.log_tail(replica.name, lines)
            parts.append("\n".join((f"==> {replica.name} <==", *tail)))
        return "\n".join(parts)

    def events(self, limit: int) -> list[Event]:
        """The latest events, oldest first."""
        return list(self._events)[-limit:]

    async def room(self) -> int:
        """See `tasks.cluster.Cluster`."""
        running = [replica.handle for replica in self.fleet if replica.handle is not None]
        free, largest = await asyncio.to_thread(processes.memory, running)
        return policy.room(self.desired, len(tuple(self.fleet)), hardware.cores(), free, largest)

    def metrics(self) -> str:
        """One Prometheus scrape."""
        return metrics.render(self.ledger, self.fleet, self.router, self.gateway)

    def counters(self) -> dict[Track, Counters]:
        """The counters of every track's desired version."""
        return {track: self._book(track, None) for track in self.desired.tracks}

    def replica_rows(self) -> list[dict[str, Any]]:
        """The replicas by name, as `ReplicaStatus` has them."""
        replicas = sorted(self.fleet, key=lambda replica: replica.name)
        return [_row(replica.record, ready=replica.takes_requests) for replica in replicas]

    def report(self, kind: str, subject: str, detail: str) -> None:
        """Record an event. A full disk loses its line in the file, never the work that it tells of."""
        event = Event(at=self._clock(), kind=kind, subject=str(subject), detail=detail)
        self._events.append(event)
        log.info("%s %s: %s", kind, subject, detail)
        try:
            self._store.append_event(event)
        except OSError as error:
            log.warning("the event was not written to disk: %s", error)

    # Inside

    async def _change(self, kind: str | None, subject: str, change: Callable[[Desired], Desired]) -> None:
        """Change the desired state: written to disk first, then used. Unchanged means nothing happens."""
        async with self._lock:
            await self._expire_if_due()
            new = change(self.desired)
            if new == self.desired:
                return
            await asyncio.to_thread(self._store.save_desired, new)
            self._use(new)
        if kind is not None:
            self.report(kind, subject, _describe(new))
        self.supervisor.wake.set()

    def _use(self, new: Desired) -> None:
        for track, wanted in new.tracks.items():
            before = self.desired.tracks.get(track)
            if before is None or before.version != wanted.version:
                self.ledger.begin(track, wanted.version, self._clock())
        self.desired = new
        self.router.set(new.weights, new.mirror, self._deadline(new), _salt(new))

    def _deadline(self, desired: Desired) -> float | None:
        if desired.lease_expires_at is None:
            return None
        return time.monotonic() + (desired.lease_expires_at - self._clock()).total_seconds()

    def _lease_end(self, lease_s: float | None) -> datetime | None:
        return None if lease_s is None else self._clock() + timedelta(seconds=lease_s)

    async def _expire_if_due(self) -> None:
        """Give all traffic back when the lease is over: in memory first, so that a full disk delays nothing. The disk
        needs no second try: what it holds is an expired lease, which the next start treats the same way."""
        until = self.desired.lease_expires_at
        if until is None or until > self._clock():
            return
        new = policy.expire(self.desired)
        self._use(new)
        self.report("lease_expired", "gateway", f"nobody renewed it by {until:%H:%M:%S} UTC; {_describe(new)}")
        try:
            await asyncio.to_thread(self._store.save_desired, new)
        except ExternalError as error:
            self.report("failed", "desired.json", str(error))

    def _book(self, track: Track, replica: Replica | None) -> Counters:
        if replica is not None:
            return self.ledger.of(track, replica.record.version, self._clock())
        wanted = self.desired.tracks.get(track)
        return self.ledger.of(track, wanted.version if wanted else "none", self._clock())

    async def _reconcile_forever(self) -> None:
        while True:
            await self.reconcile()
            try:
                async with asyncio.timeout(TICK_S):
                    await self.supervisor.wake.wait()
            except TimeoutError:
                continue
            self.supervisor.wake.clear()

    async def reconcile(self) -> None:
        """One pass."""
        try:
            async with self._lock:
                await self._expire_if_due()
            await self.supervisor.tick(self.desired)
        except (KhetError, OSError) as error:
            self.report("failed", "reconcile", str(error))
            await asyncio.sleep(1.0)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            served = {(r.record.track, r.record.version) for r in self.fleet}
            self.ledger.keep_only(served | {(t, wanted.version) for t, wanted in self.desired.tracks.items()})
            try:
                await asyncio.to_thread(self._store.bound_logs)
                await asyncio.to_thread(self._store.prune_logs)
            except OSError as error:
                log.warning("logs were not bounded: %s", error)


def _salt(desired: Desired) -> str:
    """Users are dealt anew for every version that is tried."""
    canary = desired.tracks.get(Track.canary)
    return canary.version if canary else ""


def _describe(desired: Desired) -> str:
    """The desired state in a line."""
    tracks = ", ".join(f"{t} {wanted.version} x{wanted.replicas}" for t, wanted in desired.tracks.items())
    weights = ", ".join(f"{t} {w:.0%}" for t, w in desired.weights.items())
    mirror = "".join(f"; {share:.0%} mirrored to {t}" for t, share in desired.mirror.items())
    lease = f"; lease until {desired.lease_expires_at:%H:%M:%S} UTC" if desired.lease_expires_at else ""
    return f"{tracks or 'no track'}; traffic {weights or 'nowhere'}{mirror}{lease}"


def _row(record: ReplicaRecord, *, ready: bool) -> dict[str, Any]:
    row = record.model_dump(mode="json", include={"name", "track", "version", "started_at", "restarts", "retiring"})
    return {**row, "ready": ready, "pid_or_pod": str(record.pid), "address": f"127.0.0.1:{record.port}"}


def bound_name(bound: float) -> str:
    """A histogram bound as a JSON key."""
    return "inf" if math.isinf(bound) else f"{bound:g}"
