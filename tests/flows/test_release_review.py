"""The nightly review of a promotion, with a real Prefect server, database, object store and node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from configs.areas import DatabaseSettings
from configs.errors import ExternalError, GateError
from configs.settings import Settings
from flows import review as flow
from flows.review import Promotion, Review, last_promotion, release_review
from flows.session import run_tail
from flows.systems import Systems
from ml.objects import ObjectStore
from ml.version import Version
from tasks import audit
from tasks.audit import AuditLog
from tasks.cluster import Memory, Track
from tasks.feedback import store as feedback
from tasks.feedback.labels import Answer
from tasks.feedback.store import Feedback, FeedbackStore
from tasks.registry import AliasMove
from tasks.rollout import journal
from tasks.rollout.journal import ReleaseRecord
from tasks.rollout.verdict import Decision
from tests.support.node import NodeProcess, eventually, running_node
from tests.support.records import a_metadata
from tests.support.registry import Shelf
from tests.support.s3 import unique
from tests.support.stack import object_store, postgres

OLD, NEW = Version(1, 0, 0), Version(1, 1, 0)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseSettings]:
    with postgres(tmp_path_factory.mktemp("pg")) as found:
        for schema in (audit, feedback):
            schema.ensure_schema(dsn_of(found))
        yield found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield ObjectStore(found)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(tmp_path_factory.mktemp("node")) as running:
        yield running


def dsn_of(database: DatabaseSettings) -> str:
    assert database.dsn is not None
    return database.dsn.get_secret_value()


@dataclass
class Farm:
    """A service that went from OLD to NEW, its systems, and the labels it gets."""

    systems: Systems
    api: str
    node: NodeProcess
    promoted_at: datetime

    def label(self, version: Version, wrong: int, total: int) -> None:
        """Labels of predictions within a day before (OLD) or after (NEW) the promotion."""
        at = self.promoted_at + (timedelta(seconds=1) if version == NEW else -DAY)
        labels = [
            Feedback(f"{version}-{i}", "asha", "rust", Answer(str(version), "scab" if i < wrong else "rust", at), at)
            for i in range(total)
        ]
        FeedbackStore(self.systems.settings.database).add(labels)

    def production(self) -> Version | None:
        state = self.systems.registry.alias("production")
        return state.version if state else None

    def serving(self) -> str:
        return str(httpx.get(f"{self.node.gateway_url}/version", timeout=10).json()["version"])

    def records(self) -> list[tuple[str, dict[str, Any]]]:
        """What the audit log holds of reviews: details and plans."""
        return [(entry.detail, entry.plan) for entry in self.systems.audit.tail(50) if entry.action == "review"]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of that name about this farm's promotion, as the Prefect server has them."""
        body = {"filter": {"event": {"name": [name]}}, "limit": 50}
        found = httpx.post(f"{self.api}/events/filter", json=body, timeout=10).raise_for_status().json()["events"]
        mine = self.promoted_at.isoformat()
        return [e for e in found if datetime.fromisoformat(e["payload"]["promoted_at"]).isoformat() == mine]


