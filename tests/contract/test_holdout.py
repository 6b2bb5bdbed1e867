"""The gate's verdict from files, and the count of a holdout's uses, against a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.areas import GateSettings
from configs.errors import IntegrityError
from ml.objects import ObjectMissing, ObjectStore
from tasks.rollout.holdout import HoldoutUse, Ledger, Scored
from tasks.rollout.verdict import Decision, Verdict
from tests.support.report_example import evaluation, exported
from tests.support.s3 import unique
from tests.support.stack import object_store

BUCKET = "khet-guard-models"
NOW = datetime(2026, 5, 4, tzinfo=UTC)
IMAGES = 200


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        store = ObjectStore(found)
        store.ensure_bucket(BUCKET)
        yield Ledger(store, BUCKET, lambda: NOW)


@pytest.fixture
def holdout() -> str:
    return unique("hash")


def scored(folder: Path, holdout: str, wrong: int, first: int = 0) -> Scored:
    """A model that takes the first `wrong` images for healthy. Images are numbered from `first`."""
    sha256 = [f"{i + first:03d}" for i in range(IMAGES)]
    predicted = ["healthy" if i < wrong else "early_blight" for i in range(IMAGES)]
    table = {"sha256": sha256, "label": ["early_blight"] * IMAGES, "predicted": predicted, "group": sha256}
    file = folder / f"{wrong}-{first}.parquet"
    pq.write_table(pa.table(table), file)
    return Scored(evaluation().model_copy(update={"holdout_hash": holdout}), file)


def decide(ledger: Ledger, release: str, challenger: Scored, champion: Scored | None = None) -> Verdict:
    limits = GateSettings(max_holdout_uses=1)
    return ledger.decide(release, challenger, exported(), champion, ("healthy",), limits, None)


def test_the_answers_in_the_files_decide(ledger: Ledger, holdout: str, tmp_path: Path) -> None:
    good, bad = scored(tmp_path, holdout, wrong=4), scored(tmp_path, holdout, wrong=40)
    assert decide(ledger, "better", good, bad).decision is Decision.advance
    verdict = decide(ledger, "worse", bad, good)
    assert verdict.decision is Decision.rollback
    assert "lost 36 and won 0 of 200 images" in verdict.reasons[0]
    kept = ledger.use(holdout, "worse")
    assert kept == HoldoutUse(
        release_id="worse", decided_at=NOW, decision="rollback", model_sha256=exported().sha256, version=None
    )


def test_a_release_counts_once_however_often_it_is_decided(ledger: Ledger, holdout: str, tmp_path: Path) -> None:
    model = scored(tmp_path, holdout, wrong=4)
    again = [decide(ledger, "one", model) for _ in range(2)]
    assert ledger.deciders(holdout) == {"one"}
    assert not any("warning" in reason for verdict in again for reason in verdict.reasons)
    assert any("has decided 2 releases" in reason for reason in decide(ledger, "two", model).reasons)


def test_holdouts_are_counted_apart_even_when_one_hash_begins_another(
    ledger: Ledger, holdout: str, tmp_path: Path
) -> None:
    decide(ledger, "one", scored(tmp_path, holdout, wrong=4))
    decide(ledger, "two", scored(tmp_path, f"{holdout}0", wrong=4))
    assert ledger.deciders(holdout) == {"one"}


def test_what_cannot_be_compared_is_not_counted(ledger: Ledger, holdout: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not of one holdout"):
        decide(ledger, "one", scored(tmp_path, holdout, wrong=4), scored(tmp_path, holdout, wrong=4, first=7))
    assert ledger.deciders(holdout) == frozenset()


def test_a_release_that_was_published_gets_its_version_and_keeps_the_rest(
    ledger: Ledger, holdout: str, tmp_path: Path
) -> None:
    decide(ledger, "one", scored(tmp_path, holdout, wrong=4))
    before = ledger.use(holdout, "one")
    ledger.name_version(holdout, "one", "v1.3.0")
    assert ledger.use(holdout, "one") == before.model_copy(update={"version": "v1.3.0"})
    with pytest.raises(ObjectMissing):
        ledger.name_version(holdout, "never", "v1.3.0")
