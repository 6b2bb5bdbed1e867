"""The audit log against a real PostgreSQL: append-only, exactly once, and patient when the database is away."""

from __future__ import annotations

import json
import logging
import signal
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from configs.areas import DatabaseSettings
from configs.errors import ExternalError
from tasks.audit import AuditLog, Outcome, ensure_schema
from tests.support.processes import run_python
from tests.support.stack import postgres, start_postgres, stop_parts


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pg")


@pytest.fixture(scope="module")
def database(home: Path) -> Iterator[DatabaseSettings]:
    with postgres(home) as found:
        ensure_schema(dsn_of(found))
        yield found


@pytest.fixture
def run_id() -> str:
    return f"release-{uuid.uuid4().hex[:8]}"


def dsn_of(database: DatabaseSettings) -> str:
    assert database.dsn is not None
    return database.dsn.get_secret_value()


def unreachable(database: DatabaseSettings) -> DatabaseSettings:
    """The same database on a port where nobody listens."""
    info = psycopg.conninfo.conninfo_to_dict(dsn_of(database))
    dsn = psycopg.conninfo.make_conninfo("", **(info | {"port": 1}))
    return database.model_copy(update={"dsn": SecretStr(dsn)})


def add(log: AuditLog, run_id: str, action: str, outcome: Outcome = "done") -> None:
    log.record("asha@laptop", action, "v1.0.0", {"weights": {"canary": 0.05}}, outcome, "a detail", run_id)


def stored(database: DatabaseSettings, run_id: str) -> list[str]:
    with psycopg.connect(dsn_of(database)) as connection:
        rows = connection.execute("SELECT action FROM audit_log WHERE run_id = %s ORDER BY stored_at", [run_id])
        return [str(action) for (action,) in rows]


def test_a_record_is_in_the_table_when_the_call_returns(
    database: DatabaseSettings, run_id: str, tmp_path: Path
) -> None:
    log = AuditLog(database, tmp_path / "audit" / "spool.jsonl")
    entry = log.record("asha@laptop", "promote", "v1.0.0", {"from": None, "steps": [1, 2.5]}, "intended", run_id=run_id)
    with psycopg.connect(dsn_of(database)) as connection:
        row = connection.execute(
            "SELECT id, at, actor, action, subject, plan, outcome, detail, jsonb_typeof(plan -> 'steps') "
            "FROM audit_log WHERE run_id = %s",
            [run_id],
        ).fetchone()
    assert row == (
        entry.id,
        entry.at,
        "asha@laptop",
        "promote",
        "v1.0.0",
        {"from": None, "steps": [1, 2.5]},
        "intended",
        "",
        "array",
    )
    assert not (tmp_path / "audit" / "spool.jsonl").exists()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE audit_log SET actor = 'nobody'", "DELETE FROM audit_log", "TRUNCATE audit_log"],
    ids=["update", "delete", "truncate"],
)
def test_what_is_recorded_cannot_be_changed(
    database: DatabaseSettings, run_id: str, tmp_path: Path, statement: str
) -> None:
    add(AuditLog(database, tmp_path / "spool.jsonl"), run_id, "promote")
    with (
        psycopg.connect(dsn_of(database)) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="audit_log is append-only"),
    ):
        connection.execute(statement)
    assert stored(database, run_id) == ["promote"]


def test_records_wait_in_a_private_file_while_the_database_is_away(
    database: DatabaseSettings, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "audit" / "spool.jsonl"
    away = AuditLog(unreachable(database), spool)
    for action in ("plan", "deploy", "promote"):
        add(away, run_id, action)
    assert stat.S_IMODE(spool.stat().st_mode) == 0o600
    assert [json.loads(line)["action"] for line in spool.read_text().splitlines()] == ["plan", "deploy", "promote"]
    assert away.flush() == 3
    assert [entry.action for entry in away.tail(2)] == ["deploy", "promote"]
    assert "wait in" in caplog.text
    back = AuditLog(database, spool)
    add(back, run_id, "verify")
    assert stored(database, run_id) == ["plan", "deploy", "promote", "verify"]
    assert not spool.exists()


def test_no_database_at_all_is_fine(run_id: str, tmp_path: Path) -> None:
    log = AuditLog(DatabaseSettings(), tmp_path / "spool.jsonl")
    add(log, run_id, "promote")
    assert [entry.run_id for entry in log.tail(5)] == [run_id]
    assert log.flush() == 1
    assert log.tail(0) == []


def test_a_delivery_that_was_killed_before_it_tidied_is_not_doubled(
    database: DatabaseSettings, run_id: str, tmp_path: Path
) -> None:
    spool = tmp_path / "spool.jsonl"
    add(AuditLog(DatabaseSettings(), spool), run_id, "promote")
    lines = spool.read_bytes()
    assert AuditLog(database, spool).flush() == 0
    spool.write_bytes(lines)
    assert AuditLog(database, spool).flush() == 0
    assert stored(database, run_id) == ["promote"]


def test_a_line_cut_by_a_kill_is_set_aside_and_stops_nothing(
    database: DatabaseSettings, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = tmp_path / "spool.jsonl"
    add(AuditLog(DatabaseSettings(), spool), run_id, "plan")
    with spool.open("ab") as file:
        file.write(b'{"id": "cut')
    log = AuditLog(database, spool)
    add(log, run_id, "promote")
    assert stored(database, run_id) == ["plan", "promote"]
    assert (tmp_path / "rejected.jsonl").read_bytes() == b'{"id": "cut\n'
    assert "is not an audit record" in caplog.text


def test_threads_and_processes_share_a_spool(database: DatabaseSettings, run_id: str, tmp_path: Path) -> None:
    spool = tmp_path / "spool.jsonl"
    code = f"""
from pathlib import Path
from configs.areas import DatabaseSettings
from tasks.audit import AuditLog
for n in range(20):
    AuditLog(DatabaseSettings(), Path({str(spool)!r})).record("p", "step", "x", {{}}, "done", run_id={run_id!r})
"""
    run_python([code] * 2)
    log = AuditLog(database, spool)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: add(log, run_id, "step"), range(16)))
    assert len(stored(database, run_id)) == 56


