"""After a change of version: the one before stays on replicas without traffic, so that a rollback takes seconds."""

from __future__ import annotations

from datetime import datetime, timedelta

from configs.errors import KhetError
from ml.version import Version
from tasks.cluster import Cluster, ClusterStatus, Kept, Memory, Track


def keep_previous(cluster: Cluster, before: Version, seconds: int, now: datetime) -> str:
    """Keep `before` for `seconds`, on as many replicas as stable has, and nothing else that was kept; a sentence.

    Returns at once: a rollback looks itself whether they are ready. Warm replicas are worth no promotion, so what goes
    wrong is only told.
    """
    try:
        status = cluster.status()
        if seconds <= 0:
            return drop_previous(cluster, status)
        kept = Kept(version=str(before), until=now + timedelta(seconds=seconds))
        cluster.remember(lambda memory: memory.model_copy(update={"kept": kept}))
        replicas = max(1, sum(replica.track is Track.stable for replica in status.replicas))
        cluster.deploy(Track.previous, before, replicas)
    except KhetError as error:
        return f"{before} is not kept warm: {str(error).splitlines()[0]}"
    return f"{before} is kept warm on {replicas} replica(s) until {kept.until:%Y-%m-%d %H:%M} UTC"


def drop_previous(cluster: Cluster, status: ClusterStatus) -> str:
    """Take away what was kept; a sentence, empty where nothing was."""
    if Track.previous not in status.versions:
        return ""
    cluster.remove(Track.previous)
    cluster.remember(lambda memory: memory.model_copy(update={"kept": None}))
    return f"{status.versions[Track.previous]} is not kept warm any more"


def is_over(status: ClusterStatus, memory: Memory, now: datetime) -> bool:
    """Whether replicas are kept that nobody wants any more. One with traffic is no spare replica."""
    version = status.versions.get(Track.previous)
    unused = not status.weights.get(Track.previous)
    return version is not None and unused and not memory.is_kept(version, now)
