"""Children of a flow: followed while they run, understood when they fail, never left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.errors import ConfigError, ExternalError, GateError, KhetError, is_retryable
from tasks.training.child import run_child
from tests.support.local_stack import wait_until

SCRIPT = """
import json, os, sys
progress, code = sys.argv[1], int(sys.argv[2])
with open(progress, "a") as file:
    for step in range(3):
        file.write(json.dumps({"tick": step}) + "\\n")
    file.write('{"cut')
    file.write("\\n")
    file.write('{"tick": 3}\\n{"half')
print("what went wrong")
sys.exit(code)
"""


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that a child can run by name."""
    (folder / "khet_child_of_test.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "khet_child_of_test"


def test_its_warnings_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import logging; logging.basicConfig(format='%(levelname)s %(message)s'); logging.warning('the store is away')"
    )
    (tmp_path / "khet_child_of_test.py").write_text(f"print('INFO hello')\n{code}\nprint('no WARNING here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "log").write_text("WARNING of the run before\n")
    seen: list[dict[str, Any]] = []
    run_child(["khet_child_of_test"], tmp_path / "log", on_line=seen.append)
    assert seen == [{"warning": "the store is away"}]


def test_its_progress_is_followed_and_cut_lines_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, progress = write_module(tmp_path, monkeypatch), tmp_path / "progress.jsonl"
    seen: list[dict[str, Any]] = []
    run_child([module, str(progress), "0"], tmp_path / "log", progress=progress, on_line=seen.append)
    assert seen == [{"tick": 0}, {"tick": 1}, {"tick": 2}, {"tick": 3}]


@pytest.mark.parametrize(
    ("code", "kind", "again"),
    [(2, ConfigError, False), (3, GateError, False), (1, ExternalError, False), (5, ExternalError, True)],
)
def test_its_exit_code_names_the_error_and_its_log_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[KhetError], again: bool
) -> None:
    module = write_module(tmp_path, monkeypatch)
    with pytest.raises(kind, match="what went wrong") as caught:
        run_child([module, str(tmp_path / "p"), str(code)], tmp_path / "log", on_line=lambda _: None)
    assert is_retryable(caught.value) is again


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tasks.training.child import run_child\n"
        "run_child(['http.server', '0', '--bind', '127.0.0.1'], Path(sys.argv[1]), on_line=print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")])
    child = wait_until("the child runs", lambda: psutil.Process(parent.pid).children(), timeout_s=30)[0]
    wait_until("it serves", lambda: "Serving" in (tmp_path / "log").read_text(), timeout_s=30)
    parent.kill()
    parent.wait(10)
    wait_until("the child is gone", lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 10)


def test_it_is_ended_when_the_flow_is_cancelled(tmp_path: Path) -> None:
    def cancel(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    (tmp_path / "progress").write_text("")
    progress = tmp_path / "progress"
    script = tmp_path / "khet_slow_child.py"
    script.write_text(
        f"import time\nopen({str(progress)!r}, 'a').write('{{\"tick\": 1}}\\n')\n[time.sleep(1) for _ in range(99)]\n"
    )
    before = {p.pid for p in psutil.Process().children()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            run_child(["khet_slow_child"], tmp_path / "log", progress=progress, on_line=cancel)
    assert {p.pid for p in psutil.Process().children()} <= before
