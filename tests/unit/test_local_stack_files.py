"""What the local stack keeps on disk: private, never half, and never mistaken for somebody else's."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError, IntegrityError, SafetyError
from configs.settings import load_settings
from deployments.local import ports, process
from deployments.local.credentials import load_or_create, signing_keys
from deployments.local.files import Layout, read_json, write_json, write_private
from deployments.local.lifecycle import status, tail
from deployments.local.prefect_api import automations
from deployments.local.process import Identity, Launch
from deployments.local.site import Site
from deployments.local.state import PartState, Phase, StackState, SupervisorState
from deployments.local.supervisor import cut_logs, hold_lock


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, not made yet."""
    monkeypatch.setenv("KHET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_that_is_written_is_private(home):
    site = Site.prepare(load_settings(), home)
    files = [home / "credentials.json", home / "settings.yaml", *(home / "keys").iterdir()]
    assert {mode(f) for f in files} == {0o600}
    assert {mode(f) for f in (home, site.layout.run, site.layout.logs, site.layout.keys)} == {0o700}


def test_a_loose_mode_is_repaired_at_the_next_start(home):
    Site.prepare(load_settings(), home)
    (home / "credentials.json").chmod(0o644)
    home.chmod(0o755)
    Site.prepare(load_settings(), home)
    assert (mode(home / "credentials.json"), mode(home)) == (0o600, 0o700)


def test_a_second_start_changes_no_port_secret_or_key(home):
    first = Site.prepare(load_settings(), home)
    kept = {f: f.read_bytes() for f in home.rglob("*") if f.is_file()}
    second = Site.prepare(load_settings(), home)
    assert (first.ports, first.secrets) == (second.ports, second.secrets)
    assert kept == {f: f.read_bytes() for f in home.rglob("*") if f.is_file()}


def test_other_processes_read_the_whole_settings_from_the_file(home):
    site = Site.prepare(load_settings(), home)
    read = load_settings()
    assert read.object_store.endpoint_url == site.url("s3")
    assert read.object_store.secret_access_key.get_secret_value() == site.secrets.s3_secret_key
    assert read.database.dsn.get_secret_value() == site.dsn()
    assert read.orchestrator.api_url == site.api_url
    assert read.cluster.gateway_url == site.url("gateway")
    assert read.registry.signing_key.exists()
    assert all(key.exists() for key in read.registry.trusted_keys)


def test_what_a_person_added_to_the_settings_file_stays(home):
    home.mkdir(mode=0o700)
    (home / "settings.yaml").write_text("canary: {lease_s: 45}\nobject_store: {region: ap-south-1}\n")
    Site.prepare(load_settings(), home)
    assert load_settings().canary.lease_s == 45
    assert load_settings().object_store.region == "ap-south-1"


def test_external_services_keep_their_own_addresses(home, monkeypatch):
    monkeypatch.setenv("KHET_STACK__OBJECT_STORE", "external")
    monkeypatch.setenv("KHET_STACK__DATABASE", "external")
    monkeypatch.setenv("KHET_STACK__ORCHESTRATOR", "external")
    Site.prepare(load_settings(), home)
    assert set(yaml.safe_load((home / "settings.yaml").read_text())) == {"registry", "cluster"}


def test_the_password_of_prefect_goes_when_it_is_switched_off(home, monkeypatch):
    monkeypatch.setenv("KHET_STACK__PREFECT_AUTH", "true")
    Site.prepare(load_settings(), home)
    assert load_settings().orchestrator.auth_string.get_secret_value().startswith("khet:")
    monkeypatch.setenv("KHET_STACK__PREFECT_AUTH", "false")
    Site.prepare(load_settings(), home)
    assert load_settings().orchestrator.auth_string is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="set KHET_HOME to a folder that is"):
        Layout(tmp_path / "home").make()


