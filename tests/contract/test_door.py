"""The stack on one more address: what comes through the door is what the servers say, and what pods reach is told."""

from __future__ import annotations

import ipaddress
import json
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from configs.areas import ObjectStoreSettings, ServingSettings
from configs.errors import ConfigError, ExternalError
from configs.settings import Settings
from deployments.local.door import Door
from deployments.local.postgres import Postgres
from deployments.local.seaweedfs import ObjectStore as StorePart
from deployments.local.seaweedfs import s3_client
from deployments.local.site import DATABASE, Site
from ml import reach
from ml.version import Version
from tests.support.node import eventually
from tests.support.stack import start, stop_parts

OTHER = "127.0.0.2"  # an address of this machine that no server of the stack listens at


@dataclass
class Opened:
    """An object store and a database behind a door at `OTHER`."""

    site: Site
    door: Door
    store: ObjectStoreSettings
    home: Path

    def through(self, port: str) -> tuple[str, int]:
        return OTHER, self.site.ports[port]


def at(site: Site, address: str) -> Site:
    """A site for this address, a loopback one too, which settings would refuse."""
    area = site.settings.stack.model_copy(update={"listen": ipaddress.ip_address(address)})
    settings = site.settings.model_copy(update={"stack": area})
    return Site(site.layout, settings, site.ports, site.secrets)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    home = tmp_path_factory.mktemp("door")
    site = at(Site.prepare(Settings(), home), OTHER)
    store, door = StorePart(site), Door(site, ("object-store", "postgres"))
    for part in (store, Postgres(site), door):
        start(home, part)
    inside = store.connection()
    endpoint = f"http://{OTHER}:{site.ports['s3']}"
    yield Opened(site, door, inside.model_copy(update={"endpoint_url": endpoint}), home)
    stop_parts(home)


def test_signed_requests_and_large_bodies_come_through_unchanged(opened):
    client, body = s3_client(opened.store), bytes(range(256)) * 40_000
    client.put_object(Bucket=opened.store.models_bucket, Key="large", Body=body)
    assert client.get_object(Bucket=opened.store.models_bucket, Key="large")["Body"].read() == body


def test_a_password_is_asked_for_at_the_door_as_inside(opened):
    dsn = opened.site.dsn().replace("127.0.0.1", OTHER)
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == (DATABASE,)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(dsn.replace(opened.site.password(DATABASE), "guessed"))


def test_only_what_asks_for_a_password_is_behind_the_door(opened):
    for port in ("master", "volume", "filer"):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(opened.through(port), timeout=3)
    assert opened.door.check() == "2 ports are open"


def test_a_door_at_an_address_of_another_machine_does_not_open(opened):
    with pytest.raises(ConfigError, match=r"stack\.listen: 192\.0\.2\.1 is no address of this machine"):
        Door(at(opened.site, "192.0.2.1"), ("postgres",)).prepare()


def test_the_door_is_open_only_while_there_is_a_server_behind_which_can_so_start_anew(opened):
    """SeaweedFS does not start while anybody listens at its port, at whichever address."""
    servers, doors = opened.home / "servers", opened.home / "doors"
    site = at(Site.prepare(Settings(), servers), OTHER)
    door = Door(site, ("object-store",))
    start(servers, StorePart(site))
    start(doors, door)
    try:
        stop_parts(servers, signal.SIGKILL)
        eventually(lambda: is_closed(door), 10)
        start(servers, StorePart(site))
        eventually(lambda: not is_closed(door), 10)
    finally:
        stop_parts(doors)
        stop_parts(servers)
    assert is_closed(door)


def is_closed(door: Door) -> bool:
    try:
        door.check()
    except ExternalError as error:
        return "is closed" in str(error)
    return False


# What `khet doctor` has a pod ask: `python -m ml.reach`


def look(opened: Opened, **areas: object) -> dict[str, reach.Answer]:
    settings = Settings(object_store=opened.store, serving=ServingSettings(log_predictions=True))
    return reach.look(settings.model_copy(update=areas), None, opened.through("postgres"))


def test_what_is_reached_is_told_without_secrets(opened):
    found = look(opened)
    assert {name: answer["ok"] for name, answer in found.items()} == {
        "object store": True, "inference log": True, "database": True,
    }  # fmt: skip
    assert "PostgreSQL answers" in str(found["database"]["detail"])
    assert opened.store.secret_access_key.get_secret_value() not in json.dumps(found)


def test_keys_that_the_store_does_not_know_are_named_as_such(opened):
    wrong = opened.store.model_copy(update={"secret_access_key": SecretStr("guessed")})
    found = look(opened, object_store=wrong)["object store"]
    assert found["ok"] is False
    assert "object_store.secret_access_key does not belong to" in found["detail"]


def test_a_version_that_is_not_in_the_store_is_missed(opened):
    found = reach.look(Settings(object_store=opened.store), Version(9, 9, 9))["object store"]
    assert found["ok"] is False
    assert "v9.9.9 is not published" in found["detail"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (("no-such-host.invalid", 5432), "the name no-such-host.invalid is not known here"),
        (("127.0.0.1", 9), "127.0.0.1:9 refuses connections"),
    ],
)
def test_what_keeps_the_database_away_is_told_apart(opened, address, said):
    settings = Settings(serving=ServingSettings(log_predictions=False), object_store=opened.store)
    found = reach.look(settings, None, address)["database"]
    assert found["ok"] is False
    assert said in found["detail"]


def test_another_server_is_not_taken_for_a_database(opened):
    with socket.create_server(("127.0.0.1", 0)) as server:
        greeter = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 mail"), daemon=True)
        greeter.start()
        settings = Settings(serving=ServingSettings(log_predictions=False), object_store=opened.store)
        found = reach.look(settings, None, server.getsockname())["database"]
    assert found["ok"] is False
    assert "is no PostgreSQL: it answered b'2'" in found["detail"]


def test_as_a_program_it_prints_json_and_its_exit_code_says_whether_all_is_reached(
    opened, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("KHET_HOME", str(tmp_path))
    monkeypatch.setenv("KHET_OBJECT_STORE__ENDPOINT_URL", "http://127.0.0.1:9")
    assert reach.main(["--database", "127.0.0.1:9", "--result", str(tmp_path / "result")]) == ExternalError.exit_code
    printed = capsys.readouterr().out
    assert json.loads(printed)["database"]["ok"] is False
    assert json.loads((tmp_path / "result").read_text()) == json.loads(printed)
    monkeypatch.setenv("KHET_OBJECT_STORE__ENDPONT_URL", "x")
    assert reach.main([]) == ExternalError.exit_code
    assert "unknown key" in json.loads(capsys.readouterr().out)["settings"]["detail"]
