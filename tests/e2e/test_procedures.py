"""The deployment procedures on a whole stack with the real service, under users' requests, by the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.local_stack import LocalStack, kill, wait_until
from tests.support.node import Traffic
from tests.support.variants import disturb_weights, publish_variant

pytestmark = pytest.mark.timeout(600)
LEASE_S = 8


@pytest.fixture
def twin(served: LocalStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A published version that is as good as the one that serves."""
    return publish_variant(served, monkeypatch, tmp_path, disturb_weights(7))


@pytest.fixture
def users(served: LocalStack) -> Iterator[Traffic]:
    """Photos at 30 requests/s; no user may see a failure."""
    photo = next((served.home / "datasets" / "leaves").rglob("*.jpg")).read_bytes()
    with Traffic(served.gateway(), rate_per_s=30, body=photo) as traffic:
        traffic.wait_for(10)
        yield traffic
        traffic.wait_for(20)
    assert traffic.failures == {}


def running(stack: LocalStack, stage: str) -> dict[str, Any]:
    """The record of the run that is in this stage now."""
    return dict(
        wait_until(
            f"a run is in {stage}", lambda: next((r for r in stack.releases() if r["stage"] == stage), None), 120
        )
    )


def test_green_takes_over_from_blue(served: LocalStack, twin: str, users: Traffic) -> None:
    champion = served.production()
    planned = json.loads(served.khet("blue-green", "--version", twin, "--dry-run", "--json").stdout)
    assert planned["outcome"] == "dry_run"
    assert f"version: {twin}" in planned["diff"]
    assert served.traffic() == {champion: 1.0}
    record = served.json("blue-green", "--version", twin, "--watch", "4")
    assert (record["kind"], record["outcome"], record["intent"]) == ("blue_green", "promoted", None)
    assert [stage["name"] for stage in record["stages"]][-5:] == [
        "deploy green", "smoke predictions", "verify green", "switch and watch", "settle",
    ]  # fmt: skip
    assert served.production() == twin
    assert served.traffic() == {twin: 1.0}
    assert set(served.cluster().versions) == {"stable"}
    assert httpx.get(f"{served.gateway()}/version", timeout=10).json()["version"] == twin
    assert users.versions[twin] > 0


@pytest.mark.slow
def test_while_green_is_watched_blue_is_one_command_away(served: LocalStack, twin: str, users: Traffic) -> None:
    champion = served.production()
    process = served.begin("blue-green", "--version", twin, "--watch", "300")
    running(served, "switch and watch")
    wait_until("green answers everybody", lambda: served.traffic() == {twin: 1.0}, 30)
    assert served.json("blue-green", "--back")["outcome"] == "rolled_back"
    assert served.traffic() == {champion: 1.0}
    assert served.production() == champion
    assert process.wait(60) != 0
    ended = served.releases()[-1]
    assert (ended["outcome"], ended["intent"]) == ("rolled_back", None)
    assert "returned all traffic to" in ended["reasons"][0]
    assert set(served.cluster().versions) == {"stable"}


def test_a_green_that_fails_meets_no_user(served: LocalStack, twin: str, users: Traffic) -> None:
    champion = served.production()
    served.set_faults({twin: {"error_share": 0.5}})
    try:
        done = served.khet("blue-green", "--version", twin, code=3)
    finally:
        served.set_faults({})
    assert "smoke prediction" in done.stderr or "rolled back" in done.stderr
    assert served.traffic() == {champion: 1.0}
    assert set(served.cluster().versions) == {"stable"}
    assert twin not in users.versions


@pytest.mark.slow
def test_a_killed_blue_green_leaves_everybody_on_blue_and_the_watchdog_tidies_up(
    served: LocalStack, twin: str, users: Traffic
) -> None:
    champion = served.production()
    process = served.begin("blue-green", "--version", twin, "--watch", "300")
    running(served, "switch and watch")
    wait_until("green answers everybody", lambda: served.traffic() == {twin: 1.0}, 30)
    kill(process)
    wait_until("blue answers everybody", lambda: served.traffic() == {champion: 1.0}, LEASE_S + 10)
    assert "its canary" in served.khet("watchdog").stdout
    assert set(served.cluster().versions) == {"stable"}
    assert served.releases()[-1]["outcome"] == "failed"
    assert served.khet("watchdog").stdout.strip().endswith("all is well")


@pytest.mark.slow
def test_an_ab_test_reports_what_differs_and_promotes_nothing(served: LocalStack, twin: str, users: Traffic) -> None:
    champion = served.production()
    process = served.begin("ab-test", "--version", twin, "--share", "0.3", "--duration", "6")
    running(served, "split users")
    wait_until("users are split", lambda: served.traffic().get(twin) == 0.3, 30)
    met = {name: [answered_by(served, name, users.body) for _ in range(4)] for name in map(str, range(12))}
    assert {len(set(versions)) for versions in met.values()} == {1}
    assert process.wait(120) == 0
    record = served.releases()[-1]
    assert (record["kind"], record["outcome"]) == ("ab_test", "done")
    assert "no difference between the versions was shown" in record["reasons"][-1]
    assert served.production() == champion
    assert served.traffic() == {champion: 1.0}
    assert set(served.cluster().versions) == {"stable"}


def answered_by(stack: LocalStack, user: str, photo: bytes) -> str:
    """The version that a named user meets."""
    headers = {"X-Khet-User": user}
    answer = httpx.post(f"{stack.gateway()}/predict", content=photo, headers=headers, timeout=10)
    return str(answer.raise_for_status().json()["model_version"])
