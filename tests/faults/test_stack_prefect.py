"""The orchestrator of the local stack, with a password: it schedules, runs, pauses and survives what is done to it.

This is also the smoke test of the pinned versions: newer ones start a server whose scheduler fails on every pass, which
only its log tells.
"""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.settings import load_settings
from deployments.local import Phase, StackState, doctor, status, up
from deployments.local.files import Layout
from deployments.local.prefect_api import PrefectApi, ensure_automations
from deployments.local.process import marked
from tests.support.stack import stack_home

FLOWS = """
import os, time
from prefect import flow, pause_flow_run, task
from pydantic import BaseModel

class Answer(BaseModel):
    yes: bool = False

@task
def one():
    import configs.settings, ml.version
    return str(configs.settings.home())

@flow(name="quick", log_prints=True)
def quick():
    print("home", one())

@flow(name="ask")
def ask():
    assert pause_flow_run(wait_for_input=Answer, timeout=120, key="question").yes

@flow(name="sleepy")
def sleepy():
    for _ in range(600):
        time.sleep(1)
"""


@dataclass
class Stack:
    """A running stack and what the tests do with its Prefect API."""

    root: Path
    api: PrefectApi
    deployments: dict[str, str]

    def run(self, name: str) -> str:
        return str(self.api.call("POST", f"/deployments/{self.deployments[name]}/create_flow_run", {})["id"])

    def state(self, run: str) -> str:
        return str(self.api.call("GET", f"/flow_runs/{run}")["state"]["type"])

    def until_state(self, run: str, *wanted: str, timeout_s: float = 90) -> None:
        until(lambda: self.state(run) in wanted, timeout_s, lambda: f"{run} is {self.state(run)}, not {wanted}")