def test_a_file_in_the_place_of_the_home_folder_is_named(tmp_path):
    (tmp_path / "home").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Layout(tmp_path / "home").make()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_private(path, "old")

    def no_space(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_private(path, "new")
    assert (path.read_text(), [p.name for p in tmp_path.iterdir()]) == ("old", ["state.json"])


def test_half_written_state_reads_as_none(home):
    layout = Layout(home)
    layout.make()
    layout.state.write_text('{"home": "/x", "parts": [{"na')
    layout.ports.write_text('{"s3": 23')
    assert status() == StackState(home=str(home))
    assert ports.remembered(layout.ports) == {}


def test_damaged_credentials_are_not_replaced(tmp_path):
    path = tmp_path / "credentials.json"
    path.write_text('{"s3_access_key": "KH')
    with pytest.raises(IntegrityError, match="nothing was changed"):
        load_or_create(path)
    assert path.read_text() == '{"s3_access_key": "KH'


def test_a_secret_that_an_older_version_did_not_have_is_added(tmp_path):
    path = tmp_path / "credentials.json"
    first = load_or_create(path)
    write_json(path, {k: v for k, v in read_json(path).items() if k != "node_token"})
    second = load_or_create(path)
    assert second.node_token
    assert second.s3_secret_key == first.s3_secret_key


def test_secrets_do_not_show_in_a_repr(tmp_path):
    secrets = load_or_create(tmp_path / "credentials.json")
    assert secrets.node_token not in repr(secrets)


def test_a_lost_public_key_is_made_again_from_the_private_one(tmp_path):
    private, public = signing_keys(tmp_path)
    before = public.read_bytes(), private.read_bytes()
    public.unlink()
    signing_keys(tmp_path)
    assert (public.read_bytes(), private.read_bytes()) == before


def listener() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))
    server.listen(1)
    return server


def test_ports_are_all_different(tmp_path):
    chosen = ports.choose(tmp_path / "ports.json", {})
    assert len(set(chosen.values())) == len(ports.NAMES)


def test_the_maintenance_worker_finds_its_admin_server(tmp_path):
    """It dials the admin port + 10000; ports remembered without that are chosen anew."""
    path = tmp_path / "ports.json"
    chosen = ports.choose(path, {})
    assert chosen["weed_admin_grpc"] == chosen["weed_admin"] + 10_000
    with socket.create_server(("127.0.0.1", chosen["weed_admin_grpc"])):
        again = ports.choose(path, {})
    assert again["weed_admin"] != chosen["weed_admin"]
    assert again["weed_admin_grpc"] == again["weed_admin"] + 10_000


@pytest.mark.parametrize("user", ["root", "another"])
def test_a_port_whose_socket_another_user_left_behind_is_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    path = tmp_path / "ports.json"
    before = ports.choose(path, {})
    sockets = [ports.shared_socket(name, before[name]) for name in ("master_grpc", "weed_admin_grpc")]
    try:
        for socket_file in sockets:
            assert socket_file is not None
            socket_file.touch()
        owner = sockets[0].stat().st_uid if sockets[0] else 0
        monkeypatch.setattr(os, "geteuid", lambda: 0 if user == "root" else owner + 1)
        after = ports.choose(path, {})
    finally:
        for socket_file in filter(None, sockets):
            socket_file.unlink(missing_ok=True)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == (set() if user == "root" else {"master_grpc", "weed_admin", "weed_admin_grpc"})


def test_a_remembered_port_that_a_stranger_took_is_replaced(tmp_path):
    path = tmp_path / "ports.json"
    with listener() as stranger:
        taken = stranger.getsockname()[1]
        write_json(path, {"s3": taken, "postgres": ports.choose(tmp_path / "other.json", {})["postgres"]})
        before = ports.remembered(path)
        after = ports.choose(path, {})
    assert after["s3"] != taken
    assert after["postgres"] == before["postgres"]
    assert ports.remembered(path) == after


def test_the_port_of_our_own_running_part_is_kept(tmp_path):
    path = tmp_path / "ports.json"
    with listener() as ours:
        write_json(path, {"s3": ours.getsockname()[1]})
        assert ports.choose(path, {}, in_use={"s3"})["s3"] == ours.getsockname()[1]


def test_a_fixed_port_that_is_taken_is_an_error_that_says_so(tmp_path):
    with listener() as stranger, pytest.raises(ConfigError, match=r"stack\.s3_port: \d+ is taken"):
        ports.choose(tmp_path / "ports.json", {"s3": stranger.getsockname()[1]})
    assert not (tmp_path / "ports.json").exists()


def test_a_fixed_port_is_used(tmp_path):
    with listener() as probe:
        free = probe.getsockname()[1]
    assert ports.choose(tmp_path / "ports.json", {"prefect": free})["prefect"] == free


