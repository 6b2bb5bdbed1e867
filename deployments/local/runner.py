"""Keeps one part running: start or adopt it, wait until it is healthy, watch it, start it again when it dies."""

from __future__ import annotations

import collections
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from configs.errors import ConfigError, ExternalError, KhetError
from deployments.local import ports, process
from deployments.local.files import Layout
from deployments.local.parts import Part
from deployments.local.process import Identity
from deployments.local.state import PartState, Phase

LIVENESS_S = 0.25
CHECK_S = 5.0
# A part that answers no check for this long, although its process lives, is started again.
UNHEALTHY_S = 60.0
# This many deaths within the window, and the part counts as failed: from then on it is tried only now and then.
DEATHS, WINDOW_S, SLOW_RETRY_S = 5, 120.0, 30.0
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)

Publish = Callable[[PartState], None]


class Runner(threading.Thread):
    """One thread a part. `healthy` is set while the part is; `stop` ends the watching, never the part itself."""

    def __init__(
        self, part: Part, layout: Layout, needs: Sequence[Runner], publish: Publish, start_timeout_s: float
    ) -> None:
        super().__init__(name=part.name, daemon=True)
        self.part = part
        self.healthy = threading.Event()
        self.stop = threading.Event()
        self._layout = layout
        self._needs = needs
        self._publish = publish
        self._start_timeout_s = start_timeout_s
        self._state = PartState(name=part.name, state=Phase.waiting, address=part.address)
        self._process: subprocess.Popen[bytes] | None = None
        self._who: Identity | None = None
        self._deaths: collections.deque[float] = collections.deque(maxlen=DEATHS)

    def run(self) -> None:
        """Until `stop`."""
        self._show(Phase.waiting, "for " + ", ".join(n.name for n in self._needs) if self._needs else "")
        if not self._wait_for_needs():
            return
        while not self.stop.is_set():
            try:
                self._live_once()
            except KhetError as error:
                self._note_death(str(error), type(error).__name__)
            except OSError as error:  # no space left, too many processes
                self._note_death(f"{self.part.name}: {error}", "ExternalError")

    def _live_once(self) -> None:
        """One life of the part, from its start or adoption to its death."""
        self._start_or_adopt()
        self._await_healthy()
        self.part.furnish()
        if not self.stop.is_set():
            self.healthy.set()
            self._show(Phase.running, self.part.check(), checked=True)
            self._watch()

    def _wait_for_needs(self) -> bool:
        for need in self._needs:
            while not need.healthy.wait(LIVENESS_S):
                if self.stop.is_set():
                    return False
        return not self.stop.is_set()

    def _start_or_adopt(self) -> None:
        path = self._layout.pid(self.part.name)
        launch = None
        if (who := process.recall(path)) is not None:
            launch = self.part.launch()
            if process.recalled_fingerprint(path) == launch.fingerprint:
                self._who = who
                self._show(Phase.starting, "found running", adopted=who != self._own)
                return
        self._end_remains()
        self._show(Phase.starting, "preparing", adopted=False)
        self.part.prepare()
        self._refuse_taken_ports()
        self._process = process.spawn(self.part.launch())
        self._who = process.identify(self._process.pid)
        if self._who is None:
            raise ExternalError(f"{self.part.name}: ended at once with {self._process.poll()}")
        try:
            process.remember(path, self._who, self.part.launch().fingerprint)
        except OSError:  # a process that nobody knows of would run beside the next one
            self._end(self._who)
            raise
        self._state = self._state.model_copy(update={"pid": self._who.pid, "since": datetime.now(UTC)})
        self._show(Phase.starting, "waiting for it to answer")

    @property
    def _own(self) -> Identity | None:
        return process.identify(self._process.pid) if self._process and self._process.poll() is None else None

    def _end_remains(self) -> None:
        """End the process that is to be replaced. What the worker and the node started is not theirs to take along."""
        if (who := process.recall(self._layout.pid(self.part.name))) is not None:
            self._end(who)

    def _end(self, who: Identity) -> None:
        if not who.signal(self.part.stop_signal):
            return
        if not process.wait_gone([who], 5.0, self._reap):
            who.signal(signal.SIGKILL)
            process.wait_gone([who], 2.0, self._reap)

    def _refuse_taken_ports(self) -> None:
        numbers = ports.remembered(self._layout.ports)
        deadline = time.monotonic() + 2.0  # connections of a killed process may take a moment to go
        while taken := [
            numbers[name] for name in self.part.ports if name in numbers and not ports.is_free(numbers[name])
        ]:
            if time.monotonic() > deadline:
                listed = ", ".join(map(str, taken))
                raise ExternalError(
                    f"{self.part.name}: port {listed} is taken by another program, so it was not started. "
                    "Next: stop that program, or `khet down` and `khet up` to have another port chosen."
                )
            self.stop.wait(0.1)

    def _await_healthy(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        pause_s = 0.05
        while not self.stop.is_set():
            try:
                self.part.check()
            except ExternalError as error:
                self._refuse_death()
                if time.monotonic() > deadline:
                    self._end_remains()
                    raise ExternalError(
                        f"not healthy {self._start_timeout_s:.0f} s after its start: {error}"
                    ) from error
            else:
                return
            self.stop.wait(pause_s)
            pause_s = min(pause_s * 1.3, 0.5)

    def _watch(self) -> None:
        next_check = time.monotonic() + CHECK_S
        well = time.monotonic()
        while not self.stop.wait(LIVENESS_S):
            self._refuse_death()
            if time.monotonic() < next_check:
                continue
            try:
                self._show(Phase.running, self.part.check(), checked=True)
                well = time.monotonic()
            except ExternalError as error:
                self._show(Phase.running, f"does not answer: {error}", checked=True)
                if time.monotonic() - well > UNHEALTHY_S:
                    self._end_remains()
                    raise
            next_check = time.monotonic() + CHECK_S

    def _refuse_death(self) -> None:
        self._reap()
        if self._who is None or not self._who.alive:
            code = self._process.returncode if self._process else None
            raise ExternalError(f"ended{'' if code is None else f' with {code}'}")

    def _reap(self) -> None:
        if self._process is not None:
            self._process.poll()

    def _note_death(self, reason: str, error: str) -> None:
        """Tell it, count it, and wait before the next attempt."""
        self.healthy.clear()
        if self.stop.is_set():
            return
        now = time.monotonic()
        self._deaths.append(now)
        often = len(self._deaths) == DEATHS and now - self._deaths[0] < WINDOW_S
        hopeless = often or error == ConfigError.__name__
        update = {"restarts": self._state.restarts + 1, "pid": None, "since": None, "adopted": False}
        self._state = self._state.model_copy(update=update)
        phase = Phase.failed if hopeless else Phase.starting
        self._show(phase, reason, error=error)
        recent = sum(now - death < WINDOW_S for death in self._deaths)
        self.stop.wait(SLOW_RETRY_S if hopeless else BACKOFF_S[min(recent, len(BACKOFF_S)) - 1])

    def _show(
        self, phase: Phase, detail: str, *, error: str | None = None, checked: bool = False, adopted: bool | None = None
    ) -> None:
        update: dict[str, object] = {"state": phase, "detail": detail, "error": error}
        if checked:
            update["checked_at"] = datetime.now(UTC)
        if adopted is not None:
            update["adopted"] = adopted
        if self._who is not None and phase in (Phase.starting, Phase.running) and adopted:
            update |= {"pid": self._who.pid, "since": _since(self._layout, self.part.name)}
        self._state = self._state.model_copy(update=update)
        self._publish(self._state)


def _since(layout: Layout, part: str) -> datetime | None:
    try:
        return datetime.fromtimestamp(layout.pid(part).stat().st_mtime, UTC)
    except FileNotFoundError:
        return None
