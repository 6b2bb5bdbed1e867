"""The local stack under faults: what dies comes back, what is left is adopted or cleaned, and nobody starts it twice.

These run the object store, PostgreSQL and the node; `test_stack_prefect.py` has the orchestrator.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from configs.settings import PROJECT_ROOT, load_settings
from deployments.local import PartEvent, Phase, StackState, doctor, down, status, up
from deployments.local import ports as port_choice
from deployments.local.files import Layout, read_json, write_json
from deployments.local.process import Identity, identify, marked, recall, wait_gone
from deployments.local.seaweedfs import shared_sockets
from deployments.local.stack import leftovers
from tests.support.stack import stack_home

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else or mount")


@pytest.fixture
def home(tmp_path) -> Iterator[Path]:
    """A home folder of its own, stopped at the end."""
    with stack_home(tmp_path / "home") as root:
        yield root


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Path]:
    """A healthy stack for tests that leave one behind."""
    with stack_home(tmp_path_factory.mktemp("stack") / "home") as root:
        up(load_settings())
        yield root


def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, status().model_dump_json(indent=1)
        time.sleep(0.05)


def pid_of(name: str) -> int:
    part = status().part(name)
    assert part is not None, status()
    assert part.pid is not None, part
    return part.pid


def supervisor(root: Path) -> Identity:
    who = recall(Layout(root).supervisor)
    assert who is not None
    return who


def kill_supervisor(root: Path) -> None:
    who = supervisor(root)
    who.signal(signal.SIGKILL)
    assert wait_gone([who], 5)


def stack_command(code: str, root: Path, **env: str) -> subprocess.Popen[str]:
    """Another terminal: a process of its own that uses the same home folder."""
    script = f"from configs.settings import load_settings; from deployments.local import *; {code}"
    environment = {**os.environ, "KHET_HOME": str(root), **env}
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_up_tells_its_steps_and_the_settings_lead_to_the_servers(home):
    events: list[PartEvent] = []
    state = up(load_settings(), on_event=events.append)
    assert state.healthy
    for name in ("object-store", "postgres"):
        told = [e.state for e in events if e.part == name]
        assert told[-1] is Phase.running
        assert Phase.starting in told
    checks = {c.name: c for c in doctor()}
    broken = {n: c.detail for n, c in checks.items() if not c.ok}
    assert set(broken) <= {"prefect", "automations"}, broken  # external here, and without an address
    assert json.loads(state.model_dump_json())["parts"][0]["state"] == "running"


def test_down_stops_everything_in_ten_seconds_and_leaves_no_process(home):
    up(load_settings())
    started = time.monotonic()
    events: list[PartEvent] = []
    down(on_event=events.append)
    assert time.monotonic() - started < 10
    assert {e.part for e in events if e.state is Phase.stopped} >= {"object-store", "postgres"}
    assert leftovers(home) == []
    assert marked(home) == []
    assert [p for p in shared_sockets(port_choice.remembered(Layout(home).ports)) if p.exists()] == []
    assert status() == StackState(home=str(home))
    down()


def test_a_second_up_changes_nothing(running):
    before = status()
    started = time.monotonic()
    again = up(load_settings())
    assert time.monotonic() - started < 2
    assert again.supervisor == before.supervisor
    assert [p.pid for p in again.parts] == [p.pid for p in before.parts]


def test_up_waits_only_for_what_is_asked_for(home):
    state = up(load_settings(), wait_for={"postgres"})
    assert state.part("postgres").state is Phase.running
    with psycopg.connect(load_settings().database.dsn.get_secret_value()) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert up(load_settings()).healthy


def test_waiting_for_a_part_that_does_not_exist_is_refused(running):
    with pytest.raises(ConfigError, match="postgress: no such part"):
        up(load_settings(), wait_for={"postgress"})


def test_status_is_fast_and_imports_no_prefect(running):
    code = "import time, sys; t = time.monotonic(); s = status(); assert s.healthy; d = time.monotonic() - t; "
    code += "assert 'prefect' not in sys.modules and 'boto3' not in sys.modules; print(d)"
    output = stack_command(code, running).communicate(timeout=60)[0]
    assert float(output.splitlines()[-1]) < 0.3, output


@pytest.mark.parametrize("name", ["object-store", "postgres", "node"])
def test_a_killed_part_comes_back_healthy_on_its_port(running, name):
    if status().part(name) is None:
        pytest.skip(f"this version has no {name}")
    before = status().part(name)
    os.kill(pid_of(name), signal.SIGKILL)
    until(lambda: (p := status().part(name)).restarts > before.restarts and p.state is Phase.running)
    assert status().part(name).address == before.address
    assert not [c for c in doctor() if not c.ok and c.name in ("object store", "database", "node", "supervisor")]


def test_a_killed_supervisor_leaves_the_parts_and_the_next_up_adopts_them(running):
    before = status()
    kill_supervisor(running)
    alone = status()
    assert alone.supervisor is None
    assert [p.pid for p in alone.parts] == [p.pid for p in before.parts]
    after = up(load_settings())
    assert after.healthy
    assert after.supervisor.pid != before.supervisor.pid
    assert [(p.name, p.pid, p.address) for p in after.parts] == [(p.name, p.pid, p.address) for p in before.parts]
    assert all(p.adopted for p in after.parts)


def test_down_after_a_killed_supervisor_leaves_no_process(home):
    up(load_settings())
    kill_supervisor(home)
    down()
    assert leftovers(home) == []


def test_parts_that_died_with_the_supervisor_are_started_again(home):
    up(load_settings())
    pids = [identify(pid_of(name)) for name in ("object-store", "postgres")]
    kill_supervisor(home)
    for who in pids:
        who.signal(signal.SIGKILL)
    state = up(load_settings())
    assert state.healthy
    assert not [c.detail for c in doctor() if not c.ok and c.name in ("object store", "database")]


def test_of_two_ups_at_the_same_time_one_wins_and_the_other_says_so(home):
    code = "\ntry: print(up(load_settings()).healthy)\nexcept Exception as e: print(type(e).__name__, e)"
    both = [stack_command(code, home) for _ in range(2)]
    said = sorted(p.communicate(timeout=120)[0].strip().splitlines()[-1] for p in both)
    # The later one may also arrive when the stack is already complete: then it changes nothing and says so too.
    assert said[-1] == "True", said
    assert said[0] == "True" or "Another `khet up` is starting" in said[0], said
    assert len(marked(home, "supervisor")) == 1


def test_the_loser_of_two_ups_is_refused_while_the_first_still_works(home):
    layout = Layout(home)
    first = threading.Thread(target=lambda: up(load_settings()))
    first.start()
    until(lambda: recall(layout.supervisor) is not None)
    with pytest.raises(SafetyError, match="Another `khet up` is starting the stack"):
        up(load_settings())
    first.join(60)
    assert status().healthy


def test_down_from_another_terminal_while_up_is_starting(home):
    told: list[KhetError] = []

    def first() -> None:
        try:
            up(load_settings())
        except KhetError as error:
            told.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    until(lambda: recall(Layout(home).supervisor) is not None)
    started = time.monotonic()
    down()
    assert time.monotonic() - started < 10
    thread.join(30)
    assert told, "up returned as if nothing had happened"
    assert leftovers(home) == []
    assert up(load_settings()).healthy


def test_sigterm_to_the_supervisor_stops_everything(home):
    up(load_settings())
    who = supervisor(home)
    started = time.monotonic()
    who.signal(signal.SIGTERM)
    until(lambda: not who.alive, timeout_s=10)
    assert time.monotonic() - started < 10
    assert leftovers(home) == []


def test_a_stack_whose_home_folder_was_deleted_ends(home):
    """Without its folder nobody can find or stop it any more."""
    up(load_settings())
    who, parts = supervisor(home), leftovers(home)
    shutil.rmtree(home, ignore_errors=True)
    assert wait_gone([who, *parts], 30), [process for process in (who, *parts) if process.alive]
    assert leftovers(home) == []


def test_a_remembered_port_that_was_taken_meanwhile_is_replaced_everywhere(home):
    up(load_settings())
    down()
    layout = Layout(home)
    old = port_choice.remembered(layout.ports)["s3"]
    with socket.create_server(("127.0.0.1", old)):
        state = up(load_settings())
    assert state.healthy
    assert not state.part("object-store").address.endswith(str(old))
    assert load_settings().object_store.endpoint_url == state.part("object-store").address
    assert not [c.detail for c in doctor() if not c.ok and c.name == "object store"]


def test_a_fixed_port_that_is_taken_is_refused_before_anything_starts(home, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        monkeypatch.setenv("KHET_STACK__POSTGRES_PORT", str(stranger.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"stack\.postgres_port: \d+ is taken"):
            up(load_settings())
    assert marked(home) == []


def test_a_stranger_with_a_recycled_pid_is_not_touched(home):
    layout = Layout(home)
    layout.make()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]) as stranger:
        record = {"pid": stranger.pid, "start": 1, "boot": identify(os.getpid()).boot, "fingerprint": ""}
        for path in (layout.pid("postgres"), layout.pid("object-store"), layout.supervisor):
            write_json(path, record)
        assert up(load_settings()).healthy
        down()
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("name", ["state.json", "supervisor.json", "postgres.json"])
def test_half_written_run_files_do_not_stop_the_next_start(home, name):
    layout = Layout(home)
    layout.make()
    (layout.run / name).write_text('{"pid": 12')
    assert up(load_settings(), wait_for={"postgres"}).part("postgres").state is Phase.running


def test_replicas_without_a_node_are_ended_by_down(home):
    """A node that was killed leaves its replicas; they are known by their records."""
    psutil = pytest.importorskip("psutil")
    replica = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    folder = home / "node" / "replicas"
    folder.mkdir(parents=True)
    created = psutil.Process(replica.pid).create_time()
    write_json(folder / "stable-1.json", {"pid": replica.pid, "create_time": created})
    write_json(folder / "stranger.json", {"pid": os.getpid(), "create_time": created - 3600})
    Layout(home).make()
    down()
    assert replica.wait(10) in (-signal.SIGTERM, -signal.SIGKILL)


def test_external_services_are_not_started_but_examined(home, running, monkeypatch):
    theirs = json.dumps(read_json(Layout(running).credentials))
    address = port_choice.remembered(Layout(running).ports)
    monkeypatch.setenv("KHET_STACK__OBJECT_STORE", "external")
    monkeypatch.setenv("KHET_STACK__DATABASE", "external")
    monkeypatch.setenv("KHET_OBJECT_STORE__ENDPOINT_URL", f"http://127.0.0.1:{address['s3']}")
    monkeypatch.setenv("KHET_OBJECT_STORE__ACCESS_KEY_ID", json.loads(theirs)["s3_access_key"])
    monkeypatch.setenv("KHET_OBJECT_STORE__SECRET_ACCESS_KEY", "wrong")
    password = json.loads(theirs)["khetguard_password"]
    monkeypatch.setenv(
        "KHET_DATABASE__DSN", f"postgresql://khetguard:{password}@127.0.0.1:{address['postgres']}/khetguard"
    )
    monkeypatch.setenv("KHET_HOME", str(home))
    state = up(load_settings())
    assert not {"object-store", "postgres"} & {p.name for p in state.parts}
    checks = {c.name: c for c in doctor()}
    assert checks["database"].ok
    assert not checks["object store"].ok
    assert "wrong" not in checks["object store"].detail
    assert checks["clock"].ok
    down()


def test_a_part_that_cannot_start_is_named_with_its_last_words(home, monkeypatch, tmp_path):
    broken = tmp_path / "bin"
    shutil.copytree(_binaries(), broken)
    (broken / "postgres").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "postgres (PostgreSQL) 17.1" && exit\necho "disk on fire"; exit 3\n'
    )
    (broken / "initdb").write_text('#!/bin/sh\nfor a; do [ "$p" = -D ] && d=$a; p=$a; done; echo 17 > $d/PG_VERSION\n')
    monkeypatch.setenv("KHET_STACK__POSTGRES_BIN", str(broken))
    with pytest.raises(ExternalError, match=r"postgres does not start: ended with 3(.|\n)*disk on fire"):
        up(load_settings())
    assert status().part("postgres").state is Phase.failed
    assert status().part("object-store").state is Phase.running


def test_a_missing_program_is_a_configuration_error(home, monkeypatch, tmp_path):
    monkeypatch.setenv("KHET_STACK__POSTGRES_BIN", str(tmp_path))
    with pytest.raises(ConfigError, match="PostgreSQL was not found"):
        up(load_settings())


@as_root
def test_a_full_disk_is_an_error_that_leaves_nothing_half(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount here")
    try:
        with stack_home(disk / "home") as root:
            (disk / "ballast").write_bytes(b"x" * 50_000)
            with pytest.raises(KhetError, match=r"[Nn]o space left"):
                up(load_settings())
            assert leftovers(root) == []
            (disk / "ballast").unlink()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@as_root
def test_a_normal_user_can_run_it_too(tmp_path):
    """The same start as `nobody`, who owns nothing but the home folder."""
    python, path = _python_for_everybody()
    home = Path("/tmp") / f"khet-nobody-{os.getpid()}"
    home.mkdir(mode=0o700)
    os.chown(home, 65_534, 65_534)
    code = "\ntry: print(up(load_settings()).healthy, [c.detail for c in doctor() if not c.ok])\nfinally: down()"
    script = f"from configs.settings import load_settings; from deployments.local import *; {code}"
    env = {
        "PATH": os.environ["PATH"],
        "KHET_HOME": str(home),
        "KHET_STACK__ORCHESTRATOR": "external",
        "PYTHONPATH": path,
    }
    try:
        done = subprocess.run(
            [*_AS_NOBODY, python, "-c", script], cwd=PROJECT_ROOT, env=env, text=True, capture_output=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.stdout.startswith("True"), done.stdout + done.stderr
        assert {p.stat().st_uid for p in home.rglob("*") if not p.is_symlink()} == {65_534}
        assert not [p for p in home.rglob("*.json") if stat.S_IMODE(p.stat().st_mode) & 0o077 and p.parent == home]
    finally:
        shutil.rmtree(home)


_AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def _python_for_everybody() -> tuple[str, str]:
    """An interpreter that nobody may start, and again from there, and the path on which it finds the packages."""
    code = "import subprocess, sys, psycopg, boto3; subprocess.run([sys.executable, '-V'], check=True)"
    packages = os.pathsep.join([str(PROJECT_ROOT), sysconfig.get_path("purelib")])
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": packages}
        tried = subprocess.run(
            [*_AS_NOBODY, python, "-c", code], check=False, cwd=PROJECT_ROOT, env=env, capture_output=True
        )
        if tried.returncode == 0:
            return python, packages
    pytest.skip("no interpreter and packages that the user nobody may read")


def _binaries() -> Path:
    from deployments.local.postgres import find_binaries

    return find_binaries(None).folder
