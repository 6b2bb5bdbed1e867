"""Connections to a replica: what is the replica's fault and what is only an idle connection that was closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tasks.cluster.node.upstream import BrokenError, Pool

Handler = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUEST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def serve(handler: Handler, test: Callable[[Pool], Awaitable[None]]) -> int:
    """Run `test` against a server; `handler` gets the number of the connection. Returns how many there were."""
    count = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        try:
            await handler(count, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        pool = Pool(server.sockets[0].getsockname()[1])
        try:
            await test(pool)
        finally:
            pool.abort()
            server.close()

    asyncio.run(main())
    return count


async def _request(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(4)


async def _polite(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await _request(reader)
        writer.write(OK)


def test_a_connection_is_kept_for_the_next_request():
    async def test(pool: Pool) -> None:
        for _ in range(5):
            assert (await pool.send(REQUEST, b"leaf", 2.0)).body == b"ok"

    assert serve(_polite, test) == 1


def test_a_kept_connection_that_the_replica_closed_is_replaced_without_a_failure():
    async def closes_after_the_next_request(
        number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await _request(reader)
        writer.write(OK)
        await _request(reader)
        writer.close()

    async def test(pool: Pool) -> None:
        for _ in range(4):
            assert (await pool.send(REQUEST, b"leaf", 2.0)).status == 200

    assert serve(closes_after_the_next_request, test) == 4


@pytest.mark.parametrize(
    "sent",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"hello\r\n\r\n"],
    ids=["nothing", "half a head", "half a body", "no HTTP"],
)
def test_a_replica_that_breaks_off_is_to_blame(sent):
    async def breaks(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(sent)
        await writer.drain()
        writer.close()

    async def test(pool: Pool) -> None:
        with pytest.raises(BrokenError) as caught:
            await pool.send(REQUEST, b"leaf", 2.0)
        assert not caught.value.stale

    assert serve(breaks, test) == 1


def test_silence_is_a_timeout_and_its_connection_is_not_used_again():
    async def silent_once(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if number == 1:
            await reader.read()
        else:
            await _polite(number, reader, writer)

    async def test(pool: Pool) -> None:
        with pytest.raises(TimeoutError):
            await pool.send(REQUEST, b"leaf", 0.1)
        assert (await pool.send(REQUEST, b"leaf", 2.0)).status == 200

    assert serve(silent_once, test) == 2


def test_an_early_answer_to_a_large_body_is_returned():
    async def refuses(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        await reader.read()

    async def test(pool: Pool) -> None:
        size = 20_000_000
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
        assert (await pool.send(head, bytes(size), 5.0)).status == 413

    serve(refuses, test)


def test_a_closed_connection_is_not_kept():
    async def closes(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await _request(reader)

    async def test(pool: Pool) -> None:
        for _ in range(3):
            assert (await pool.send(REQUEST, b"leaf", 2.0)).status == 200

    assert serve(closes, test) == 3


def test_ending_the_pool_wakes_those_who_wait():
    async def silent(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test(pool: Pool) -> None:
        waiting = asyncio.create_task(pool.send(REQUEST, b"leaf", 5.0))
        while not pool.busy:
            await asyncio.sleep(0)
        pool.abort()
        with pytest.raises(BrokenError):
            await waiting

    serve(silent, test)


def test_nobody_listening_is_told_apart():
    async def test() -> None:
        with pytest.raises(BrokenError) as caught:
            await Pool(1).send(REQUEST, b"leaf", 2.0)
        assert caught.value.refused

    asyncio.run(test())
