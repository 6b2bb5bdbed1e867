"""How often a holdout has decided: every release that is judged on it leaves a small record in the object store.

Each decision leaks a little of the holdout into what is chosen next, so its scores grow optimistic with use (Dwork et
al., Science 2015). Nothing is forbidden here; the count makes the wear visible.
"""

from __future__ import annotations

from pydantic import AwareDatetime

from ml.objects import ObjectStore
from ml.results import Record

PREFIX = "holdouts/"


class HoldoutUse(Record):
    """One release that was decided on a holdout. `version` is None where the release never had one."""

    release_id: str
    decided_at: AwareDatetime
    decision: str
    model_sha256: str
    version: str | None = None


def deciders(store: ObjectStore, bucket: str, holdout_hash: str) -> frozenset[str]:
    """Ids of the releases that this holdout has decided."""
    folder = f"{PREFIX}{holdout_hash}/"
    return frozenset(info.key[len(folder) :].removesuffix(".json") for info in store.list(bucket, folder))


def record_use(store: ObjectStore, bucket: str, holdout_hash: str, use: HoldoutUse) -> None:
    """Count the use. A release that is decided again, after a resume, replaces its own record."""
    data = (use.model_dump_json(indent=1) + "\n").encode()
    store.put(bucket, _key(holdout_hash, use.release_id), data, content_type="application/json")


def name_version(store: ObjectStore, bucket: str, holdout_hash: str, release_id: str, version: str) -> None:
    """Note the version that a decided release became.

    Raises:
        ObjectMissing: the release was not decided on this holdout.
    """
    use = HoldoutUse.model_validate_json(store.get(bucket, _key(holdout_hash, release_id)))
    record_use(store, bucket, holdout_hash, use.model_copy(update={"version": version}))


def _key(holdout_hash: str, release_id: str) -> str:
    return f"{PREFIX}{holdout_hash}/{release_id}.json"
