"""When the flow is killed in any stage: nobody stays on an unjudged canary, and the release goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.local_stack import LocalStack, kill, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LEASE_S = 8
# What is killed here need not be good, only quick: nothing but failures and slowness may stop it.
QUICK = "dataset: leaves\nbudget: {epochs: 2}\npx: 32\nbatch_size: 64\noptimizer: {lr: 0.004}\n"
LENIENT = {
    "KHET_GATE__MIN_ACCURACY": "0",
    "KHET_GATE__ACCURACY_MARGIN": "1",
    "KHET_GATE__SIGNIFICANCE": "0",
    "KHET_GATE__MISSED_DISEASE_MARGIN": "1",
    "KHET_GATE__MAX_ECE": "1",
    "KHET_JUDGE__DISAGREEMENT__MARGIN": "1",
    "KHET_JUDGE__CLASS_DISAGREEMENT__MARGIN": "1",
    "KHET_JUDGE__CLASS_MIX__MARGIN": "1",
    "KHET_JUDGE__ACCURACY__MARGIN": "1",
}

STAGES = ["check data", "train", "export", "evaluate", "gate", "publish", "deploy canary", "canary shadow",
          "canary 5%", "canary 25%", "canary 50%", "promote"]  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that lasts seconds."""
    file = tmp_path_factory.mktemp("quick") / "quick.yaml"
    file.write_text(QUICK)
    return file


@pytest.fixture(scope="module")
def hasty(served: LocalStack) -> Iterator[LocalStack]:
    """The same stack, with releases that hardly judge; the good version serves again at the end."""
    good = served.production()
    yield LocalStack(served.home, {**served.environment, **LENIENT}, served.faults)
    served.khet("rolling-update", "--version", str(good))


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


def test_a_release_killed_in_every_stage_goes_on_each_time_and_nobody_meets_an_unjudged_model(
    hasty: LocalStack, quick: Path
) -> None:
    champion, versions = hasty.production(), hasty.versions()
    known = {r["release_id"] for r in hasty.releases()}
    process = hasty.begin("release", "--config", str(quick))
    for stage in STAGES:
        record = wait_until(f"the release is in {stage}", in_stage(hasty, stage, known), timeout_s=240, poll_s=0.1)
        kill(process)
        killed_at = time.monotonic()
        wait_until("all traffic is on the champion", lambda: is_safe(hasty, champion), LEASE_S + 10, poll_s=0.5)
        assert time.monotonic() - killed_at < LEASE_S + 10
        assert last(hasty)["release_id"] == record["release_id"]
        if last(hasty)["outcome"] != "promoted":
            assert hasty.production() == champion or promoting(hasty)
            process = hasty.begin("release", "--resume", record["release_id"])
    process.wait(240)

    ended = last(hasty)
    assert (ended["outcome"], ended["release_id"]) == ("promoted", record["release_id"]), ended["reasons"]
    assert hasty.production() == ended["version"]
    assert hasty.traffic() == {ended["version"]: 1.0}
    assert hasty.versions() - versions == {ended["version"]}, "one release, one version"
    assert "cached" in {s["state"] for s in ended["stages"]}


def promoting(stack: LocalStack) -> bool:
    """Whether the release was judged, so that whoever comes next finishes its promotion."""
    begun = last(stack)["intent"]
    return begun is not None and begun["action"] == "promote"


def is_safe(stack: LocalStack, champion: str | None) -> bool:
    return promoting(stack) or last(stack)["outcome"] == "promoted" or set(stack.traffic()) == {champion}


@pytest.mark.parametrize("stage", ["canary 5%", "promote"])
def test_doctor_finishes_or_undoes_what_was_left(hasty: LocalStack, quick: Path, stage: str) -> None:
    champion = hasty.production()
    known = {r["release_id"] for r in hasty.releases()}
    process = hasty.begin("release", "--config", str(quick))
    record = wait_until(f"the release is in {stage}", in_stage(hasty, stage, known), timeout_s=240, poll_s=0.2)
    kill(process)
    assert record["release_id"] in hasty.khet("doctor", code=5).stdout
    hasty.khet("doctor", "--fix")
    ended = last(hasty)
    assert ended["intent"] is None
    assert ended["outcome"] == ("promoted" if stage == "promote" else "failed")
    expected = ended["version"] if stage == "promote" else champion
    assert hasty.production() == expected
    assert hasty.traffic() == {expected: 1.0}
    assert "canary" not in hasty.cluster().versions


def test_a_second_release_is_refused_while_one_runs(hasty: LocalStack, quick: Path) -> None:
    known = {r["release_id"] for r in hasty.releases()}
    process = hasty.begin("release", "--config", str(quick))
    wait_until("the release trains", in_stage(hasty, "train", known), timeout_s=120, poll_s=0.2)
    done = hasty.khet("release", "--config", str(quick), code=6)
    assert "is held by" in done.stderr
    assert process.wait(300) == 0
