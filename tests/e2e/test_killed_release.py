"""When the flow is killed in any stage: nobody stays on an unjudged canary, and the release goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.local_stack import LocalStack, kill, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LEASE_S = 8

STAGES = ["check data", "train", "export", "evaluate", "gate", "publish", "deploy canary", "canary shadow",
          "canary 5%", "canary 25%", "canary 50%", "promote"]  # fmt: skip


def last(stack: LocalStack) -> dict[str, Any]:
    return stack.releases()[-1]


def in_stage(stack: LocalStack, stage: str, known: set[str]) -> Callable[[], dict[str, Any] | None]:
    """The new release's record, once it is in `stage` (or past it: some stages are short)."""

    def look() -> dict[str, Any] | None:
        new = [r for r in stack.releases() if r["release_id"] not in known]
        if not new:
            return None
        seen = [s["name"] for s in new[0]["stages"]]
        return new[0] if new[0]["stage"] == stage or stage in seen else None

    return look


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_release_leaves_no_unjudged_traffic_and_resumes(
    served: LocalStack, good: Path, stage: str, tmp_path: Path
) -> None:
    champion = served.production()
    known = {r["release_id"] for r in served.releases()}
    versions = {v["version"] for v in served.json("versions")}
    process = served.begin("release", "--config", str(good))
    record = wait_until(f"the release is in {stage}", in_stage(served, stage, known), timeout_s=240, poll_s=0.2)
    kill(process)
    killed_at = time.monotonic()

    def safe() -> bool:
        begun = served.releases()[-1]["intent"]
        promoting = begun is not None and begun["action"] == "promote"
        return promoting or set(served.traffic()) == {champion}

    wait_until("all traffic is on the champion", safe, timeout_s=LEASE_S + 10, poll_s=0.5)
    assert time.monotonic() - killed_at < LEASE_S + 10
    assert served.production() == champion or last(served)["outcome"] == "promoted"

    resumed = (
        served.json("release", "--resume", record["release_id"]) if last(served)["outcome"] != "promoted" else None
    )
    ended = last(served)
    assert resumed is None or resumed["outcome"] == "promoted"
    assert ended["release_id"] == record["release_id"]
    assert served.production() == ended["version"]
    assert served.traffic() == {ended["version"]: 1.0}
    new = {v["version"] for v in served.json("versions")} - versions
    assert new == {ended["version"]}, "one release, one version"
    if stage in ("export", "evaluate", "publish", "canary 25%"):
        assert "cached" in {s["state"] for s in ended["stages"]}


@pytest.mark.parametrize("stage", ["canary 5%", "promote"])
def test_doctor_finishes_or_undoes_what_was_left(served: LocalStack, good: Path, stage: str) -> None:
    champion = served.production()
    known = {r["release_id"] for r in served.releases()}
    process = served.begin("release", "--config", str(good))
    record = wait_until(f"the release is in {stage}", in_stage(served, stage, known), timeout_s=240, poll_s=0.2)
    kill(process)
    assert record["release_id"] in served.khet("doctor", code=5).stdout
    served.khet("doctor", "--fix")
    ended = last(served)
    assert ended["intent"] is None
    assert ended["outcome"] == ("promoted" if stage == "promote" else "failed")
    expected = ended["version"] if stage == "promote" else champion
    assert served.production() == expected
    assert served.traffic() == {expected: 1.0}
    assert "canary" not in served.json("status")["cluster"]["versions"]


def test_a_second_release_is_refused_while_one_runs(served: LocalStack, good: Path) -> None:
    known = {r["release_id"] for r in served.releases()}
    process = served.begin("release", "--config", str(good))
    wait_until("the release trains", in_stage(served, "train", known), timeout_s=120, poll_s=0.2)
    done = served.khet("release", "--config", str(good), code=6)
    assert "is held by" in done.stderr
    assert process.wait(300) == 0
