"""`khet canary plan`: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from configs.errors import ConfigError
from flows.cli import app


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KHET_HOME", str(tmp_path))
    monkeypatch.delenv("KHET_PROFILE", raising=False)
    return tmp_path


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["canary", "plan", *arguments])


def refused(*arguments: str) -> str:
    error = plan(*arguments).exception
    assert isinstance(error, ConfigError)
    return str(error)


def test_a_plan_that_decides_exits_0_and_recommends_what_sees_more() -> None:
    done = plan("--rate", "80")
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    assert "too few requests a step to be sure" in text
    assert "canary.steps: [0.05, 0.25, 0.5], canary.min_samples:" in text


def test_a_plan_that_cannot_decide_exits_3_and_says_what_would_help() -> None:
    done = plan("--rate", "0.5", "--labelled-rate", "0", "--steps", "0.05,0.5", "--deadline", "60", "--json")
    assert done.exit_code == 3
    found = json.loads(done.output)
    assert found["decides"] is False
    assert [stage["weight"] for stage in found["stages"]] == [0.0, 0.05, 0.5]
    assert found["recommended"] is None
    assert any("requests/s would bring them in time" in sentence for sentence in found["would_help"])


def test_the_stated_harm_and_the_usual_rates_are_taken_from_the_command_line() -> None:
    done = plan("--rate", "80", "--error-rate", "0.01", "--harm", "errors=0.2", "--usual", "ood=0.03", "--json")
    gates = {gate["name"]: gate for gate in json.loads(done.output)["gates"]}
    assert (gates["errors"]["usual"], gates["errors"]["harm"]) == (0.01, 0.2)
    assert gates["ood"]["usual"] == 0.03


def test_the_stated_harm_may_be_a_setting(own_home: Path) -> None:
    (own_home / "settings.yaml").write_text("harms: {errors: {usual: 0.001, harm: 0.3}}\n")
    gates = {gate["name"]: gate for gate in json.loads(plan("--rate", "80", "--json").output)["gates"]}
    assert gates["errors"]["harm"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Next: give --rate"),
        (("--labelled-rate", "3"), "give both"),
        (("--rate", "5", "--labelled-rate", "6"), "the second is part of the first"),
        (("--rate", "5", "--harm", "errors"), "expected NAME=RATE"),
        (("--rate", "5", "--harm", "eroors=1"), "no such harm. Known: errors, slow"),
        (("--rate", "5", "--harm", "errors=2"), "errors.harm: Input should be less than or equal to 1"),
        (("--rate", "5", "--steps", "0.5,0.1"), "steps must be ascending"),
    ],
    ids=["no traffic known", "labelled alone", "too many labelled", "no rate", "misspelt", "no share", "descending"],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*arguments)


def test_a_cluster_that_does_not_answer_exits_5(own_home: Path) -> None:
    (own_home / "settings.yaml").write_text("cluster: {node_url: 'http://127.0.0.1:9', node_token: x}\n")
    error = plan().exception
    assert getattr(error, "exit_code", None) == 5
