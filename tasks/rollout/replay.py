"""Traffic where users send too little: holdout images through the gateway at a stated rate, their labels known."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp

from configs.areas import ReplaySettings
from tasks.rollout.evidence import Probes

_TIMEOUT_S = 15.0
_KEPT_FAILURES = 5
# The service looks at the bytes, not at the type; the mark keeps probes out of what is known of users' photos.
_HEADERS = {"Content-Type": "application/octet-stream", "X-Khet-Probe": "1"}


@dataclass(frozen=True, slots=True)
class Probe:
    """One labelled request: the photo's bytes and the class it should get."""

    body: bytes
    label: str


class Replayer:
    """Sends probes in the background while it is entered. Open loop: a slow answer does not slow the next request,
    up to `settings.concurrency` requests in flight; beyond it the beat is skipped."""

    def __init__(self, gateway_url: str, probes: Sequence[Probe], settings: ReplaySettings) -> None:
        if not probes:
            raise ValueError("a replayer needs at least one probe")
        self._url = f"{gateway_url.rstrip('/')}/predict"
        self._probes = probes
        self._settings = settings
        self._lock = threading.Lock()
        self._tallies: dict[str, Probes] = {}
        self._failures: list[str] = []
        self._failed = 0
        self._sent = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="replayer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=_TIMEOUT_S + 5)

    @property
    def sent(self) -> int:
        """Requests sent so far."""
        return self._sent

    @property
    def failed(self) -> int:
        """Requests that a client would have seen fail: no answer, or a 5xx."""
        return self._failed

    def failures(self) -> tuple[str, ...]:
        """The first few failures, in words."""
        with self._lock:
            return tuple(self._failures)

    def tallies(self) -> dict[str, Probes]:
        """Answered and correct probes so far, by model version."""
        with self._lock:
            return dict(self._tallies)

    async def _run(self) -> None:
        gap = 1.0 / self._settings.rate_per_s
        slots = asyncio.Semaphore(self._settings.concurrency)
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:
            due = loop.time()
            for probe in itertools.cycle(self._probes):
                if self._stop.is_set():
                    break
                if not slots.locked():
                    await slots.acquire()
                    tasks.create_task(self._send(session, slots, probe))
                due = max(due + gap, loop.time() - gap)
                await asyncio.sleep(max(0.0, due - loop.time()))

    async def _send(self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, probe: Probe) -> None:
        self._sent += 1
        try:
            async with session.post(self._url, data=probe.body, headers=_HEADERS) as answer:
                if answer.status >= 500:
                    self._note_failure(f"HTTP {answer.status}: {(await answer.text())[:200]}")
                elif answer.status == 200:
                    body = await answer.json()
                    self._note_answer(str(body["model_version"]), body["class"] == probe.label)
        except (aiohttp.ClientError, TimeoutError) as error:
            self._note_failure(f"{type(error).__name__}: {error}")
        finally:
            slots.release()

    def _note_answer(self, version: str, correct: bool) -> None:
        with self._lock:
            seen = self._tallies.get(version, Probes())
            self._tallies[version] = Probes(seen.answered + 1, seen.correct + int(correct))

    def _note_failure(self, sentence: str) -> None:
        with self._lock:
            self._failed += 1
            if len(self._failures) < _KEPT_FAILURES:
                self._failures.append(sentence)
