"""The lease by a clock that the test moves, on a node inside the test's process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ExternalError, SafetyError
from tasks.cluster import Track
from tasks.cluster.node import supervisor
from tasks.cluster.node.gateway import Limits
from tasks.cluster.node.node import Node, Options
from tasks.cluster.node.store import Store
from tasks.cluster.node.supervisor import Launch
from tests.support.node import STUB


class Clock:
    """Time that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def _options(root: Path) -> Options:
    launch = Launch((sys.executable, str(STUB)), root, check_interval_s=0.1, drain_s=1.0)
    return Options("secret", launch, Limits(1_000, 1.0, 1.0, 8))


@asynccontextmanager
async def _node(root: Path, clock: Clock, *, reconciling: bool = False) -> AsyncIterator[Node]:
    """A node that has read its state and, by default, reconciles only when told to."""
    node = Node(Store(root), _options(root), clock)
    await node.start(reconciling=reconciling)
    try:
        yield node
    finally:
        await node.stop(replicas=True)


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let a test be a coroutine."""

    def wrapper(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path, Clock()))

    wrapper.__doc__ = test.__doc__
    return wrapper


async def _mirrored(node: Node, lease_s: float) -> None:
    await node.deploy(Track.stable, "v1.0.0", 1)
    await node.deploy(Track.canary, "v1.1.0", 1)
    await node.set_weights({Track.stable: 1.0}, {Track.canary: 1.0}, lease_s)


@run
async def test_a_lease_that_is_renewed_in_time_lasts(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await _mirrored(node, 30)
        for _ in range(5):
            clock.advance(20)
            await node.renew_lease(30)
            await node.reconcile()
        assert node.desired.mirror == {Track.canary: 1.0}


@run
async def test_a_lease_that_is_not_renewed_ends_mirroring_and_is_an_event(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await _mirrored(node, 30)
        clock.advance(31)
        await node.reconcile()
        assert node.desired.mirror == {}
        assert node.router.mirror == {}
        assert [e.kind for e in node.events(100)].count("lease_expired") == 1
        with pytest.raises(SafetyError, match="expired at 03:04:35"):
            await node.renew_lease(30)


@run
async def test_a_renewal_that_comes_late_is_refused_even_before_the_next_pass(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await _mirrored(node, 30)
        clock.advance(30)
        with pytest.raises(SafetyError):
            await node.renew_lease(30)
        assert node.desired.mirror == {}


@run
async def test_a_lease_that_ended_while_the_node_was_dead_has_ended(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await _mirrored(node, 30)
    clock.advance(31)
    async with _node(tmp_path, clock) as node:
        assert (node.desired.weights, node.desired.mirror) == ({Track.stable: 1.0}, {})
        with pytest.raises(SafetyError):
            await node.renew_lease(30)


@run
async def test_a_lease_that_still_runs_after_a_restart_is_kept(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await _mirrored(node, 30)
    clock.advance(10)
    async with _node(tmp_path, clock) as node:
        assert node.desired.mirror == {Track.canary: 1.0}
        await node.renew_lease(30)


@run
async def test_the_traffic_returns_even_when_the_disk_takes_nothing(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await _mirrored(node, 30)
        (tmp_path / "desired.json.partial").mkdir()
        clock.advance(31)
        await node.reconcile()
        assert node.router.mirror == {}
        with pytest.raises(ExternalError):
            await node.scale(Track.stable, 2)
        assert node.desired.tracks[Track.stable].replicas == 1


@run
async def test_traffic_is_not_sent_to_a_track_that_is_not_ready(tmp_path, clock):
    async with _node(tmp_path, clock) as node:
        await node.deploy(Track.stable, "v1.0.0", 1)
        await node.deploy(Track.canary, "v1.1.0", 1)
        with pytest.raises(ExternalError, match="no ready replica"):
            await node.set_weights({Track.stable: 0.5, Track.canary: 0.5}, {}, 30)
        assert node.desired.weights == {Track.stable: 1.0}


async def _once(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


@run
async def test_a_replica_that_hangs_for_long_is_started_anew(tmp_path, clock):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "_CHECK_TIMEOUT_S", 0.1)
        patch.setattr(supervisor, "_HUNG_S", 0.3)
        async with _node(tmp_path, clock, reconciling=True) as node:
            await node.deploy(Track.stable, "v1.0.0", 1)
            await _once(lambda: node.fleet.ready_count(Track.stable) == 1)
            [replica] = node.fleet.on(Track.stable)
            hung = replica.record.pid
            os.kill(hung, signal.SIGSTOP)
            await _once(lambda: replica.takes_requests and replica.record.pid != hung)
            assert replica.record.restarts == 1


@run
async def test_a_node_that_can_no_longer_reconcile_ends(tmp_path, clock):
    async def breaks() -> None:
        raise ZeroDivisionError

    node = Node(Store(tmp_path), _options(tmp_path), clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "reconcile", breaks)
        await node.start()
        with pytest.raises(ZeroDivisionError):
            await node.run_until(asyncio.Event())
    await node.stop(replicas=True)