@pytest.fixture
def sleeper():
    """A process of ours that does nothing."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def test_a_recycled_pid_is_a_stranger(tmp_path, sleeper):
    who = process.identify(sleeper.pid)
    assert who is not None
    for stale in (Identity(who.pid, who.start - 1, who.boot), Identity(who.pid, who.start, "another boot")):
        process.remember(tmp_path / "x.json", stale)
        assert process.recall(tmp_path / "x.json") is None
        assert not stale.signal(signal.SIGKILL)
    assert sleeper.poll() is None
    process.remember(tmp_path / "x.json", who)
    assert process.recall(tmp_path / "x.json") == who


def test_a_zombie_counts_as_ended(sleeper):
    who = process.identify(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGKILL)
    assert process.wait_gone([who], 5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "start": 1, "boot": ""}'])
def test_a_damaged_pid_file_names_nobody(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert process.recall(tmp_path / "x.json") is None


def test_children_and_grandchildren_are_found_by_their_stack(tmp_path):
    nested = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    env = {**os.environ, process.MARKER: process.marker(tmp_path, "node")}
    log = tmp_path / "log"
    child = process.spawn(Launch((sys.executable, "-c", nested), env, tmp_path, log))
    try:
        deadline = time.monotonic() + 10
        while len(found := process.marked(tmp_path)) < 2 and time.monotonic() < deadline:
            process.wait_gone([], 0)
        assert len(found) == 2
        assert process.marked(tmp_path, "worker") == []
        assert process.marked(tmp_path.parent) == []
        for who in found:
            who.signal(signal.SIGKILL)
        assert process.wait_gone(found, 5, lambda: child.poll() and None)
    finally:
        child.kill()
        child.wait()


def test_only_what_is_run_counts_as_a_difference(tmp_path):
    def launch(**env: str) -> Launch:
        return Launch(("x",), env, tmp_path, tmp_path / "log")

    assert launch(PATH="/a", KEY="1").fingerprint == launch(PATH="/b", KEY="1").fingerprint
    assert launch(KEY="1").fingerprint != launch(KEY="2").fingerprint


def test_a_long_log_is_cut_while_its_writer_goes_on(tmp_path):
    layout = Layout(tmp_path)
    layout.make()
    path = layout.log("postgres")
    with path.open("ab") as writer:
        writer.write(b"x" * 5000)
        writer.flush()
        cut_logs(layout, max_bytes=1000)
        writer.write(b"after")
        writer.flush()
    assert path.read_bytes() == b"after"
    assert path.with_name("postgres.log.1").stat().st_size == 5000


def test_a_second_supervisor_is_refused(tmp_path):
    layout = Layout(tmp_path)
    layout.make()
    first = hold_lock(layout.run / "supervisor.lock")
    with pytest.raises(SafetyError, match="already watches"):
        hold_lock(layout.run / "supervisor.lock")
    os.close(first)
    os.close(hold_lock(layout.run / "supervisor.lock"))


def test_status_without_a_supervisor_tells_what_still_runs(home, sleeper):
    layout = Layout(home)
    layout.make()
    running = [PartState(name=n, state=Phase.running, address="", pid=1) for n in ("postgres", "object-store")]
    supervisor = SupervisorState(pid=1, since="2026-01-01T00:00:00Z")
    write_private(layout.state, StackState(home=str(home), supervisor=supervisor, parts=running).model_dump_json())
    process.remember(layout.pid("postgres"), process.identify(sleeper.pid))
    seen = status()
    assert seen.supervisor is None
    assert not seen.healthy
    assert seen.part("postgres").state is Phase.running
    assert "takes it over" in seen.part("postgres").detail
    assert seen.part("object-store").state is Phase.stopped
    assert json.loads(seen.model_dump_json())["parts"][1]["state"] == "stopped"


def test_the_tail_of_a_log_is_its_last_lines(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {n}\n" for n in range(10_000)))
    assert tail(log, lines=2) == "line 9998\nline 9999"
    assert "No such file" in tail(tmp_path / "none.log")


def test_zombies_are_given_three_of_prefects_heartbeats():
    """Prefect sends no more than one in 30 s: a shorter setting must not crash healthy runs."""
    assert [a["trigger"]["within"] for a in automations(heartbeat_s=5)] == [90.0, 600.0]
    assert automations(heartbeat_s=60)[0]["trigger"]["within"] == 180.0
