"""One part under supervision: restarted when it dies, given up on visibly, adopted, never duplicated."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.errors import ConfigError, ExternalError
from deployments.local import process, runner
from deployments.local.files import Layout, write_json
from deployments.local.process import Launch
from deployments.local.runner import Runner
from deployments.local.state import PartState, Phase

SLEEP = "import time; time.sleep(60)"


@dataclasses.dataclass
class Sleeper:
    """A real process with a health that the test decides."""

    layout: Layout
    name: str = "sleeper"
    needs: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    address: str = "nowhere"
    stop_signal: signal.Signals = signal.SIGTERM
    code: str = SLEEP
    well: bool = True
    mode: str = "a"
    broken: str = ""
    furnished: int = 0

    def prepare(self) -> None:
        if self.broken:
            raise ConfigError(self.broken)

    def launch(self) -> Launch:
        env = {"PATH": os.environ["PATH"], "MODE": self.mode}
        return Launch((sys.executable, "-c", self.code), env, self.layout.root, self.layout.log(self.name))

    def check(self) -> str:
        if not self.well:
            raise ExternalError("it does not answer")
        return "fine"

    def furnish(self) -> None:
        self.furnished += 1


class Bench:
    """Runners and everything they published."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.make()
        self.part = Sleeper(self.layout)
        self.seen: list[PartState] = []
        self.runners: list[Runner] = []

    def watch(self, part: Sleeper | None = None, needs: tuple[Runner, ...] = (), start_timeout_s: float = 10) -> Runner:
        started = Runner(part or self.part, self.layout, needs, self.seen.append, start_timeout_s)
        self.runners.append(started)
        started.start()
        return started

    @property
    def now(self) -> PartState:
        return self.seen[-1]

    def until(self, condition: Callable[[], object], timeout_s: float = 15) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, [f"{s.state} {s.detail}" for s in self.seen[-8:]]
            time.sleep(0.01)

    def until_running(self) -> int:
        self.until(lambda: self.seen and self.now.state is Phase.running)
        assert self.now.pid is not None
        return self.now.pid

    def leave(self) -> None:
        """End the watching, not the part: as a supervisor that was killed."""
        for one in self.runners:
            one.stop.set()
            one.join(10)
        self.runners.clear()

    def close(self) -> None:
        self.leave()
        for path in self.layout.run.glob("*.json"):
            if who := process.recall(path):
                who.signal(signal.SIGKILL)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(runner, "LIVENESS_S", 0.02)
    monkeypatch.setattr(runner, "CHECK_S", 0.05)
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_killed_part_is_started_again_and_counted(bench):
    bench.watch()
    first = bench.until_running()
    os.kill(first, signal.SIGKILL)
    bench.until(lambda: bench.now.restarts == 1 and bench.now.state is Phase.running)
    assert bench.now.pid != first
    assert bench.part.furnished == 2
    assert any("ended with -9" in s.detail for s in bench.seen)


def test_a_part_that_dies_at_every_start_is_given_up_visibly_and_tried_slowly(bench, monkeypatch):
    monkeypatch.setattr(runner, "SLOW_RETRY_S", 0.3)
    bench.part.code = "raise SystemExit(3)"
    bench.part.well = False
    bench.watch()
    bench.until(lambda: bench.seen and bench.now.state is Phase.failed)
    assert (bench.now.restarts, bench.now.detail, bench.now.error) == (5, "ended with 3", "ExternalError")
    bench.part.code, bench.part.well = SLEEP, True
    bench.until_running()


def test_a_configuration_error_is_final_at_once(bench):
    bench.part.broken = "weed is not installed"
    bench.watch()
    bench.until(lambda: bench.seen and bench.now.state is Phase.failed)
    assert (bench.now.restarts, bench.now.error, bench.now.detail) == (1, "ConfigError", "weed is not installed")


def test_a_part_that_never_answers_is_ended_and_tried_again(bench):
    bench.part.well = False
    bench.watch(start_timeout_s=0.2)
    bench.until(lambda: any("not healthy 0 s after its start" in s.detail for s in bench.seen))
    bench.part.well = True
    bench.until_running()
    assert len(_sleepers(bench)) == 1


def test_a_part_that_hangs_is_ended_and_started_again(bench, monkeypatch):
    monkeypatch.setattr(runner, "UNHEALTHY_S", 0.2)
    bench.watch()
    first = bench.until_running()
    bench.part.well = False
    bench.until(lambda: any("does not answer" in s.detail for s in bench.seen))
    bench.until(lambda: process.identify(first) is None)
    bench.part.well = True
    bench.until(lambda: bench.now.state is Phase.running and bench.now.pid != first)


def test_a_short_silence_is_shown_but_restarts_nothing(bench):
    bench.watch()
    first = bench.until_running()
    bench.part.well = False
    bench.until(lambda: "does not answer" in bench.now.detail)
    assert bench.now.state is Phase.running
    bench.part.well = True
    bench.until(lambda: bench.now.detail == "fine")
    assert (bench.now.pid, bench.now.restarts) == (first, 0)


def test_a_running_part_is_adopted_by_the_next_supervisor(bench):
    bench.watch()
    first = bench.until_running()
    bench.leave()
    bench.watch()
    bench.until(lambda: bench.now.state is Phase.running and bench.now.adopted)
    assert (bench.now.pid, bench.now.restarts) == (first, 0)
    os.kill(first, signal.SIGKILL)
    bench.until(lambda: bench.now.restarts == 1 and bench.now.state is Phase.running)


def test_a_part_whose_configuration_changed_is_replaced_not_adopted(bench):
    bench.watch()
    first = bench.until_running()
    bench.leave()
    bench.part.mode = "b"
    bench.watch()
    bench.until(lambda: bench.now.state is Phase.running and bench.now.pid != first)
    assert process.identify(first) is None
    assert len(_sleepers(bench)) == 1


def test_a_part_waits_for_what_it_needs(bench):
    bench.part.well = False
    base = bench.watch()
    dependent = Sleeper(bench.layout, name="dependent")
    bench.watch(dependent, needs=(base,))
    bench.until(lambda: any(s.name == "dependent" and s.detail == "for sleeper" for s in bench.seen))
    bench.until(lambda: any(s.name == "sleeper" and s.pid for s in bench.seen))
    assert not bench.layout.pid("dependent").exists()
    bench.part.well = True
    bench.until(lambda: any(s.name == "dependent" and s.state is Phase.running for s in bench.seen))


def test_a_port_that_a_stranger_holds_is_named(bench):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        write_json(bench.layout.ports, {"s3": port})
        bench.part.ports = ("s3",)
        bench.watch()
        bench.until(lambda: any(f"port {port} is taken by another program" in s.detail for s in bench.seen))
    bench.until_running()


def _sleepers(bench: Bench) -> list[process.Identity]:
    found = (process.recall(path) for path in bench.layout.run.glob("*.json"))
    return [who for who in found if who]


def test_a_part_that_cannot_be_written_down_is_ended_and_not_started_once_more_beside_itself(
    bench, tmp_path, monkeypatch
):
    """As on a full disk: nobody would know the process, and each attempt would leave another."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(process, "remember", full)
    marked = f"{SLEEP}  # {tmp_path}"
    bench.part.code = marked
    bench.watch()
    bench.until(lambda: len([state for state in bench.seen if state.error == "ExternalError"]) >= 3)
    bench.leave()
    assert [p.pid for p in psutil.process_iter() if marked in " ".join(_arguments(p))] == []


def _arguments(found: psutil.Process) -> list[str]:
    try:
        return found.cmdline()
    except psutil.Error:
        return []
