"""Labels from a file to the table and back as counts, against a real PostgreSQL and a real object store."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from pydantic import SecretStr

from configs.areas import DatabaseSettings
from configs.errors import ConfigError, ExternalError, IntegrityError
from ml.images import STATISTICS
from ml.objects import ObjectStore
from ml.serving.rows import Origin, Row, object_key, to_batches
from tasks.feedback.importing import import_labels
from tasks.feedback.labels import Answer
from tasks.feedback.predictions import PredictionLog
from tasks.feedback.store import Added, Feedback, FeedbackStore, Tally, ensure_schema
from tests.support.s3 import unique
from tests.support.stack import object_store, postgres

CLASSES = ("healthy", "rust", "scab")
NOW = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseSettings]:
    with postgres(tmp_path_factory.mktemp("pg")) as found:
        assert found.dsn is not None
        ensure_schema(found.dsn.get_secret_value())
        yield found


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield ObjectStore(found)


@pytest.fixture
def feedback(database: DatabaseSettings) -> FeedbackStore:
    assert database.dsn is not None
    with psycopg.connect(database.dsn.get_secret_value()) as connection:
        connection.execute("TRUNCATE feedback")
    return FeedbackStore(database)


class Service:
    """What the service logged, in a bucket of its own."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.bucket = unique("data")
        store.ensure_bucket(self.bucket)
        self.log = PredictionLog(store, self.bucket)

    def answered(
        self, request_id: str, chosen: int, *, days_ago: float, version: str = "v1.1.0", source: str = "user"
    ) -> None:
        row = Row(
            request_id=request_id,
            time=(NOW - days_ago * DAY).timestamp(),
            chosen=chosen,
            probs=np.full(3, 1 / 3, dtype=np.float32),
            ood_score=0.1,
            is_leaf=True,
            statistics=dict.fromkeys(STATISTICS, 0.5),
            embedding=np.zeros(4, dtype=np.float32),
            image_sha256="00" * 32,
            latency_ms=5.0,
            source=source,
        )
        for batch in to_batches([row], Origin(version, "replica-1", CLASSES)):
            self.store.put(self.bucket, batch.key, batch.data)


@pytest.fixture
def service(objects: ObjectStore) -> Service:
    return Service(objects)


def classes_of(version: str) -> Collection[str]:
    if version != "v1.1.0":
        raise ConfigError(f"{version} is not published.\nNext: look.")
    return CLASSES


def load(folder: Path, text: str, store: FeedbackStore, service: Service, *, correct: bool = False) -> Added:
    file = folder / "labels.csv"
    file.write_text(text, encoding="utf-8")
    return import_labels(file, store, service.log, classes_of, now=NOW, lookup_days=10, correct=correct)


def a_label(
    request_id: str = "", *, predicted: str = "rust", label: str = "rust", source: str = "asha", days_ago: float = 1
) -> Feedback:
    answer = Answer("v1.1.0", predicted, NOW - days_ago * DAY)
    return Feedback(request_id or uuid.uuid4().hex, source, label, answer, NOW)


def count(store: FeedbackStore) -> Tally:
    return store.tally("v1.1.0", NOW - 30 * DAY, NOW)


# The table ------------------------------------------------------------------------------------------------------------


def test_labels_are_counted_by_true_class(feedback: FeedbackStore) -> None:
    added = feedback.add([a_label(), a_label(), a_label(label="scab"), a_label(predicted="healthy")])
    assert added == Added(new=4, known=0, corrected=0)
    assert count(feedback) == Tally({"rust": (1, 3), "scab": (1, 1)}, disputed=0)


def test_only_the_version_and_the_time_asked_for_count(feedback: FeedbackStore) -> None:
    feedback.add([a_label(days_ago=5), a_label(days_ago=4), a_label(days_ago=3)])
    assert feedback.tally("v1.1.0", NOW - 5 * DAY, NOW - 3 * DAY).by_class == {"rust": (0, 2)}
    assert feedback.tally("v1.0.0", NOW - 30 * DAY, NOW) == Tally({}, 0)


def test_a_second_delivery_changes_nothing(feedback: FeedbackStore) -> None:
    labels = [a_label(), a_label()]
    feedback.add(labels)
    assert feedback.add([*labels, a_label()]) == Added(new=1, known=2, corrected=0)
    assert count(feedback).by_class == {"rust": (0, 3)}


def test_another_label_of_the_same_source_is_refused_unless_it_is_a_correction(feedback: FeedbackStore) -> None:
    feedback.add([a_label("r-1")])
    with pytest.raises(IntegrityError, match="r-1: asha labelled it rust before, now scab"):
        feedback.add([a_label("r-2"), a_label("r-1", label="scab")])
    assert count(feedback).by_class == {"rust": (0, 1)}
    assert feedback.add([a_label("r-1", label="scab")], correct=True) == Added(new=0, known=0, corrected=1)
    assert count(feedback).by_class == {"scab": (1, 1)}


def test_two_people_count_once_and_only_where_they_agree(feedback: FeedbackStore) -> None:
    feedback.add(
        [a_label("r-1"), a_label("r-2"), a_label("r-1", source="ravi"), a_label("r-2", source="ravi", label="scab")]
    )
    assert count(feedback) == Tally({"rust": (0, 1)}, disputed=1)


def test_two_people_cannot_mean_different_answers(feedback: FeedbackStore) -> None:
    feedback.add([a_label("r-1")])
    with pytest.raises(IntegrityError, match=r"by what asha labelled, v1\.1\.0 answered rust"):
        feedback.add([a_label("r-1", source="ravi", predicted="scab")], correct=True)


