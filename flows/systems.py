"""The adapters a flow works with, built from the settings in one place."""

from __future__ import annotations

import dataclasses
import functools
import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from configs.settings import Settings, home, settings
from ml.objects import ObjectStore
from tasks.audit import AuditLog, audit
from tasks.cluster import Cluster, cluster
from tasks.registry import Registry
from tasks.rollout.journal import Journal


@dataclass(frozen=True, slots=True)
class Systems:
    """Everything outside the process that a flow touches."""

    settings: Settings
    store: ObjectStore
    registry: Registry
    cluster: Cluster
    audit: AuditLog

    @property
    def bucket(self) -> str:
        """Where models, leases and release records are."""
        return self.settings.object_store.models_bucket

    def impatient(self, patience_s: float) -> Systems:
        """The same, where a call of the object store gives up after about `patience_s`."""
        store, registry = self.store.with_patience(patience_s), self.registry.with_patience(patience_s)
        return dataclasses.replace(self, store=store, registry=registry)

    def journal(self, release_id: str) -> Journal:
        """The record of a release."""
        return Journal.open(self.store, self.bucket, release_id)


@functools.lru_cache(maxsize=1)
def systems() -> Systems:
    """The systems of this process.

    Raises:
        ConfigError: something is not configured.
    """
    current = settings()
    return Systems(
        settings=current,
        store=ObjectStore(current.object_store),
        registry=Registry.from_settings(current),
        cluster=cluster(current),
        audit=audit(current),
    )


def work_folder(release_id: str) -> Path:
    """Where a release keeps checkpoints and exported files until they are published."""
    return home() / "work" / release_id


def requester() -> str:
    """Who asks: `KHET` runs started by a person carry the login, those of a worker the host's name too."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
