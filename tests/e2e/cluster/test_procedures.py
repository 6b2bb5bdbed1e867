"""The procedures' flows on a real Kubernetes, one after the other under users' requests, as kubectl would see them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from configs.errors import ExternalError
from configs.settings import Settings
from flows import recovery
from flows.rolling_update import rolling_update
from flows.scaling import restart, scale
from flows.systems import Systems
from flows.watchdog import rollout_watchdog
from ml.objects import ObjectStore
from ml.version import Version
from tasks.audit import AuditLog
from tasks.cluster import Track
from tasks.cluster.kubernetes.client import DEPLOYMENT
from tasks.rollout.journal import Journal, Process, ReleaseRecord, utc_now
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.node import Traffic, eventually
from tests.support.registry import Shelf
from tests.support.s3 import unique
from tests.support.stack import object_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
OLD, NEW, BROKEN = (Version(1, minor, 0) for minor in range(3))


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeNamespace]:
    with running_namespace(tmp_path_factory.mktemp("kube")) as found:
        found.behave(v1_1_0={"answer": "rust"}, v1_2_0={"exit_code": 3})
        yield found


@pytest.fixture
def systems(namespace: KubeNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systems]:
    """OLD is production and serves on two pods; NEW and BROKEN served before it."""
    with (
        object_store(tmp_path / "s3") as stored,
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        prefect_test_harness(server_startup_timeout=180),
    ):
        store = ObjectStore(stored)
        shelf = Shelf.make(store, unique("models"), tmp_path)
        for number, version in enumerate((OLD, NEW, BROKEN)):
            assert shelf.publish(f"release-{number}").version == version
        for version in (NEW, BROKEN, OLD):
            shelf.registry.move_alias("production", version, by="t", reason="promoted")
        cluster = namespace.cluster_settings().model_copy(update={"gateway_url": namespace.users_url()})
        settings = Settings(cluster=cluster)
        area = settings.object_store.model_copy(update={"models_bucket": shelf.bucket})
        found = Systems(
            settings.model_copy(update={"object_store": area}),
            store,
            shelf.registry,
            namespace.client,
            AuditLog(settings.database, tmp_path / "spool.jsonl"),
        )
        for module in ("rolling_update", "scaling", "session", "rollback", "watchdog"):
            monkeypatch.setattr(f"flows.{module}.systems", lambda: found)
        namespace.client.rollback(OLD, 2)
        eventually(namespace.answers, 60, "an answer of the Service")
        yield found


def test_update_undo_scale_restart_and_a_killed_canary_lose_no_request(
    systems: Systems, namespace: KubeNamespace
) -> None:
    def serving() -> tuple[set[Version], int]:
        ready = [r for r in systems.cluster.status().replicas if r.track is Track.stable and r.ready]
        return {replica.version for replica in ready}, len(ready)

    with Traffic(namespace.users_url()) as users:
        users.wait_for(50)
        planned = rolling_update(version=str(NEW), surge=2, dry_run=True)
        assert "--- live/Deployment/ml-service" in planned.diff
        assert serving() == ({OLD}, 2)

        assert rolling_update(version=str(NEW), surge=2).outcome == "promoted"
        assert serving() == ({NEW}, 2)
        found = namespace.admin.get(DEPLOYMENT, "ml-service")
        assert found is not None
        assert found["metadata"]["annotations"]["kubernetes.io/change-cause"] == "serve v1.1.0"

        with pytest.raises(ExternalError, match=r"the update to v1\.2\.0 was undone"):
            rolling_update(version=str(BROKEN), deadline_s=30)
        assert serving() == ({NEW}, 2)

        assert scale(replicas=3).outcome == "done"
        assert serving() == ({NEW}, 3)
        assert restart().outcome == "done"
        assert serving() == ({NEW}, 3)

        systems.cluster.deploy(Track.canary, OLD, 1)
        systems.cluster.wait_ready(Track.canary, 60)
        systems.cluster.set_weights({Track.stable: 0.5, Track.canary: 0.5}, lease_s=1)
        left = ReleaseRecord(
            release_id="left-1",
            started_at=utc_now(),
            requested_by="t",
            process=Process(host=recovery.this_process().host, pid=1, started_at=0.0),
            parameters={},
            version=str(OLD),
        )
        Journal.start(systems.store, systems.bucket, left).intend("canary", str(OLD), str(NEW))
        assert any("its canary v1.0.0 was taken away" in sentence for sentence in rollout_watchdog().done)
        assert systems.cluster.status().versions == {Track.stable: NEW}
        assert rollout_watchdog().done == ()
        users.wait_for(50)
    assert users.failures == {}
    state = systems.registry.alias("production")
    assert state is not None
    assert state.version == NEW
