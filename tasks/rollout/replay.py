"""Traffic where users send too little: holdout images through the gateway at a stated rate, their labels known.

Where no gateway mirrors requests, the photos that were answered go to the canary too; see `shadow`.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp

from configs.areas import ReplaySettings
from ml.version import Version
from tasks.rollout.shadow import Answer, Shadow
from tasks.rollout.verdict import Paired

_TIMEOUT_S = 15.0
_CONNECT_S = 5.0
_KEPT_FAILURES = 5
# The service looks at the bytes, not at the type; the mark keeps probes out of what is known of users' photos.
_HEADERS = {"Content-Type": "application/octet-stream", "X-Khet-Probe": "1"}
# A copy is no user's request: a replica does not count it as one.
_COPY_HEADERS = {"Content-Type": "application/octet-stream", "X-Khet-Shadow": "1"}


@dataclass(frozen=True, slots=True)
class Probe:
    """One labelled request: the photo's bytes and the class it should get."""

    body: bytes
    label: str


class LabelledAnswers:
    """Which images each version got right. An image counts once a version, however often it was sent: the same photo
    asked again is no new evidence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._correct: dict[str, dict[int, bool]] = {}

    def note(self, image: int, version: str, *, correct: bool) -> None:
        """Remember a version's first answer to an image."""
        with self._lock:
            self._correct.setdefault(version, {}).setdefault(image, correct)

    def paired(self, champion: Version | None, challenger: Version) -> Paired:
        """The images both answered; without a champion all that the challenger answered."""
        with self._lock:
            ours = dict(self._correct.get(str(challenger), {}))
            theirs = dict(self._correct.get(str(champion), {})) if champion else ours
        answers = [(theirs[image], correct) for image, correct in ours.items() if image in theirs]
        return Paired(
            pairs=len(answers),
            losses=answers.count((True, False)),
            wins=answers.count((False, True)),
            both=answers.count((True, True)),
        )


class Replayer:
    """Sends probes in the background while it is entered. Open loop: a slow answer does not slow the next request,
    up to `settings.concurrency` requests in flight; beyond it the beat is skipped. While `shadow` is aimed at an
    address, each photo that was answered goes there too."""

    def __init__(
        self, gateway_url: str, probes: Sequence[Probe], settings: ReplaySettings, shadow: Shadow | None = None
    ) -> None:
        if not probes:
            raise ValueError("a replayer needs at least one probe")
        self._url = f"{gateway_url.rstrip('/')}/predict"
        self._probes = probes
        self._settings = settings
        self._shadow = shadow or Shadow()
        self._lock = threading.Lock()
        self._answers = LabelledAnswers()
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

    def paired(self, champion: Version | None, challenger: Version) -> Paired:
        """What both versions answered so far."""
        return self._answers.paired(champion, challenger)

    async def _run(self) -> None:
        gap = 1.0 / self._settings.rate_per_s
        slots = asyncio.Semaphore(self._settings.concurrency)
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S, sock_connect=_CONNECT_S)
        # A Kubernetes Service deals connections to its pods, not requests: photos on one that is kept would all meet
        # the same version, and tell nothing about the other.
        each_its_own = aiohttp.TCPConnector(force_close=True)
        async with (
            aiohttp.ClientSession(connector=each_its_own, timeout=timeout) as session,
            asyncio.TaskGroup() as tasks,
        ):
            due = loop.time()
            for image, probe in itertools.cycle(enumerate(self._probes)):
                if self._stop.is_set():
                    break
                if not slots.locked():
                    await slots.acquire()
                    tasks.create_task(self._send(session, slots, image, probe))
                due = max(due + gap, loop.time() - gap)
                await asyncio.sleep(max(0.0, due - loop.time()))

    async def _send(self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, image: int, probe: Probe) -> None:
        self._sent += 1
        try:
            async with session.post(self._url, data=probe.body, headers=_HEADERS) as answer:
                if answer.status >= 500:
                    self._note_failure(f"HTTP {answer.status}: {(await answer.text())[:200]}")
                elif answer.status == 200:
                    body = await answer.json()
                    right = body["class"] == probe.label
                    self._answers.note(image, str(body["model_version"]), correct=right)
                    await self._copy(session, probe, Answer.read(body))
        except (aiohttp.ClientError, TimeoutError) as error:
            self._note_failure(f"{type(error).__name__}: {error}")
        finally:
            slots.release()

    async def _copy(self, session: aiohttp.ClientSession, probe: Probe, told: Answer) -> None:
        """Send a photo to the canary too, and compare what it says with what the user was told."""
        if (address := self._shadow.address) is None:
            return
        began = time.monotonic()
        try:
            async with session.post(f"{address}/predict", data=probe.body, headers=_COPY_HEADERS) as answer:
                said = Answer.read(await answer.json()) if answer.status == 200 else None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self._shadow.unreached(time.monotonic() - began)
            return
        except (aiohttp.ClientError, TimeoutError):
            said = None
        seconds = time.monotonic() - began
        if said is None:
            self._shadow.failed(seconds)
        else:
            self._shadow.compared(told, said, seconds)

    def _note_failure(self, sentence: str) -> None:
        with self._lock:
            self._failed += 1
            if len(self._failures) < _KEPT_FAILURES:
                self._failures.append(sentence)
