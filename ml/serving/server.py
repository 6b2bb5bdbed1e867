"""Start, serve, drain: uvicorn with this service's idea of SIGTERM, and the loading of the model beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any, Final, TypeVar

import uvicorn

from configs.errors import ConfigError, KhetError
from ml.serving.protocol import LimitedProtocol
from ml.serving.service import LoadedModel, PredictionSink, Service

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Load = Callable[[], tuple[LoadedModel, PredictionSink]]
# Longer than a proxy keeps an idle connection, so that it is never us who closes one it is about to use.
_KEEP_ALIVE_S: Final = 75
_BACKLOG: Final = 512
# While draining: this long without a request in flight means that the traffic has been sent elsewhere.
_QUIET_S: Final = 0.25
_POLL_S: Final = 0.02


def listen(host: str, port: int) -> socket.socket:
    """An open socket; port 0 takes a free one.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror or error}. Nothing was started.") from error


class Server(uvicorn.Server):
    """One replica. It answers probes from the first moment, predictions when `load` has returned."""

    def __init__(self, app: Any, service: Service, load: Load) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self._service = service
        self._load = load
        self._drain: asyncio.Task[None] | None = None
        self.failure: KhetError | None = None

    def serve_on(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT has been answered by draining.

        Raises:
            KhetError: the model could not be loaded; nothing was ever served.
        """
        self.run([listener])
        if self.failure is not None:
            raise self.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the doors, and load the model meanwhile."""
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._open())

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGTERM and SIGINT begin to drain; a second one ends at once. Unlike uvicorn's, the exit status is 0."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def _open(self) -> None:
        try:
            model, sink = await _in_daemon_thread(self._load)
            self._service.open(model, sink)
        except KhetError as error:
            self.failure = error
            self.should_exit = True
        except Exception:  # an error nobody foresaw must end the process too: it would wait for ever, never ready
            logger.exception("Loading failed.")
            self.failure = KhetError("The model could not be loaded; nothing was served. The log above says why.")
            self.should_exit = True
        else:
            logger.info("Ready: %s serves %s.", self._service.identity.replica, self._service.identity.version)

    def _on_signal(self) -> None:
        if self._drain is not None or self._service.model is None:
            self.should_exit = self.force_exit = True
            return
        logger.info("Draining.")
        self._service.drain()
        self._drain = asyncio.create_task(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        """Answer what is here and what still comes, until nothing has come for a moment or time is up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._service.limits.drain_s
        quiet_since = loop.time()
        while loop.time() < deadline and loop.time() - quiet_since < _QUIET_S:
            await asyncio.sleep(_POLL_S)
            if self._service.in_flight:
                quiet_since = loop.time()
        if self._service.in_flight:
            logger.warning("%d requests did not finish in time.", self._service.in_flight)
        self.should_exit = True


async def _in_daemon_thread(work: Callable[[], Result]) -> Result:
    """Like asyncio.to_thread, but a process that is told to stop does not wait for a store that hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(outcome: Result | Exception) -> None:
        if future.done():  # cancelled meanwhile
            return
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def run() -> None:
        outcome: Result | Exception
        try:
            outcome = work()
        except Exception as error:  # noqa: BLE001  (raised again where it is awaited)
            outcome = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future
