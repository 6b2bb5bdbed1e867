"""Training as a deployment: what it stores, and how a release follows it; real Prefect server and object store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, IntegrityError, SafetyError
from configs.settings import home, settings
from flows import hooks
from flows.commands.deploying import refuse_missing_pools
from flows.session import RESUMABLE
from flows.tidy import tidy_trainings
from flows.train import Training, train
from ml.checkpoint_store import BEST, RESULT, Finished
from ml.dataset import Dataset
from ml.lineage import collect_lineage
from ml.objects import ObjectStore
from ml.results import TrainResult
from tasks.audit import audit
from tasks.datasets.store import DatasetStore
from tasks.progress import Progress, listen
from tasks.rollout.journal import Journal, Outcome, ReleaseRecord, utc_now
from tasks.training.elsewhere import Order, cancel_trainings, ensure_deployment, train_elsewhere
from tests.support.local_stack import wait_until
from tests.support.s3 import as_environment, unique
from tests.support.stack import object_store
from tests.support.training import config, dataset

pytestmark = pytest.mark.timeout(300)
QUICK = config(dataset="tiny", budget={"epochs": 1})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        DatasetStore(ObjectStore(found), found.data_bucket, 8).publish(Dataset.open(dataset()))
        yield found


@pytest.fixture(autouse=True)
def machine(prefect: str, store: ObjectStoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has nothing but the addresses; returns its home."""
    values = as_environment(store) | {
        "KHET_HOME": str(tmp_path / "khet"),
        "KHET_ORCHESTRATOR__API_URL": prefect,
        "KHET_TRAINING__POLL_S": "0.05",
        "KHET_TRAINING__ATTEMPTS": "2",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    return tmp_path / "khet"


# The flow -------------------------------------------------------------------------------------------------------------


def run_train(**parameters: object) -> Training:
    return train(values=QUICK.model_dump(mode="json"), **parameters)  # type: ignore[arg-type]


def test_a_training_is_stored_with_its_lineage_and_asked_again_it_is_brought(
    store: ObjectStoreSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_id = unique("run")
    first = run_train(resume=training_id)
    assert (first.outcome, first.training_id, first.epochs) == ("trained", training_id, 1)
    assert first.address == f"s3://{store.models_bucket}/training/{training_id}"
    assert {"best.ckpt", "config.json", "curves.png"} <= first.files.keys()
    found = Order(training_id, QUICK, Dataset.open(dataset()).manifest_hash).stored(settings()).finished()
    assert found is not None and found.lineage.config == QUICK.model_dump(mode="json")
    assert (found.lineage.seed, found.lineage.dataset) == (QUICK.seed, "tiny") and found.lineage.packages["torch"]
    outcomes = [entry.outcome for entry in audit(settings()).tail(10) if entry.subject == training_id]
    assert outcomes == ["intended", "done"]

    monkeypatch.setenv("KHET_HOME", str(tmp_path / "another"))
    settings.cache_clear()
    again = run_train(resume=training_id)
    assert (again.finished_at, again.files) == (first.finished_at, first.files)
    brought = TrainResult.read(again.folder / RESULT)
    assert again.folder.is_relative_to(tmp_path / "another") and brought.checkpoint == again.folder / BEST
    assert brought.checkpoint.read_bytes() == (first.folder / BEST).read_bytes()
    assert run_train(resume=training_id, dry_run=True).steps[0].startswith("bring what was trained on")


def test_a_dry_run_says_what_it_would_do_and_stores_nothing(store: ObjectStoreSettings) -> None:
    plan = run_train(dry_run=True)
    assert plan.outcome == "dry_run" and plan.epochs is None
    assert [step.partition(" ")[0] for step in plan.steps] == ["check", "train", "keep"]
    assert "for 1 epochs: begin anew" in plan.steps[1]
    prefix = f"training/{plan.training_id}"
    assert list(ObjectStore(store).list(store.models_bucket, prefix)) == []
    assert not home().joinpath("datasets").exists()


def test_other_data_than_the_release_checked_is_refused() -> None:
    with pytest.raises(IntegrityError, match="imported anew"):
        run_train(dataset_hash="0" * 64)


def test_what_cannot_be_an_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a release id"):
        run_train(resume="../other")


# Followed by a release ------------------------------------------------------------------------------------------------


@pytest.fixture
def client(prefect: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def deployment(client: SyncPrefectClient) -> Iterator[UUID]:
    """The deployment `train/train` in a pool that has no worker: the test decides what becomes of a run."""
    pool = client.create_work_pool(WorkPoolCreate(name=unique("gpu"), type="process"))
    made = client.create_deployment(
        client.create_flow_from_name("train"), "train", work_pool_name=pool.name, entrypoint="flows.train.train"
    )
    yield made
    client.delete_deployment(made)


@pytest.fixture
def order() -> Order:
    return Order(unique("release")[:30], QUICK, Dataset.open(dataset()).manifest_hash)


@flow(name="release-of-test")
def release(order: Order, folder: Path, guard: Callable[[], None]) -> TrainResult:
    return train_elsewhere(order.release_id, order, folder, guard)


def follow(order: Order, folder: Path, guard: Callable[[], None] = lambda: None) -> TrainResult:
    return release(order, folder, guard)


def runs(client: SyncPrefectClient, order: Order) -> Sequence[FlowRun]:
    return [run for run in client.read_flow_runs(limit=100) if order.key in run.tags]


def finish(order: Order, folder: Path) -> Finished:
    """What a training leaves in the store, without the time it takes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BEST).write_bytes(b"weights of " + order.release_id.encode())
    result = TrainResult(
        checkpoint=folder / BEST, net="convnet", px=32, seed=0, epochs=1, steps=3, elapsed_s=1.0, images_per_s=9.0,
        best_val_accuracy=0.5, dataset="tiny", dataset_hash=order.dataset_hash, hardware={}, resumed_from_step=None,
        history=(),
    )  # fmt: skip
    lineage = collect_lineage(config={}, seed=0, dataset="tiny", dataset_hash=order.dataset_hash)
    return order.stored(settings()).finish(result, lineage, {BEST: folder / BEST})


@contextmanager
def worker(client: SyncPrefectClient, order: Order, *ends: Callable[[], State[None]]) -> Iterator[None]:
    """Stands for the pool's worker: each run of this order starts, and ends as the next of `ends` says."""

    def work() -> None:
        for number, end in enumerate(ends, 1):
            found = wait_until("the run is there", lambda n=number: len(runs(client, order)) == n, 60)
            assert found
            [run] = [r for r in runs(client, order) if r.state_type is StateType.SCHEDULED]
            for state in (Running(), end()):
                client.set_flow_run_state(run.id, state, force=True)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_the_result_of_the_run_is_brought_and_its_order_names_it(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    forget = listen(seen.append)

    def done() -> State[None]:
        finish(order, tmp_path / "pod")
        return Completed()

    with worker(client, order, done):
        result = follow(order, tmp_path / "here")
    forget()
    assert result.checkpoint.read_bytes() == b"weights of " + order.release_id.encode()
    [run] = runs(client, order)
    assert run.work_pool_name == ensure_deployment(settings())
    assert run.deployment_id == deployment and run.parent_task_run_id is not None
    assert run.parameters == {**run.parameters, **order.parameters}
    assert any("waiting for a worker of pool" in progress.text for progress in seen)
    again = follow(order, tmp_path / "another")
    assert again.checkpoint.exists() and len(runs(client, order)) == 1, "what is stored is not trained again"


def test_a_training_whose_pod_is_evicted_is_started_again(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path
) -> None:
    def done() -> State[None]:
        finish(order, tmp_path / "pod")
        return Completed()

    with worker(client, order, lambda: Crashed(message="the pod was evicted"), done):
        assert follow(order, tmp_path / "here").epochs == 1
    keys = sorted(str(run.idempotency_key) for run in runs(client, order))
    assert keys == [f"{order.key}-1", f"{order.key}-2"]


def test_a_training_that_crashes_again_and_again_is_given_up(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path
) -> None:
    crash = lambda: Crashed(message="out of memory")  # noqa: E731
    with worker(client, order, crash, crash), pytest.raises(ExternalError, match="2 times without a result") as caught:
        follow(order, tmp_path / "here")
    assert "out of memory" in str(caught.value) and f"khet release --resume {order.release_id}" in str(caught.value)


def test_a_failure_is_passed_on_with_its_reason_and_kind(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path
) -> None:
    said = "Flow run encountered an exception: configs.errors.IntegrityError: Dataset tiny: a.jpg is missing.\nNext: x"
    with worker(client, order, lambda: Failed(message=said)), pytest.raises(IntegrityError) as caught:
        follow(order, tmp_path / "here")
    assert "failed: Dataset tiny: a.jpg is missing.\nNext: x" in str(caught.value)


def test_an_interrupted_release_leaves_its_training_and_joins_it_when_it_is_resumed(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path
) -> None:
    def lost() -> None:
        if runs(client, order):
            raise SafetyError("lease lost")

    with pytest.raises(SafetyError, match="lease lost"):
        follow(order, tmp_path / "here", lost)
    [run] = runs(client, order)
    assert run.state_type is StateType.SCHEDULED

    def done() -> State[None]:
        finish(order, tmp_path / "pod")
        return Completed()

    with worker(client, order, done):
        follow(order, tmp_path / "here")
    assert [found.id for found in runs(client, order)] == [run.id]


def test_a_release_that_is_cancelled_ends_its_training(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        if runs(client, order):
            raise SafetyError("lease lost")

    with pytest.raises(SafetyError):
        follow(order, tmp_path / "here", lost)
    [run] = runs(client, order)
    assert cancel_trainings("another-release") == []
    monkeypatch.setenv("KHET_TRAINING__WHERE", "deployment")
    settings.cache_clear()
    cancelled = FlowRun(flow_id=run.flow_id, parameters={"resume": order.release_id})
    hooks.end_training(release, cancelled, Cancelled())
    [run] = runs(client, order)
    assert run.state_type in (StateType.CANCELLING, StateType.CANCELLED)


def test_a_cancelled_training_ends_the_release(
    client: SyncPrefectClient, deployment: UUID, order: Order, tmp_path: Path
) -> None:
    with worker(client, order, Cancelled), pytest.raises(SafetyError, match="was cancelled"):
        follow(order, tmp_path / "here")


def test_without_the_deployment_the_message_says_how_to_make_it(order: Order, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="khet deploy"):
        ensure_deployment(settings())
    with pytest.raises(ConfigError, match="khet deploy"):
        follow(order, tmp_path / "here")


def test_a_pool_that_nobody_made_is_named_before_anything_is_registered(
    client: SyncPrefectClient, deployment: UUID
) -> None:
    pool = str(client.read_deployment(deployment).work_pool_name)
    refuse_missing_pools({pool})
    with pytest.raises(ConfigError, match="no work pool gpu-of-nobody"):
        refuse_missing_pools({pool, "gpu-of-nobody"})


def test_without_a_server_nothing_is_started(order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KHET_ORCHESTRATOR__API_URL")
    settings.cache_clear()
    with pytest.raises(ConfigError, match="no Prefect server is configured"):
        follow(order, tmp_path / "here")


def test_what_is_stored_of_a_training_goes_when_its_release_has_ended_for_good(
    store: ObjectStoreSettings, tmp_path: Path
) -> None:
    objects, bucket = ObjectStore(store), store.models_bucket
    kept: dict[str, Order] = {}
    outcomes: tuple[Outcome, ...] = ("promoted", "gated", "failed", "running")
    for outcome in outcomes:
        kept[outcome] = Order(unique(outcome)[:20], QUICK, "d" * 64)
        record = ReleaseRecord(
            release_id=kept[outcome].release_id, outcome=outcome, started_at=utc_now(), requested_by="t", parameters={}
        )
        Journal.start(objects, bucket, record)
    kept["by hand"] = Order(unique("hand")[:20], QUICK, "d" * 64)
    for order in kept.values():
        finish(order, tmp_path)
    assert {kept["promoted"].release_id, kept["gated"].release_id} == set(tidy_trainings(objects, bucket, RESUMABLE))
    left = {name for name, order in kept.items() if order.stored(settings()).finished() is not None}
    assert left == {"failed", "running", "by hand"}