def test_secrets_reach_neither_spool_nor_table(database: DatabaseSettings, run_id: str, tmp_path: Path) -> None:
    plan = {
        "dsn": "postgresql://u:hunter2@h/d",
        "nested": [{"api_key": "hunter2", "password": "hunter2", "author": "asha"}],
        "secret": SecretStr("hunter2"),
        "database": database.model_copy(update={"dsn": SecretStr("hunter2")}),
        "address": "see postgresql://u:hunter2@host/db",
        "max_tokens": None,
    }
    spool = tmp_path / "spool.jsonl"
    entry = AuditLog(DatabaseSettings(), spool).record(
        "asha", "x", "y", plan, "failed", "could not reach http://u:hunter2@h:80/x password=hunter2", run_id
    )
    assert "hunter2" not in spool.read_text()
    assert "hunter2" not in repr(entry)
    assert entry.plan["nested"][0]["author"] == "asha"
    assert "see postgresql://u:" in entry.plan["address"]
    AuditLog(database, spool).flush()
    with psycopg.connect(dsn_of(database)) as connection:
        row = connection.execute("SELECT audit_log::text FROM audit_log WHERE run_id = %s", [run_id]).fetchone()
    assert row is not None
    assert "hunter2" not in row[0]


def test_odd_characters_and_numbers_do_not_block_the_spool(
    database: DatabaseSettings, run_id: str, tmp_path: Path
) -> None:
    log = AuditLog(database, tmp_path / "spool.jsonl")
    plan = {"nan": float("nan"), "inf": float("inf"), "nul\x00key": "a\x00b", "half": "\ud800", "path": tmp_path}
    log.record("ä\x00", "löschen", "\ud800", plan, "done", "x\x00", run_id)
    assert log.flush() == 0
    assert stored(database, run_id) == ["löschen"]


def test_a_database_without_the_table_keeps_the_records_waiting(
    database: DatabaseSettings, run_id: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = psycopg.conninfo.conninfo_to_dict(dsn_of(database))
    nowhere = psycopg.conninfo.make_conninfo("", **(info | {"options": "-c search_path=pg_catalog"}))
    log = AuditLog(DatabaseSettings(dsn=SecretStr(nowhere)), tmp_path / "spool.jsonl")
    add(log, run_id, "promote")
    assert log.flush() == 1
    wrong = AuditLog(DatabaseSettings(dsn=SecretStr("not a dsn")), tmp_path / "other.jsonl")
    add(wrong, run_id, "promote")
    assert wrong.flush() == 1
    assert "audit records wait" in caplog.text


def test_an_action_that_cannot_be_recorded_is_stopped(run_id: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = AuditLog(DatabaseSettings(), tmp_path / "file" / "spool.jsonl")
    with pytest.raises(ExternalError, match="was not recorded, so it is not done"):
        add(log, run_id, "promote")


def test_making_the_schema_again_keeps_the_rows(database: DatabaseSettings, run_id: str, tmp_path: Path) -> None:
    add(AuditLog(database, tmp_path / "spool.jsonl"), run_id, "promote")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ensure_schema(dsn_of(database)), range(4)))
    assert stored(database, run_id) == ["promote"]


def test_no_password_is_in_the_message_of_a_failed_connection(
    database: DatabaseSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="tasks")
    info = psycopg.conninfo.conninfo_to_dict(dsn_of(database))
    dsn = psycopg.conninfo.make_conninfo("", **(info | {"password": "hunter2"}))
    with pytest.raises(ExternalError) as caught:
        ensure_schema(dsn)
    assert "hunter2" not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_a_database_that_dies_and_returns_gets_everything_in_order(run_id: str, tmp_path: Path) -> None:
    home, spool = tmp_path / "pg", tmp_path / "spool.jsonl"
    database = start_postgres(home)
    ensure_schema(dsn_of(database))
    log = AuditLog(database, spool)
    add(log, run_id, "plan")
    stop_parts(home, signal.SIGKILL)
    add(log, run_id, "deploy")
    add(log, run_id, "promote")
    assert log.flush() == 2
    start_postgres(home)
    assert log.flush() == 0
    add(log, run_id, "verify")
    assert stored(database, run_id) == ["plan", "deploy", "promote", "verify"]
    assert [entry.action for entry in log.tail(3)] == ["deploy", "promote", "verify"]
    stop_parts(home)
