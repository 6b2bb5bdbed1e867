"""Real servers for tests, below a folder of the test's own.

`start_object_store(tmp_path)` and `start_postgres(tmp_path)` start one part and return its settings;
`stop_parts(tmp_path)` ends what was started there, and so does the end of the test process. `stop_parts` keeps the
data: a second start with the same folder finds it again on the same port.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from configs import settings as configured
from configs.areas import DatabaseSettings, ObjectStoreSettings
from configs.errors import ExternalError
from configs.settings import Settings
from deployments.local import down
from deployments.local.parts import Part
from deployments.local.postgres import Postgres
from deployments.local.process import spawn
from deployments.local.seaweedfs import ObjectStore
from deployments.local.site import Site

_running: dict[Path, list[tuple[Part, subprocess.Popen[bytes]]]] = {}


def start_object_store(tmp: Path, **overrides: object) -> ObjectStoreSettings:
    """Start SeaweedFS below `tmp`, create the two buckets, return how to reach it. About one second."""
    part = ObjectStore(_site(tmp))
    start(tmp, part)
    return part.connection().model_copy(update=overrides)


def start_postgres(tmp: Path) -> DatabaseSettings:
    """Start PostgreSQL below `tmp` with the database `khetguard`, return how to reach it. About two seconds."""
    site = _site(tmp)
    start(tmp, Postgres(site))
    return DatabaseSettings(dsn=SecretStr(site.dsn()))


def start(tmp: Path, part: Part, timeout_s: float = 40.0) -> subprocess.Popen[bytes]:
    """Start one part and wait until it is usable."""
    part.prepare()
    process = spawn(part.launch())
    _running.setdefault(tmp, []).append((part, process))
    wait_healthy(part, process, timeout_s)
    part.furnish()
    return process


def wait_healthy(part: Part, process: subprocess.Popen[bytes], timeout_s: float = 40.0) -> None:
    """Poll `part` until it answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            part.check()
        except ExternalError as error:
            log = part.launch().log.read_text(encoding="utf-8", errors="replace")[-2000:]
            assert process.poll() is None, f"{part.name} ended with {process.returncode}:\n{log}"
            assert time.monotonic() < deadline, f"{part.name} is not healthy: {error}\n{log}"
            time.sleep(0.05)
        else:
            return


def stop_parts(tmp: Path, number: signal.Signals | None = None) -> None:
    """End what was started below `tmp`: politely, or with `number` (SIGKILL for a crash)."""
    started = _running.pop(tmp, [])
    for part, process in started:
        if process.poll() is None:
            process.send_signal(number or part.stop_signal)
    for _, process in started:
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(8)


def pids(tmp: Path) -> list[int]:
    """The processes started below `tmp`, for tests that freeze or kill them."""
    return [process.pid for _, process in _running.get(tmp, [])]


@contextlib.contextmanager
def object_store(tmp: Path) -> Iterator[ObjectStoreSettings]:
    """A SeaweedFS for the length of a `with` block."""
    try:
        yield start_object_store(tmp)
    finally:
        stop_parts(tmp)


@contextlib.contextmanager
def postgres(tmp: Path) -> Iterator[DatabaseSettings]:
    """A PostgreSQL for the length of a `with` block."""
    try:
        yield start_postgres(tmp)
    finally:
        stop_parts(tmp)


def _site(tmp: Path) -> Site:
    held = {port for part, _ in _running.get(tmp, ()) for port in part.ports}
    return Site.prepare(Settings(), tmp, in_use=held)


@contextlib.contextmanager
def stack_home(root: Path, *, prefect: bool = False) -> Iterator[Path]:
    """A home folder for `deployments.local.up`; whatever runs in it at the end is stopped.

    Without `prefect` the stack is the object store, PostgreSQL and the node: seconds instead of half a minute.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KHET_HOME", str(root))
        if not prefect:
            patch.setenv("KHET_STACK__ORCHESTRATOR", "external")
        configured.settings.cache_clear()
        try:
            yield root
        finally:
            down()
            configured.settings.cache_clear()


@atexit.register
def _stop_all() -> None:
    for tmp in list(_running):
        stop_parts(tmp)
