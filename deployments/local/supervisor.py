"""The supervisor: `python -m deployments.local.supervisor`, one process a home folder, started by `khet up`.

It starts the parts side by side as far as their needs allow, keeps them running, publishes the state of all of them in
one file, cuts their logs, and on SIGTERM stops them in order. Killed with -9 it takes nothing along: the next one
adopts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from configs.errors import KhetError, SafetyError
from configs.settings import home, load_settings
from deployments.local import process, stack
from deployments.local.files import Layout, write_private
from deployments.local.parts import Part
from deployments.local.runner import Runner
from deployments.local.site import Site
from deployments.local.state import PartState, Phase, StackState, SupervisorState
from deployments.local.stopping import stop_everything

HOUSEKEEPING_S = 5.0
MAX_LOG_BYTES = 8_000_000
log = logging.getLogger("khet.supervisor")


class Board:
    """The published state: the parts' threads write to it, `khet status` reads the file."""

    def __init__(self, layout: Layout, parts: Sequence[Part]) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        # All of them from the beginning: who waits for a part must not find it missing and take that for an answer.
        self._parts = {p.name: PartState(name=p.name, state=Phase.waiting, address=p.address) for p in parts}
        self._supervisor = SupervisorState(pid=os.getpid(), since=datetime.now(UTC))

    def publish(self, part: PartState) -> None:
        """Replace what is known of one part."""
        with self._lock:
            before = self._parts[part.name]
            self._parts[part.name] = part
            if (before.state, before.detail) != (part.state, part.detail):
                log.info("%s: %s: %s", part.name, part.state, part.detail)
            self._write()

    def announce_stop(self) -> None:
        """Tell everybody who looks that the stack is going down."""
        with self._lock:
            self._supervisor = self._supervisor.model_copy(update={"stopping": True})
            self._write()

    def _write(self) -> None:
        known = tuple(self._parts.values())
        state = StackState(home=str(self._layout.root), supervisor=self._supervisor, parts=known)
        try:
            write_private(self._layout.state, state.model_dump_json(indent=1) + "\n", durable=False)
        except OSError as error:  # a full disk must not end the supervision; the file is written again soon
            log.error("the state could not be published: %s", error)


class Supervisor:
    """All runners of one stack."""

    def __init__(self, site: Site, parts: Sequence[Part]) -> None:
        self._site = site
        self._asked_to_stop = threading.Event()
        self._board = Board(site.layout, parts)
        self._runners: dict[str, Runner] = {}
        for part in parts:
            needs = [self._runners[name] for name in part.needs]
            timeout_s = site.settings.stack.start_timeout_s
            self._runners[part.name] = Runner(part, site.layout, needs, self._board.publish, timeout_s)

    def ask_to_stop(self, number: int = 0, frame: FrameType | None = None) -> None:  # noqa: ARG002 (a signal handler)
        """Signal handler: `run` returns when everything has stopped."""
        self._asked_to_stop.set()

    def run(self) -> None:
        """Supervise until asked to stop, or until the home folder is gone; then stop everything."""
        for runner in self._runners.values():
            runner.start()
        # Without the folder nobody could find this stack any more, or end it.
        while not self._asked_to_stop.wait(HOUSEKEEPING_S) and self._site.layout.run.is_dir():
            cut_logs(self._site.layout)
        log.info("stopping")
        for runner in self._runners.values():
            runner.stop.set()
        self._board.announce_stop()
        stop_everything(self._site.layout, self._site.settings.stack.stop_timeout_s)


def cut_logs(layout: Layout, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Move a log that has grown too long to `<part>.log.1` and begin it anew, without the writer noticing."""
    for path in layout.logs.glob("*.log"):
        try:
            if path.stat().st_size > max_bytes:
                shutil.copyfile(path, path.with_name(path.name + ".1"))
                os.truncate(path, 0)
        except OSError as error:
            log.error("%s could not be cut: %s", path, error)


def hold_lock(path: Path) -> int:
    """Take the lock that makes this process the only supervisor of its home folder, until it ends however it ends.

    Raises:
        SafetyError: another supervisor holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise SafetyError(f"Another supervisor already watches {path.parent.parent}. Nothing was started.") from error
    return handle


def main() -> int:
    """Entry point; the exit code is that of the KhetError that prevented the start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    layout = Layout(home())
    try:
        layout.make()
        lock = hold_lock(layout.run / "supervisor.lock")
        site = Site.prepare(load_settings(), layout.root, stack.ports_in_use(layout))
    except KhetError as error:
        log.error("%s", error)
        return error.exit_code
    supervisor = Supervisor(site, stack.parts(site))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, supervisor.ask_to_stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if (myself := process.identify(os.getpid())) is not None:
        process.remember(layout.supervisor, myself)
    supervisor.run()
    layout.supervisor.unlink(missing_ok=True)
    os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
