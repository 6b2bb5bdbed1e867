"""The count of a holdout's uses, against a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from ml.objects import ObjectStore
from tasks.rollout.holdout import HoldoutUse, deciders, name_version, record_use
from tests.support.s3 import unique
from tests.support.stack import object_store

BUCKET = "khet-guard-models"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        made = ObjectStore(found)
        made.ensure_bucket(BUCKET)
        yield made


def use(release_id: str, decision: str = "advance") -> HoldoutUse:
    at = datetime(2026, 5, 4, tzinfo=UTC)
    return HoldoutUse(release_id=release_id, decided_at=at, decision=decision, model_sha256="0" * 64)


def test_a_release_counts_once_however_often_it_is_decided(store: ObjectStore) -> None:
    holdout = unique("hash")
    assert deciders(store, BUCKET, holdout) == frozenset()
    for release in ("one", "two", "one"):
        record_use(store, BUCKET, holdout, use(release))
    assert deciders(store, BUCKET, holdout) == {"one", "two"}


def test_holdouts_are_counted_apart_even_when_one_hash_begins_another(store: ObjectStore) -> None:
    holdout = unique("hash")
    record_use(store, BUCKET, holdout, use("one"))
    record_use(store, BUCKET, f"{holdout}0", use("two"))
    assert deciders(store, BUCKET, holdout) == {"one"}


def test_a_release_that_was_published_gets_its_version_and_keeps_the_rest(store: ObjectStore) -> None:
    holdout = unique("hash")
    record_use(store, BUCKET, holdout, use("one"))
    name_version(store, BUCKET, holdout, "one", "v1.3.0")
    kept = HoldoutUse.model_validate_json(store.get(BUCKET, f"holdouts/{holdout}/one.json"))
    assert kept == use("one").model_copy(update={"version": "v1.3.0"})
