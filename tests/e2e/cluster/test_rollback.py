"""Rollbacks on a real Kubernetes under users' requests: how long they take, and one while the object store is away."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.books import Books
from flows.history import read_history
from flows.rollback import rollback
from flows.rolling_update import rolling_update
from flows.systems import Systems
from flows.watchdog import rollout_watchdog
from ml.objects import ObjectStore
from tasks.cluster import Track
from tasks.cluster.kubernetes import objects
from tasks.cluster.kubernetes.client import REPLICA_SET, SERVICE
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.node import Traffic, eventually
from tests.support.service import NEW, OLD, found_systems
from tests.support.stack import start_object_store, stop_parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WARM_S, COLD_S = 20, 60


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeNamespace]:
    with running_namespace(tmp_path_factory.mktemp("kube")) as found:
        found.behave(v1_1_0={"answer": "rust"})
        yield found


@pytest.fixture
def systems(namespace: KubeNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systems]:
    """OLD is production and serves on two pods."""
    area = namespace.cluster_settings().model_copy(
        update={"gateway_url": namespace.users_url(), "replicas": 2, "keep_previous_s": 600}
    )
    with (
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        prefect_test_harness(server_startup_timeout=180),
    ):
        store = ObjectStore(start_object_store(tmp_path / "s3"))
        yield found_systems(store, namespace.client, area, tmp_path, monkeypatch)
        stop_parts(tmp_path / "s3")


def test_warm_cold_and_without_a_registry_no_request_is_lost(
    systems: Systems, namespace: KubeNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cluster, took_s = systems.cluster, {}

    def update(*, keep: bool) -> None:
        area = systems.settings.cluster.model_copy(update={"keep_previous_s": 600 if keep else 0})
        changed = replace(systems, settings=systems.settings.model_copy(update={"cluster": area}))
        for module in ("rolling_update", "session", "rollback", "watchdog"):
            monkeypatch.setattr(f"flows.{module}.systems", lambda: changed)
        assert rolling_update(version=str(NEW)).outcome == "promoted"
        if keep:
            eventually(lambda: Track.previous in cluster.status().versions, 30)
            cluster.wait_ready(Track.previous, 60)

    def back(name: str) -> None:
        """Roll back; how long it took from the command until NEW answered nobody any more."""
        began = time.monotonic()
        with Traffic(namespace.users_url(), keep_alive=False) as seen:
            seen.wait_for(20)
            assert rollback().outcome == "rolled_back"
            newest = cluster.memory().served[0]
            users_before = seen.versions["v1.1.0"]
            seen.wait_for(50)
            assert seen.versions["v1.1.0"] == users_before
        assert seen.failures == {}
        assert (newest.version, newest.warm) == (str(OLD), name != "cold")
        took_s[name] = newest.took_s or 0.0
        took_s[f"{name}, all of it"] = time.monotonic() - began

    def stable() -> None:
        assert cluster.status().versions == {Track.stable: OLD}
        assert selector(namespace) == {objects.NAME: "ml-service", objects.TRAFFIC: "on"}
        state = systems.registry.alias("production")
        assert state is not None
        assert state.version == OLD

    update(keep=True)
    back("warm")
    stable()

    update(keep=False)
    assert Track.previous not in cluster.status().versions
    back("cold")
    stable()

    update(keep=True)
    stop_parts(tmp_path / "s3", signal.SIGKILL)
    back("warm, no registry")
    assert cluster.status().weights == {Track.previous: 1.0}
    assert selector(namespace) == {objects.NAME: "ml-service", objects.TRACK: "previous"}
    start_object_store(tmp_path / "s3")
    with Traffic(namespace.users_url(), keep_alive=False) as users:
        assert rollout_watchdog().done[0].startswith("the rollback to v1.0.0")
        users.wait_for(50)
    assert (users.failures, set(users.versions)) == ({}, {"v1.0.0"})
    stable()

    with capsys.disabled():
        print("\nseconds of rollbacks:", {name: round(seconds, 1) for name, seconds in took_s.items()})
    assert took_s["warm"] <= WARM_S
    assert took_s["warm, no registry"] <= WARM_S
    assert took_s["cold"] <= COLD_S
    remembered = {row.version for row in read_history(Books(systems)).rows if row.took_s is not None or row.serves}
    sets = namespace.admin.find(REPLICA_SET, objects.selector(systems.settings.cluster.kubernetes, Track.stable))
    assert remembered <= {one["metadata"]["labels"][objects.VERSION] for one in sets}


def selector(namespace: KubeNamespace) -> dict[str, str]:
    found = namespace.admin.get(SERVICE, "ml-service")
    assert found is not None
    return dict(found["spec"]["selector"])
