"""The node's process: two ports, signals, an orderly end.

SIGTERM ends the node alone: replicas run on and the next node adopts them, so the node can be replaced without an
outage of the models. SIGINT (Ctrl-C) and POST /shutdown end the replicas too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import uvloop
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from configs.errors import ConfigError
from configs.settings import Settings, home
from tasks.cluster.node import control
from tasks.cluster.node.node import Node, Options
from tasks.cluster.node.store import Store

log = logging.getLogger(__name__)

_DRAIN_S = 1.5
_KEEP_ALIVE_S = 75.0
_BACKLOG = 1024


def run(settings: Settings) -> None:
    """Run until told to stop.

    Raises:
        ConfigError: an address or the token is missing, a port is taken, or another node runs on this folder.
        IntegrityError: the desired state on disk cannot be read.
    """
    data, api = _address(settings, "gateway_url"), _address(settings, "node_url")
    options = Options.from_settings(settings, home())
    store = Store(home() / "node")
    with store.locked():
        uvloop.run(_serve(store, options, data, api))


def _address(settings: Settings, field: str) -> tuple[str, int]:
    url = getattr(settings.cluster, field)
    parts = urlsplit(url or "")
    if not parts.hostname or not parts.port:
        raise ConfigError(f"cluster.{field} is {url!r}, expected http://HOST:PORT. Nothing was started.")
    return parts.hostname, parts.port


async def _serve(store: Store, options: Options, data: tuple[str, int], api: tuple[str, int]) -> None:
    node = Node(store, options)
    over = _Ending(node)
    gateway = web.Server(
        node.gateway.handle,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=_KEEP_ALIVE_S,
        logger=_http_log(),
    )
    app = control.application(node, options.token, over.stop_replicas)
    with _bound(data) as data_socket, _bound(api) as api_socket:
        # Requests that come before the replicas are adopted wait in the sockets.
        await node.start()
        async with (
            _serving(web.ServerRunner(gateway, shutdown_timeout=_DRAIN_S), data_socket) as over.gateway,
            _serving(web.AppRunner(app, access_log=None, shutdown_timeout=_DRAIN_S), api_socket),
        ):
            log.info("the gateway listens on %s:%d, the control API on %s:%d", *data, *api)
            over.watch_signals()
            await node.run_until(over.asked)
    await over.finish()


def _http_log() -> logging.Logger:
    """aiohttp's errors, less what clients sent that is no HTTP: that is answered 400, and is no trouble of ours."""
    http_log = logging.getLogger(f"{__name__}.http")
    http_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
    return http_log


class _Ending:
    """Ends the node once, for whatever reason comes first."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._stopping: asyncio.Task[None] | None = None
        self.asked = asyncio.Event()
        self.gateway: web.SockSite | None = None

    def watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.asked.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupted)

    async def stop_replicas(self) -> None:
        """Take no more requests, finish those under way, end the replicas; the process ends after this returned."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop_replicas())
        await asyncio.shield(self._stopping)
        asyncio.get_running_loop().call_later(0.1, self.asked.set)  # let the answer out first

    async def finish(self) -> None:
        """What is left to do when both ports are closed."""
        if self._stopping is None:
            await self._node.stop(replicas=False)

    def _interrupted(self) -> None:
        task = asyncio.ensure_future(self.stop_replicas())
        task.add_done_callback(lambda _: self.asked.set())

    async def _stop_replicas(self) -> None:
        if self.gateway is not None:
            await self.gateway.stop()
        deadline = asyncio.get_running_loop().time() + _DRAIN_S
        while self._node.gateway.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await self._node.stop(replicas=True)


@contextlib.contextmanager
def _bound(address: tuple[str, int]) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server(address, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address[0]}:{address[1]}: {error}. Nothing was started.") from error
    with listener:
        yield listener


@contextlib.asynccontextmanager
async def _serving(runner: web.ServerRunner | web.AppRunner, listener: socket.socket) -> AsyncIterator[web.SockSite]:
    await runner.setup()
    try:
        site = web.SockSite(runner, listener, backlog=_BACKLOG)
        await site.start()
        yield site
    finally:
        await runner.cleanup()