def until(condition: Callable[[], object], timeout_s: float = 90, why: Callable[[], object] = status) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """The whole stack, its API behind a password, with three flows deployed; one of them every minute."""
    with (
        stack_home(tmp_path_factory.mktemp("stack") / "home", prefect=True) as root,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("KHET_STACK__PREFECT_AUTH", "true")
        up(load_settings())
        settings = load_settings().orchestrator
        api = PrefectApi(settings.api_url, settings.auth_string.get_secret_value())
        source = tmp_path_factory.mktemp("flows")
        (source / "smoke.py").write_text(FLOWS)
        names = ("quick", "ask", "sleepy")
        yield Stack(root, api, {name: _deploy(api, source, name, settings.work_pool) for name in names})


def _deploy(api: PrefectApi, source: Path, name: str, pool: str) -> str:
    flow = api.call("POST", "/flows/", {"name": name})
    deployment: dict[str, Any] = {
        "name": name,
        "flow_id": flow["id"],
        "entrypoint": f"smoke.py:{name}",
        "work_pool_name": pool,
        "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(source)}}],
        "enforce_parameter_schema": False,
    }
    if name == "quick":
        cron = {"cron": "0 3 * * *", "timezone": "Asia/Kolkata"}
        deployment["schedules"] = [{"schedule": cron, "active": True}]
    return str(api.call("POST", "/deployments/", deployment)["id"])


def test_every_question_of_the_doctor_is_answered(stack):
    assert [(c.name, c.detail) for c in doctor() if not c.ok] == []


def test_a_cron_deployment_gets_scheduled_runs(stack):
    query = {
        "deployments": {"id": {"any_": [stack.deployments["quick"]]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    until(lambda: stack.api.call("POST", "/flow_runs/count", query) >= 3)


def test_the_worker_runs_a_deployment_that_imports_this_project(stack):
    run = stack.run("quick")
    stack.until_state(run, "COMPLETED")
    query = {"logs": {"flow_run_id": {"any_": [run]}}}
    messages = lambda: [entry["message"] for entry in stack.api.call("POST", "/logs/filter", query)]  # noqa: E731
    until(lambda: f"home {stack.root}" in messages(), why=messages)


def test_a_person_answers_a_paused_run(stack):
    run = stack.run("ask")
    stack.until_state(run, "PAUSED")
    refused = stack.api.call("POST", f"/flow_runs/{run}/resume", {"run_input": {"yes": "perhaps"}})
    assert refused["status"] == "REJECT"
    assert stack.api.call("POST", f"/flow_runs/{run}/resume", {"run_input": {"yes": True}})["status"] == "ACCEPT"
    stack.until_state(run, "COMPLETED")


def test_nothing_is_answered_without_the_password(stack):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{stack.api.url}/flows/count", data=b"{}")  # noqa: S310
    assert refusal.value.code == 401


def test_the_ui_is_served_and_calls_this_server(stack):
    base = stack.api.url.removesuffix("/api")
    page = httpx.get(f"{base}/runs/flow-run/x", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert "<html" in page.text
    assert httpx.get(f"{base}/ui-settings").json()["api_url"] == stack.api.url


def test_the_automations_exist_once_and_follow_the_settings(stack):
    ensure_automations(stack.api, 30)
    ensure_automations(stack.api, 60)
    found = {a["name"]: a["trigger"]["within"] for a in stack.api.call("POST", "/automations/filter", {})}
    assert found == {"khet: crash zombie runs": 180.0, "khet: crash runs that stay pending": 600.0}
    assert stack.api.call("POST", "/automations/count", {}) == 2
    ensure_automations(stack.api, 30)


def test_the_files_of_prefect_are_below_the_home_folder(stack):
    written = {line.split("=", 1)[1] for who in marked(stack.root, "prefect-server") for line in _environment(who.pid)}
    assert written
    assert all(value.startswith(str(stack.root)) for value in written)


def test_the_server_wrote_no_error(stack):
    """Last of those that only use it: what the faults below leave in the log is theirs."""
    log = Layout(stack.root).log("prefect-server").read_text(errors="replace")
    errors = [line for line in log.splitlines() if "ERROR" in line or "CRITICAL" in line]
    # Other Prefect collections that happen to be installed beside this project are none of its parts.
    assert [line for line in errors if "Failed to register block schema for block class" not in line] == []


@pytest.mark.parametrize("name", ["prefect-worker", "postgres", pytest.param("prefect-server", marks=pytest.mark.slow)])
def test_after_a_kill_the_stack_runs_deployments_again(stack, name):
    before = _part(name).restarts
    os.kill(_part(name).pid, signal.SIGKILL)
    until(lambda: _part(name).restarts > before and status().healthy, timeout_s=150)
    until(lambda: not [c for c in doctor() if not c.ok], why=lambda: [c for c in doctor() if not c.ok])
    stack.until_state(stack.run("quick"), "COMPLETED", timeout_s=120)


def test_a_server_restart_does_not_crash_a_running_flow(stack):
    run = stack.run("ask")
    stack.until_state(run, "PAUSED")
    before = _part("prefect-server").restarts
    os.kill(_part("prefect-server").pid, signal.SIGKILL)
    until(lambda: _part("prefect-server").restarts > before and status().healthy, timeout_s=150)
    # PAUSED comes before the question itself is stored; a server killed between the two gets it when it is back.
    answer = {"run_input": {"yes": True}}
    until(lambda: stack.api.call("POST", f"/flow_runs/{run}/resume", answer)["status"] == "ACCEPT", timeout_s=60)
    stack.until_state(run, "COMPLETED")


@pytest.mark.slow
def test_a_run_whose_process_and_worker_died_is_crashed(stack):
    run = stack.run("sleepy")
    stack.until_state(run, "RUNNING")
    for who in marked(stack.root, "prefect-worker"):
        who.signal(signal.SIGKILL)
    stack.until_state(run, "CRASHED", timeout_s=240)


def test_the_next_start_finds_the_records_of_the_last(stack):
    runs = stack.api.call("POST", "/flow_runs/count", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
    from deployments.local import down

    started = time.monotonic()
    down()
    assert time.monotonic() - started < 10
    assert marked(stack.root) == []
    assert status() == StackState(home=str(stack.root))
    assert up(load_settings()).healthy
    query = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    assert stack.api.call("POST", "/flow_runs/count", query) == runs


def _part(name: str) -> Any:
    part = status().part(name)
    assert part is not None
    until(lambda: status().part(name).state is Phase.running)
    return status().part(name)


def _environment(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return [v for v in text if v.split("=")[0] in ("HOME", "TMPDIR", "PREFECT_HOME", "PREFECT_UI_STATIC_DIRECTORY")]
