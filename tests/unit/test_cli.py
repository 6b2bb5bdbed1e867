"""The terminal: every command is documented, quick to help, and exits with codes that mean something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flows.cli import app

HEAVY = ("torch", "prefect", "pytorch_lightning", "onnxruntime", "boto3", "matplotlib", "fastapi", "aiohttp", "numpy")


def commands() -> list[tuple[str, str]]:
    """Every command's words and docstring."""
    found = []
    for group, prefix in ((app, ""), *((g.typer_instance, f"{g.name} ") for g in app.registered_groups)):
        assert isinstance(group, typer.Typer)
        for info in group.registered_commands:
            assert info.callback is not None
            name = info.name or info.callback.__name__
            found.append((f"{prefix}{name}", info.callback.__doc__ or ""))
    return found


@pytest.mark.parametrize(("name", "doc"), commands(), ids=[name for name, _ in commands()])
def test_every_command_has_help_with_an_example(name: str, doc: str) -> None:
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: khet {name}" in doc
    assert f"khet {name}" in " ".join(result.output.split())


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, flows.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def khet(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KHET_HOME": str(home)}
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def test_a_wrong_setting_exits_2_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("canery: {}\n")
    done = khet("versions", "--json", home=tmp_path)
    assert done.returncode == 2
    assert "settings.yaml: canery: unknown key" in done.stderr.replace("\n", "")
    assert json.loads(done.stdout)["error"] == "ConfigError"


def test_an_unknown_option_exits_2(tmp_path: Path) -> None:
    done = khet("release", "--no-such-thing", home=tmp_path)
    assert done.returncode == 2
    assert "No such option" in done.stderr


def test_predict_without_a_service_says_what_to_do(tmp_path: Path) -> None:
    photo = tmp_path / "leaf.jpg"
    photo.write_bytes(b"x")
    done = khet("predict", str(photo), home=tmp_path)
    assert done.returncode == 2
    assert "khet up" in done.stderr


def test_an_unreachable_service_exits_5(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("cluster: {gateway_url: 'http://127.0.0.1:9'}\n")
    photo = tmp_path / "leaf.jpg"
    photo.write_bytes(b"x")
    done = khet("predict", str(photo), home=tmp_path)
    assert done.returncode == 5
    assert "does not answer" in done.stderr