@pytest.fixture
def farm(
    prefect: str,
    database: DatabaseSettings,
    store: ObjectStore,
    node: NodeProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Farm:
    shelf = Shelf.make(store, unique("models"), tmp_path)
    (shelf.folder / "metadata.json").write_text(a_metadata().model_dump_json())
    for number, version in enumerate((OLD, NEW)):
        assert shelf.publish(f"release-{number}").version == version
        shelf.registry.move_alias("production", version, by="t", reason="promoted")
    node.client.deploy(Track.stable, NEW, 1)
    node.client.wait_ready(Track.stable, 20)
    node.client.set_weights({Track.stable: 1.0})
    node.client.remember(lambda old: Memory(revision=old.revision))
    with psycopg.connect(dsn_of(database)) as connection:
        connection.execute("TRUNCATE feedback")
    settings = Settings(database=database, cluster=node.settings)
    settings = settings.model_copy(
        update={"object_store": settings.object_store.model_copy(update={"models_bucket": shelf.bucket})}
    )
    systems = Systems(settings, store, shelf.registry, node.client, AuditLog(database, tmp_path / "spool.jsonl"))
    for module in ("flows.review", "flows.rollback"):
        monkeypatch.setattr(f"{module}.systems", lambda: systems)
    moved = shelf.registry.alias_history("production")[-1].at
    return Farm(systems, prefect, node, moved)


# The flow -------------------------------------------------------------------------------------------------------------


def test_a_good_promotion_stays_and_the_look_is_recorded(farm: Farm) -> None:
    farm.label(OLD, 4, 80)
    farm.label(NEW, 3, 80)
    review = release_review()
    assert review.decision is Decision.wait
    assert review.sentence.startswith("v1.1.0 stays, under review until ")
    [(detail, plan)] = [record for record in farm.records() if record[0] == review.sentence]
    assert detail == plan["sentence"]
    assert plan["decision"] == "continue"
    assert [gate["samples"] for gate in plan["gates"]] == [80, 80, 80]
    [event] = eventually(lambda: farm.events("khet.release.review"))
    assert event["resource"]["prefect.resource.id"] == "khet.version.v1.1.0"
    assert farm.events("khet.release.harmful") == []
    rows = artifact(farm.api, "release-review")
    assert [row["says"] for row in rows] == ["no harm shown"] * 3


def test_harm_fails_the_run_and_names_the_way_back(farm: Farm) -> None:
    farm.label(OLD, 4, 120)
    farm.label(NEW, 60, 120)
    with pytest.raises(GateError) as caught:
        release_review()
    assert "v1.1.0 does harm and should give way to v1.0.0" in str(caught.value)
    assert "v1.1.0 was wrong in 50.0% of 120 labelled answers, v1.0.0 before it in 3.3% of 120" in str(caught.value)
    assert "Next: `khet rollback --to v1.0.0`" in str(caught.value)
    assert (farm.production(), farm.serving()) == (NEW, "v1.1.0")
    [event] = eventually(lambda: farm.events("khet.release.harmful"))
    assert event["payload"]["action"] == "called for"
    assert event["payload"]["verdict"]["evidence"]["current_wrong"] == 60


def test_with_act_the_version_before_serves_again_and_the_next_night_has_nothing_to_do(farm: Farm) -> None:
    farm.label(OLD, 4, 120)
    farm.label(NEW, 60, 120)
    review = release_review(act=True)
    assert review.action == "rolled back"
    assert (farm.production(), farm.serving()) == (OLD, "v1.0.0")
    again = release_review(act=True)
    assert again.decision is None
    assert again.sentence.startswith("nothing to review: ")
    assert [r.kind for r in journal.releases(farm.systems.store, farm.systems.bucket)] == ["rollback"]


def test_a_rollback_that_was_cut_short_is_finished_the_next_night(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.label(OLD, 4, 120)
    farm.label(NEW, 60, 120)

    def cut(*_: object) -> None:
        raise ExternalError("the store went away", retryable=False)

    with monkeypatch.context() as patch:
        patch.setattr("flows.rollback.move_alias", cut)
        with pytest.raises(ExternalError):
            release_review(act=True)
    assert farm.production() == NEW
    [left] = journal.releases(farm.systems.store, farm.systems.bucket)
    # The crash hook finds what it has to finish by the run's own id.
    runs = httpx.post(f"{farm.api}/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 1}, timeout=10).json()
    assert left.release_id == run_tail(runs[0]["id"])
    assert left.intent is not None
    assert release_review(act=True).action == "rolled back"
    assert (farm.production(), farm.serving()) == (OLD, "v1.0.0")
    ended = journal.releases(farm.systems.store, farm.systems.bucket)
    assert [record.outcome for record in ended] == ["failed", "rolled_back"]


def test_a_dry_run_says_it_and_leaves_no_trace(farm: Farm) -> None:
    farm.label(OLD, 4, 120)
    farm.label(NEW, 60, 120)
    before = farm.records()
    review = release_review(act=True, dry_run=True)
    assert review.decision is Decision.rollback
    assert review.action == "none"
    assert farm.production() == NEW
    assert farm.records() == before
    assert farm.events("khet.release.harmful") == []


def test_after_its_window_a_promotion_is_not_judged(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.label(OLD, 0, 120)
    farm.label(NEW, 120, 120)
    closes_at = farm.promoted_at + 28 * DAY
    monkeypatch.setattr(flow, "utc_now", lambda: closes_at + 2 * DAY)
    review = release_review(act=True)
    assert review.sentence == f"nothing to review: the review of v1.1.0 closed on {closes_at:%Y-%m-%d}"
    assert farm.production() == NEW


def test_the_last_look_concludes(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.label(OLD, 4, 80)
    farm.label(NEW, 3, 80)
    monkeypatch.setattr(flow, "utc_now", lambda: farm.promoted_at + 28.5 * DAY)
    review = release_review()
    assert review.decision is Decision.promote
    assert "show no harm in its whole review" in review.sentence


def artifact(api: str, key: str) -> list[dict[str, Any]]:
    """The newest table under a key."""
    body = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC", "limit": 1}
    [found] = httpx.post(f"{api}/artifacts/filter", json=body, timeout=10).raise_for_status().json()
    rows: list[dict[str, Any]] = json.loads(found["data"])
    return rows


# Which promotion ------------------------------------------------------------------------------------------------------

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def moved(to: Version, days: float, moved_from: Version | None = None) -> AliasMove:
    return AliasMove(
        name="production", seq=1, moved_from=moved_from, to=to, at=NOW + days * DAY, by="t", reason="a reason"
    )


def record(version: Version, days: float, kind: str = "release") -> ReleaseRecord:
    return ReleaseRecord.model_validate(
        {
            "release_id": "r-test",
            "kind": kind,
            "started_at": NOW + days * DAY,
            "requested_by": "t",
            "parameters": {},
            "version": str(version),
        }
    )


def test_without_a_version_in_production_there_is_no_promotion() -> None:
    assert last_promotion([], []) is None


def test_the_last_move_is_the_promotion() -> None:
    history = [moved(OLD, 0), moved(NEW, 5, OLD)]
    assert last_promotion(history, [record(OLD, -1), record(NEW, 4)]) == Promotion(NEW, OLD, NOW + 5 * DAY)
    assert last_promotion(history[:1], []) == Promotion(OLD, None, NOW)


def test_a_version_that_was_rolled_back_to_is_not_under_review() -> None:
    history = [moved(OLD, 0), moved(NEW, 5, OLD), moved(OLD, 6, NEW)]
    records = [record(OLD, -1), record(NEW, 4), record(OLD, 5.9, "rollback")]
    assert last_promotion(history, records) is None


def test_a_version_that_was_rolled_back_from_and_released_again_is() -> None:
    history = [moved(NEW, 5, OLD), moved(OLD, 6, NEW), moved(NEW, 9, OLD)]
    records = [record(NEW, 4), record(OLD, 5.9, "rollback"), record(NEW, 8)]
    assert last_promotion(history, records) == Promotion(NEW, OLD, NOW + 9 * DAY)


def test_a_rollback_that_began_later_does_not_explain_an_earlier_move() -> None:
    assert last_promotion([moved(NEW, 5, OLD)], [record(NEW, 4), record(NEW, 5.5, "rollback")]) is not None


def test_a_review_reads_back_what_it_wrote() -> None:
    review = Review(version="v1.1.0", decision=Decision.rollback, sentence="x")
    assert Review.model_validate_json(review.model_dump_json()) == review
