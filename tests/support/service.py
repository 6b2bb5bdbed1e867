"""A served model for flows' tests: a registry with four versions, a node with two replicas, and what to ask them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.areas import ClusterSettings
from configs.settings import Settings
from flows import recovery
from flows.systems import Systems
from ml.objects import ObjectStore
from ml.version import Version
from tasks.audit import AuditLog
from tasks.cluster import Cluster, Memory, Track
from tasks.rollout import journal
from tasks.rollout.journal import Journal, Process, ReleaseRecord, utc_now
from tests.support.node import NodeProcess
from tests.support.registry import Shelf
from tests.support.s3 import unique

OLD, NEW, UNTRIED, BROKEN = (Version(1, minor, 0) for minor in range(4))
DEAD = Process(host="", pid=1, started_at=0.0)
_FLOWS = ("rolling_update", "scaling", "session", "rollback", "watchdog")


@dataclass
class Service:
    """OLD serves on two replicas; NEW and BROKEN served before it; UNTRIED never did; BROKEN cannot start any more."""

    systems: Systems
    api: str
    node: NodeProcess

    def production(self) -> Version | None:
        state = self.systems.registry.alias("production")
        return state.version if state else None

    def serving(self, track: Track = Track.stable) -> tuple[set[Version], int]:
        """Versions and number of the track's ready replicas."""
        ready = [r for r in self.node.client.status().replicas if r.track is track and r.ready]
        return {replica.version for replica in ready}, len(ready)

    def records(self) -> list[ReleaseRecord]:
        return journal.releases(self.systems.store, self.systems.bucket)

    def audited(self) -> list[tuple[str, str]]:
        return [(entry.action, entry.outcome) for entry in self.systems.audit.tail(100)]

    def left(self, kind: str, **intent: Any) -> ReleaseRecord:
        """The record of a run whose process was killed in the middle."""
        record = ReleaseRecord(
            release_id=f"left-{len(self.records())}",
            kind=kind,  # type: ignore[arg-type]
            started_at=utc_now(),
            requested_by="t",
            process=DEAD.model_copy(update={"host": recovery.this_process().host}),
            parameters={},
            version=intent["version"],
        )
        Journal.start(self.systems.store, self.systems.bucket, record).intend(**intent)
        return record

    def read(self, record: ReleaseRecord) -> ReleaseRecord:
        return journal.read(self.systems.store, self.systems.bucket, record.release_id)


def served(
    store: ObjectStore, node: NodeProcess, folder: Path, api: str, patch: pytest.MonkeyPatch, **cluster: Any
) -> Service:
    """A new registry, and the node as if it had never served anything else; flows find both. `cluster`: settings."""
    area = node.settings.model_copy(update=cluster)
    return Service(found_systems(store, node.client, area, folder, patch), api, node)


def found_systems(
    store: ObjectStore, cluster: Cluster, area: ClusterSettings, folder: Path, patch: pytest.MonkeyPatch
) -> Systems:
    """The systems that flows find: a new registry in `store`, and a cluster that serves OLD and remembers nothing."""
    shelf = Shelf.make(store, unique("models"), folder)
    for number, version in enumerate((OLD, NEW, UNTRIED, BROKEN)):
        assert shelf.publish(f"release-{number}").version == version
    for version in (NEW, BROKEN, OLD):
        shelf.registry.move_alias("production", version, by="t", reason="promoted")
    cluster.rollback(OLD, 2)
    cluster.remember(lambda old: Memory(revision=old.revision))
    settings = Settings(cluster=area)
    bucket = settings.object_store.model_copy(update={"models_bucket": shelf.bucket})
    settings = settings.model_copy(update={"object_store": bucket})
    systems = Systems(settings, store, shelf.registry, cluster, AuditLog(settings.database, folder / "spool.jsonl"))
    for module in _FLOWS:
        patch.setattr(f"flows.{module}.systems", lambda: systems)
    return systems
