"""kill -9 of the flow at random moments: after its lease and one look of the watchdog, all is as if a person had tidied
up. The cluster itself does not return the traffic, so this is what guards users there."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes.client import LEASE
from tasks.registry import Registry
from tests.e2e.test_killed_release import LENIENT, QUICK
from tests.support.cluster_stack import ClusterStack
from tests.support.local_stack import kill, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SEED = 20
IMPORTS_S = 3.0  # before this a command has asked nobody for anything
# How many of each are killed, and about how long one takes that nobody kills, seconds.
KILLS = {"release": 5, "release of a version": 5, "rollback": 5, "rolling update": 5}
SPANS_S = {"release": 35.0, "release of a version": 25.0, "rollback": 15.0, "rolling update": 15.0}
LEASE_S = 8.0


@pytest.fixture(scope="module")
def hasty(cluster_stack: ClusterStack) -> Iterator[ClusterStack]:
    """The same stack, with releases that hardly judge; the good version serves again at the end."""
    found, good = cluster_stack, cluster_stack.production()
    yield ClusterStack(found.home, {**found.environment, **LENIENT}, found.faults, found.namespace)
    found.khet("rolling-update", "--version", str(good))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("quick") / "quick.yaml"
    file.write_text(QUICK)
    return file


def check_invariants(stack: ClusterStack) -> None:
    """What has to be true whenever no run is in progress."""
    registry = Registry.from_settings(stack.typed())
    production = stack.production()
    assert stack.traffic() == {production: 1.0}, "the alias is what serves"
    assert production in {str(move.to) for move in registry.alias_history("production")}
    assert stack.cluster().versions.keys() <= {Track.stable}, "no canary is left"
    assert stack.cluster().lease_expires_at is None
    answered = {httpx.get(f"{stack.gateway()}/version", timeout=10).json()["version"] for _ in range(10)}
    assert answered == {production}
    releases = [registry.manifest(info.version).lineage.release_id for info in registry.versions()]
    assert len(releases) == len(set(releases)), "one release, one version"
    assert [r for r in stack.releases() if r["outcome"] == "running"] == []


def kinds(quick: Path) -> dict[str, Callable[[ClusterStack], tuple[str, ...]]]:
    """Runs to kill: the command of each, as the stack stands."""
    return {
        "release": lambda _: ("release", "--config", str(quick)),
        "release of a version": lambda stack: ("release", "--version", other(stack)),
        "rollback": lambda stack: ("rollback", "--to", other(stack)),
        "rolling update": lambda stack: ("rolling-update", "--version", other(stack)),
    }


def other(stack: ClusterStack) -> str:
    """A version that served before, and does not now."""
    served = {str(move.to) for move in Registry.from_settings(stack.typed()).alias_history("production") if move.to}
    return max(served - {stack.production()}, key=Version.parse)


def killed_in(stack: ClusterStack, command: tuple[str, ...], moment_s: float) -> str:
    """Kill a run after so many seconds; what it was doing then."""
    process = stack.begin(*command)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment_s)
    kill(process)
    running = [record for record in stack.releases() if record["outcome"] == "running"]
    return f"{command[0]}: {running[-1]['stage'] if running else 'no record'}"


def test_twenty_kills_leave_the_service_as_a_person_would_want_it(hasty: ClusterStack, quick: Path) -> None:
    chance, runs = random.Random(SEED), kinds(quick)
    assert hasty.json("release", "--config", str(quick))["outcome"] == "promoted"  # there is a version to return to
    met = []
    for kind in (kind for kind, kills in KILLS.items() for _ in range(kills)):
        met.append(killed_in(hasty, runs[kind](hasty), chance.uniform(IMPORTS_S, SPANS_S[kind])))
        wait_until("the lease is over", lambda: _is_over(hasty), LEASE_S + 5)
        found = hasty.json("watchdog")
        assert not found["failed"], met
        check_invariants(hasty)
    assert len(met) == 20
    assert len(set(met)) >= 6, f"too few places were met: {met}"


def _is_over(stack: ClusterStack) -> bool:
    lost = stack.namespace.client.lease_lost()
    seen = stack.namespace.admin.get(LEASE, "ml-service-rollout")
    return lost is not None or seen is None or not seen["spec"].get("holderIdentity")
