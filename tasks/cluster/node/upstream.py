"""Keep-alive HTTP/1.1 connections to one replica.

Not aiohttp's client, for one reason: the gateway must know whether a connection broke because it was reused while the
replica closed it as idle (harmless, sent again) or because the replica died (charged to its track).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import cast

import httptools

_CONNECT_TIMEOUT_S = 1.0
_IDLE_S = 2.0  # uvicorn closes idle connections after 5 s: let go well before
_MAX_ANSWER_BYTES = 8_000_000
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"te", b"trailer", b"upgrade", b"date",
     b"server", b"proxy-connection")
)  # fmt: skip


class BrokenError(Exception):
    """The connection failed before the whole answer was here. `stale`: it was reused and nothing had come back."""

    def __init__(self, reason: str, *, stale: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.stale = stale
        self.refused = refused


@dataclass(slots=True)
class Answer:
    """A whole answer. `headers`: without the hop-by-hop ones, and without length, date and server."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Connection(asyncio.Protocol):
    """One connection: one exchange at a time."""

    def __init__(self, owner: Pool) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Answer] | None = None
        self.exchanges = 0
        self.idle_since = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes) -> Answer:
        """Send a request, return its answer. Cancelling it (a timeout) ends the connection.

        Raises:
            BrokenError: the connection ended first.
        """
        if self._transport is None or not self.is_open:
            raise BrokenError("the connection was closed", stale=self.exchanges > 0)
        self._waiter = asyncio.get_running_loop().create_future()
        self._begin()
        self.exchanges += 1
        self._transport.writelines((head, body) if body else (head,))
        try:
            return await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._waiter = None

    def reusable(self) -> bool:
        """Whether the answer left the connection fit for another exchange."""
        transport = self._transport
        return (
            transport is not None
            and not transport.is_closing()
            and self._keep_alive
            and transport.get_write_buffer_size() == 0
        )

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[str, str]] = []
        self._chunks: list[bytes] = []
        self._size = 0
        self._received = False
        self._keep_alive = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            self.abort()  # nobody asked: the stream is out of step
            return
        self._received = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BrokenError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.closed(self)
        if self._waiter is not None:
            stale = self.exchanges > 1 and not self._received
            self._fail(BrokenError(str(exc or "closed before the answer was complete"), stale=stale))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _HOP_BY_HOP:
            self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size > _MAX_ANSWER_BYTES:
            self._fail(BrokenError(f"the answer is larger than {_MAX_ANSWER_BYTES} bytes"))

    def on_message_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        if self._waiter is not None and not self._waiter.done():
            status = self._parser.get_status_code()
            self._waiter.set_result(Answer(status, self._headers, b"".join(self._chunks)))

    def _fail(self, error: BrokenError) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self.abort()


class Pool:
    """The connections to one replica. Their number is bounded by the gateway's limit of requests in flight."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: deque[Connection] = deque()
        self._open: set[Connection] = set()

    @property
    def busy(self) -> int:
        """Connections that are in use."""
        return len(self._open) - len(self._idle)

    async def send(self, head: bytes, body: bytes, timeout_s: float) -> Answer:
        """Send a request on a kept connection, or on a new one. A connection that turns out to have been closed as
        idle is replaced once: the replica never saw the request.

        Raises:
            BrokenError: the replica cannot be reached, or ended the connection.
            TimeoutError: no answer in time.
        """
        async with asyncio.timeout(timeout_s):
            if kept := self._take():
                try:
                    return await self._use(kept, head, body)
                except BrokenError as error:
                    if not error.stale:
                        raise
            return await self._use(await self._connect(), head, body)

    def abort(self) -> None:
        """End every connection; exchanges under way raise `BrokenError`."""
        for connection in tuple(self._open):
            connection.abort()
        self._idle.clear()

    def opened(self, connection: Connection) -> None:
        """Called by a connection."""
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        """Called by a connection."""
        self._open.discard(connection)

    async def _use(self, connection: Connection, head: bytes, body: bytes) -> Answer:
        answer = await connection.exchange(head, body)
        if connection.reusable():
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()
        return answer

    def _take(self) -> Connection | None:
        limit = asyncio.get_running_loop().time() - _IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since > limit:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.port)
        except TimeoutError as error:
            raise BrokenError(f"no connection within {_CONNECT_TIMEOUT_S:g} s") from error
        except OSError as error:
            raise BrokenError(str(error), refused=True) from error
        return connection
