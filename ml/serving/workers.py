"""A fixed number of threads with a bounded queue in front: more work is refused at once instead of waiting for ever."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from ml.serving.refusals import unavailable

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Generic[Item, Result]):
    """Run `work(item)` on threads, `afterwards(item, result)` once the answer is on its way.

    Faster than an executor under load: results that finish together wake the event loop once.
    """

    def __init__(
        self,
        threads: int,
        max_waiting: int,
        work: Callable[[Item], Result],
        afterwards: Callable[[Item, Result], None],
    ) -> None:
        self._work = work
        self._afterwards = afterwards
        self._capacity = threads + max_waiting
        self._pending = 0
        self._jobs: queue.SimpleQueue[tuple[Item, asyncio.Future[Result]] | None] = queue.SimpleQueue()
        self._done: deque[tuple[asyncio.Future[Result], Result | None, Exception | None]] = deque()
        self._wake_sent = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads = [threading.Thread(target=self._serve, name=f"worker-{n}", daemon=True) for n in range(threads)]

    @property
    def pending(self) -> int:
        """Items waiting or in work."""
        return self._pending

    def start(self) -> None:
        """Start the threads; results are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Finish what is queued and end the threads; those still at work after `timeout_s` are left behind."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    async def run(self, item: Item) -> Result:
        """The result of `work(item)`, or its exception.

        Raises:
            Refused: 503, every thread is busy and the queue is full.
        """
        if self._loop is None:
            raise unavailable("not_ready", "The model is still being loaded. Try again shortly.")
        if self._pending >= self._capacity:
            raise unavailable("busy", f"{self._pending} requests are waiting already. Try again shortly.")
        self._pending += 1
        future: asyncio.Future[Result] = self._loop.create_future()
        self._jobs.put((item, future))
        return await future

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            item, future = job
            try:
                result = self._work(item)
            except Exception as error:  # noqa: BLE001  (handed to the request that waits for it)
                self._hand_over(future, None, error)
            else:
                self._hand_over(future, result, None)
                self._follow_up(item, result)

    def _follow_up(self, item: Item, result: Result) -> None:
        try:
            self._afterwards(item, result)
        except Exception:  # the answer is given; a failing follow-up may not end the thread
            logger.exception("The work after an answer failed.")

    def _hand_over(self, future: asyncio.Future[Result], result: Result | None, error: Exception | None) -> None:
        self._done.append((future, result, error))
        if not self._wake_sent and self._loop is not None:
            self._wake_sent = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._wake_sent = False  # before draining: what is appended from now on sends a wake of its own
        while self._done:
            future, result, error = self._done.popleft()
            self._pending -= 1
            if future.done():  # its request was cancelled while the thread worked
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None only where Result allows it