def test_writers_at_the_same_time_store_each_label_once(feedback: FeedbackStore) -> None:
    labels = [a_label() for _ in range(50)]
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(feedback.add, [labels] * 4))
    assert sum(one.new for one in added) == 50
    assert count(feedback).by_class == {"rust": (0, 50)}


def test_making_the_table_again_keeps_the_rows(database: DatabaseSettings, feedback: FeedbackStore) -> None:
    assert database.dsn is not None
    feedback.add([a_label()])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ensure_schema, [database.dsn.get_secret_value()] * 4))
    assert count(feedback).by_class == {"rust": (0, 1)}


def test_a_missing_table_or_database_says_what_to_do(database: DatabaseSettings) -> None:
    assert database.dsn is not None
    info = psycopg.conninfo.conninfo_to_dict(database.dsn.get_secret_value())

    def store(**changes: str | int) -> FeedbackStore:
        dsn = psycopg.conninfo.make_conninfo("", **(info | changes))
        return FeedbackStore(DatabaseSettings(dsn=SecretStr(dsn)))

    with pytest.raises(IntegrityError, match=r"feedback cannot be used.*khet up"):
        count(store(options="-c search_path=pg_catalog"))
    with pytest.raises(ExternalError, match="khet status"):
        count(store(port=1))
    with pytest.raises(ConfigError, match=r"database\.dsn is not set"):
        count(FeedbackStore(DatabaseSettings()))


# Files ----------------------------------------------------------------------------------------------------------------


def test_answers_that_a_file_lacks_come_from_the_log(tmp_path: Path, feedback: FeedbackStore, service: Service) -> None:
    service.answered("r-1", 0, days_ago=2)
    service.answered("r-2", 1, days_ago=9)
    whole = f"r-3,rust,asha,v1.1.0,scab,{(NOW - DAY).isoformat()}\n"
    text = f"request_id,label,source,version,predicted,predicted_at\nr-1,rust,asha,,,\nr-2,rust,asha,,,\n{whole}"
    assert load(tmp_path, text, feedback, service) == Added(new=3, known=0, corrected=0)
    assert load(tmp_path, text, feedback, service) == Added(new=0, known=3, corrected=0)
    assert count(feedback).by_class == {"rust": (2, 3)}
    assert feedback.tally("v1.1.0", NOW - 9.5 * DAY, NOW - 8.5 * DAY).by_class == {"rust": (0, 1)}


def test_a_copy_for_a_canary_is_not_what_the_user_was_answered(
    tmp_path: Path, feedback: FeedbackStore, service: Service
) -> None:
    service.answered("r-1", 1, days_ago=1)
    service.answered("r-1", 2, days_ago=1, version="v1.2.0", source="shadow")
    load(tmp_path, "request_id,label,source\nr-1,rust,asha\n", feedback, service)
    assert count(feedback).by_class == {"rust": (0, 1)}


def test_a_file_with_bad_lines_is_refused_as_a_whole(tmp_path: Path, feedback: FeedbackStore, service: Service) -> None:
    for request_id in ("r-1", "r-2", "r-4"):
        service.answered(request_id, 1, days_ago=1)
    service.answered("r-2", 2, days_ago=1)
    service.answered("r-5", 1, days_ago=12)
    text = "request_id,label,source\nr-1,rust,asha\nr-2,rust,asha\nr-3,rust,asha\nr-5,rust,asha\n"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, feedback, service)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("labels.csv: nothing was imported.")
    assert lines[1].strip().startswith("line 3: r-2 was answered 2 times")
    assert [line.strip() for line in lines[2:]] == [
        f"line {number}: {request_id} is not in the inference log of the last 10 days"
        for number, request_id in ((4, "r-3"), (5, "r-5"))
    ]
    assert count(feedback) == Tally({}, 0)


def test_a_misspelt_class_or_an_unknown_version_is_named(
    tmp_path: Path, feedback: FeedbackStore, service: Service
) -> None:
    service.answered("r-1", 1, days_ago=1)
    service.answered("r-2", 1, days_ago=1, version="v9.0.0")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "request_id,label,source\nr-1,Rust,asha\nr-2,rust,asha\n", feedback, service)
    assert "line 2: 'Rust' is no class of v1.1.0 (healthy, rust, scab)" in str(caught.value)
    assert "line 3: v9.0.0 is not published." in str(caught.value)
    assert count(feedback) == Tally({}, 0)


def test_two_lines_cannot_mean_different_answers(tmp_path: Path, feedback: FeedbackStore, service: Service) -> None:
    service.answered("r-1", 1, days_ago=1)
    text = "request_id,label,source,version,predicted,predicted_at\n" + (
        f"r-1,rust,asha,,,\nr-1,rust,ravi,v1.1.0,scab,{(NOW - DAY).isoformat()}\n"
    )
    with pytest.raises(ConfigError, match="line 3: r-1 was answered otherwise by line 2"):
        load(tmp_path, text, feedback, service)


def test_a_damaged_log_is_named(tmp_path: Path, feedback: FeedbackStore, service: Service) -> None:
    service.store.put(service.bucket, object_key(NOW.date(), "bad.parquet"), b"cut")
    with pytest.raises(IntegrityError, match=r"bad\.parquet is no file of the inference log"):
        load(tmp_path, "request_id,label,source\nr-1,rust,asha\n", feedback, service)
