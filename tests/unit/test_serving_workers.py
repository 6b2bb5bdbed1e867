"""The bounded pool of threads: what it accepts, refuses, and survives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from ml.serving.refusals import Refused
from ml.serving.workers import Workers


def _ignore(item: int, result: int) -> None:
    return None


def _workers(
    work: Callable[[int], int], threads: int = 2, waiting: int = 2, after: Callable[[int, int], None] = _ignore
) -> Workers[int, int]:
    return Workers(threads, waiting, work, after)


def test_every_item_gets_its_own_result() -> None:
    async def scenario() -> list[int]:
        workers = _workers(lambda item: item * item, threads=3, waiting=1000)
        workers.start()
        results = await asyncio.gather(*(workers.run(item) for item in range(500)))
        workers.stop(1.0)
        assert workers.pending == 0
        return list(results)

    assert asyncio.run(scenario()) == [item * item for item in range(500)]


def test_work_beyond_threads_and_queue_is_refused_and_accepted_again_later() -> None:
    gate = threading.Event()

    def work(item: int) -> int:
        assert gate.wait(10)
        return item

    async def scenario() -> None:
        workers = _workers(work, threads=1, waiting=2)
        workers.start()
        accepted = [asyncio.create_task(workers.run(item)) for item in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:
            await workers.run(9)
        assert refused.value.status == 503
        assert dict(refused.value.headers)[b"retry-after"]
        gate.set()
        assert await asyncio.gather(*accepted) == [0, 1, 2]
        assert await workers.run(4) == 4
        workers.stop(1.0)

    asyncio.run(scenario())


def test_an_exception_reaches_the_request_it_belongs_to_and_no_thread_dies() -> None:
    def work(item: int) -> int:
        if item % 2:
            raise ValueError(str(item))
        return item

    async def scenario() -> None:
        workers = _workers(work, threads=2, waiting=100)
        workers.start()
        results = await asyncio.gather(*(workers.run(item) for item in range(50)), return_exceptions=True)
        assert [r for r in results if isinstance(r, int)] == list(range(0, 50, 2))
        assert [str(r) for r in results if isinstance(r, ValueError)] == [str(item) for item in range(1, 50, 2)]
        workers.stop(1.0)

    asyncio.run(scenario())


def test_a_failing_follow_up_spoils_neither_the_answer_nor_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    def after(item: int, result: int) -> None:
        raise RuntimeError("follow-up")

    async def scenario() -> None:
        workers = _workers(lambda item: item, threads=1, waiting=10, after=after)
        workers.start()
        assert [await workers.run(item) for item in range(5)] == list(range(5))
        workers.stop(1.0)

    asyncio.run(scenario())
    assert "The work after an answer failed." in caplog.text


def test_a_cancelled_request_gives_its_place_back() -> None:
    gate = threading.Event()

    async def scenario() -> None:
        workers = _workers(lambda item: item if gate.wait(10) else -1, threads=1, waiting=0)
        workers.start()
        task = asyncio.create_task(workers.run(1))
        await asyncio.sleep(0)
        task.cancel()
        gate.set()
        async with asyncio.timeout(10):
            while workers.pending:
                await asyncio.sleep(0.001)
        assert await workers.run(2) == 2
        workers.stop(1.0)

    asyncio.run(scenario())


def test_nothing_is_accepted_before_the_start() -> None:
    with pytest.raises(Refused) as refused:
        asyncio.run(_workers(lambda item: item).run(1))
    assert (refused.value.status, refused.value.error) == (503, "not_ready")
