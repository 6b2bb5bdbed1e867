"""Releases on a fresh stack, seen with tools that nobody here wrote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from configs.settings import load_settings
from ml.objects import ObjectStore
from ml.version import Version
from tests.support.local_stack import LocalStack, aws, wait_until
from tests.support.variants import publish_variant, rotate_answers

pytestmark = pytest.mark.timeout(600)


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", "-m", "20", *arguments], capture_output=True, text=True, check=True).stdout


def a_photo(stack: LocalStack) -> Path:
    return next((stack.home / "datasets" / "leaves").rglob("*.jpg"))


def test_two_releases_and_the_second_serves(stack: LocalStack, good: Path) -> None:
    first = stack.json("release", "--config", str(good))
    second = stack.json("release", "--config", str(good))
    assert (first["outcome"], second["outcome"]) == ("promoted", "promoted")
    version = second["version"]
    assert Version.parse(version) > Version.parse(first["version"])
    assert stack.traffic() == {version: 1.0}

    listed = aws(stack, "s3", "ls", f"s3://khet-guard-models/{version}/")
    names = {line.split()[-1] for line in listed}
    assert {"model.onnx", "manifest.json", "manifest.json.sig", "model_card.md", "metadata.json"} <= names
    alias = json.loads("\n".join(aws(stack, "s3", "cp", "s3://khet-guard-models/aliases/production.json", "-")))
    assert alias["to"] == version

    answer = json.loads(
        curl("-H", "Content-Type: image/jpeg", "--data-binary", f"@{a_photo(stack)}", f"{stack.gateway()}/predict")
    )
    assert answer["model_version"] == version
    assert json.loads(curl(f"{stack.gateway()}/version"))["version"] == version


def test_the_stages_are_recorded_and_the_report_stands_alone(served: LocalStack) -> None:
    record = [r for r in served.releases() if r["outcome"] == "promoted"][-1]
    assert [s["name"] for s in record["stages"]][:4] == ["check data", "train", "export", "evaluate"]
    assert record["intent"] is None
    listed = aws(served, "s3", "ls", f"s3://khet-guard-models/releases/{record['release_id']}/")
    assert {line.split()[-1] for line in listed} == {
        "journal.json",
        "report.html",
        "timeline.png",
        "evidence.png",
    }
    html = (served.home / "reports" / f"{record['release_id']}.html").read_text()
    assert record["version"] in html
    assert 'src="http' not in html


def test_prefect_knows_the_run_and_its_artifacts(served: LocalStack) -> None:
    record = [r for r in served.releases() if r["outcome"] == "promoted"][-1]
    api = served.settings()["orchestrator"]["api_url"]
    body = json.dumps({"artifacts": {"key": {"like_": record["release_id"]}}, "limit": 50})
    found = json.loads(curl("-H", "Content-Type: application/json", "-d", body, f"{api}/artifacts/filter"))
    keys = {artifact["key"] for artifact in found}
    assert {f"{kind}-{record['release_id']}" for kind in ("release", "stages", "report", "timeline")} <= keys
    assert {artifact["type"] for artifact in found} >= {"markdown", "table", "progress", "image"}


def test_a_dry_run_changes_nothing(served: LocalStack, good: Path) -> None:
    before = (served.json("versions"), served.traffic(), len(served.releases()))
    plan = served.json("release", "--config", str(good), "--dry-run")
    assert plan["outcome"] == "dry_run"
    assert f"+    version: {plan['version']}" in plan["diff"]
    assert (served.json("versions"), served.traffic(), len(served.releases())) == before


def test_a_bad_challenger_stops_at_the_gate(served: LocalStack, bad: Path) -> None:
    before = (served.json("versions"), served.traffic())
    done = served.khet("release", "--config", str(bad), code=3)
    assert "stopped at the gate" in done.stderr
    assert (served.json("versions"), served.traffic()) == before
    assert served.releases()[-1]["outcome"] == "gated"


LENIENT_GATE = {
    "KHET_GATE__MIN_ACCURACY": "0",
    "KHET_GATE__ACCURACY_MARGIN": "1",
    "KHET_GATE__SIGNIFICANCE": "0",
    "KHET_GATE__MISSED_DISEASE_MARGIN": "1",
    "KHET_GATE__MAX_ECE": "1",
}


@pytest.mark.parametrize(
    ("name", "faults", "shadow", "word"),
    [
        ("wrong-in-shadow", None, "80", "another answer than the champion"),
        ("wrong", None, "0", "labelled images"),
        ("slow", {"latency_ms": 300}, "0", "took over 250 ms"),
        ("failing", {"error_share": 0.1}, "80", "with an error"),
    ],
)
def test_a_bad_canary_is_rolled_back_for_its_own_reason(
    served: LocalStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    faults: dict[str, float] | None,
    shadow: str,
    word: str,
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    version = publish_variant(served, monkeypatch, folder, change=rotate_answers if faults is None else None)
    served.set_faults({version: faults} if faults else {})
    before = served.traffic()
    # A failing canary is seen the sooner the more it is asked; ten percent of forty may be luck.
    samples = {"KHET_CANARY__SHADOW_REQUESTS": shadow, "KHET_CANARY__MIN_SAMPLES": "60"}
    lenient = LocalStack(served.home, {**served.environment, **LENIENT_GATE, **samples}, served.faults)
    done = lenient.khet("release", "--version", version, "--data", "leaves", code=3)
    assert word in done.stderr.replace("\n", " ")
    assert "rolled back" in done.stderr
    assert served.traffic() == before
    record = served.releases()[-1]
    assert (record["outcome"], record["version"]) == ("rolled_back", version)
    assert "canary" not in served.cluster().versions


def test_rollback_returns_to_the_previous_version(served: LocalStack, good: Path) -> None:
    if sum(record["outcome"] == "promoted" for record in served.releases()) < 2:
        served.khet("release", "--config", str(good))
    now = served.production()
    plan = served.json("rollback", "--dry-run")
    assert plan["outcome"] == "dry_run"
    assert "version: v" in plan["diff"]
    assert served.production() == now
    done = served.json("rollback")
    assert done["version"] == plan["version"] != now
    assert served.traffic() == {done["version"]: 1.0}
    assert served.production() == done["version"]
    again = served.json("rollback", "--to", str(now))
    assert served.traffic() == {again["version"]: 1.0} == {str(now): 1.0}
    newest, before, *_ = served.json("rollback", "--history")["rows"]
    assert (newest["version"], newest["serves"], newest["verifies"]) == (now, True, True)
    assert before["version"] == done["version"]


def test_a_rollback_works_while_the_object_store_hangs(served: LocalStack) -> None:
    now = served.production()
    [store] = [part for part in served.json("status")["stack"]["parts"] if part["name"] == "object-store"]
    os.kill(store["pid"], signal.SIGSTOP)
    try:
        done = served.json("rollback")
    finally:
        with contextlib.suppress(ProcessLookupError):  # a supervisor may have had enough of it
            os.kill(store["pid"], signal.SIGCONT)
    assert "the registry did not answer" in done["reasons"][-1]
    assert served.traffic() == {done["version"]: 1.0}
    served.khet("up")
    assert "not finished: rollback to" in served.khet("doctor", code=5).stdout
    served.khet("doctor", "--fix")
    assert served.production() == done["version"] != now
    served.khet("rollback", "--to", str(now))


def test_a_version_that_never_served_is_no_rollback_target(served: LocalStack) -> None:
    done = served.khet("rollback", "--to", "v9.9.9", code=3)
    assert "never served production" in done.stderr


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_ask_waits_for_a_person(
    served: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    version = publish_variant(served, monkeypatch, tmp_path)
    before = served.production()
    known = {r["release_id"] for r in served.releases()}
    process = served.begin("release", "--version", version, "--data", "leaves", "--ask")

    def waiting() -> dict[str, Any] | None:
        assert process.poll() is None, "the release ended without asking"
        new = [r for r in served.releases() if r["release_id"] not in known]
        return new[0] if new and any("waiting up to" in event["text"] for event in new[0]["events"]) else None

    record = wait_until("the release waits", waiting, timeout_s=240, poll_s=1.0)
    wait_until("prefect shows the pause", lambda: _paused(served), timeout_s=30)
    assert set(served.traffic()) == {before}
    served.khet("approve", record["release_id"], "--comment", "seen", *(["--no"] if answer == "no" else []))
    assert process.wait(120) == (0 if answer == "yes" else 3)
    ended = served.releases()[-1]
    assert ended["outcome"] == ("promoted" if answer == "yes" else "declined")
    assert served.production() == (ended["version"] if answer == "yes" else before)


def _paused(stack: LocalStack) -> bool:
    api = stack.settings()["orchestrator"]["api_url"]
    body = json.dumps({"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}})
    return bool(json.loads(curl("-H", "Content-Type: application/json", "-d", body, f"{api}/flow_runs/filter")))


def test_a_tampered_model_is_refused_by_the_registry_and_never_served(
    served: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tampered"
    folder.mkdir()
    version = publish_variant(served, monkeypatch, folder)
    store = ObjectStore(load_settings().object_store)
    data = bytearray(store.get("khet-guard-models", f"{version}/model.onnx"))
    data[len(data) // 2] ^= 0xFF
    store.put("khet-guard-models", f"{version}/model.onnx", bytes(data))
    assert served.khet("verify", version, code=4)
    before = served.traffic()
    done = served.khet("release", "--version", version, "--data", "leaves", code=4)
    assert "does not match its manifest" in done.stderr.replace("\n", " ")
    assert served.traffic() == before


def test_the_worker_runs_a_release_from_the_ui(
    served: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish_variant(served, monkeypatch, tmp_path)
    served.khet("deploy")
    api = served.settings()["orchestrator"]["api_url"]
    deployment = json.loads(curl(f"{api}/deployments/name/release/release"))
    body = json.dumps({"parameters": {"version": version, "data": "leaves"}})
    run = json.loads(
        curl(
            "-H", "Content-Type: application/json", "-d", body, f"{api}/deployments/{deployment['id']}/create_flow_run"
        )
    )

    def ended() -> str | None:
        state = json.loads(curl(f"{api}/flow_runs/{run['id']}"))["state"]
        return state["type"] if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

    assert wait_until("the run ends", ended, timeout_s=300, poll_s=1.0) == "COMPLETED"
    assert (served.releases()[-1]["outcome"], served.production()) == ("promoted", version)
