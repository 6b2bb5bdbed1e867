"""Training as a run of the deployment `train`: on a pod with a GPU, or wherever the pool's worker is.

A release orders a training and follows it. The order's key names the run, so that a release which was interrupted, or a
step that is tried again, joins the training that is going; what the run leaves is in the object store.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import httpx
from prefect import get_run_logger, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelling

from configs.areas import TrainingSettings
from configs.errors import ConfigError, ExternalError, GateError, IntegrityError, KhetError, SafetyError
from configs.settings import Settings, settings
from configs.training import TrainingConfig
from ml.checkpoint_store import Finished, TrainingStore, fingerprint
from ml.results import TrainResult
from tasks.prefect_support import RETRY_DELAYS, by_release, retry_external
from tasks.progress import report
from tasks.training.steps import HOURS, progress_key, training_address

DEPLOYMENT: Final = "train/train"
_KINDS: Final = {
    kind.__name__: kind for kind in (KhetError, ConfigError, GateError, IntegrityError, ExternalError, SafetyError)
}
_REASON: Final = re.compile(r"(?:encountered an exception: )?(?:[\w.]*\.)?(\w+): (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Order:
    """What a release wants trained: its id, the configuration, and the data by the hash of their manifest."""

    release_id: str
    config: TrainingConfig
    dataset_hash: str

    @property
    def key(self) -> str:
        """The same for the same order."""
        return f"train-{self.release_id}-{fingerprint(self.config, self.dataset_hash)}"

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the flow `train`."""
        return {
            "resume": self.release_id,
            "values": self.config.model_dump(mode="json"),
            "dataset_hash": self.dataset_hash,
        }

    def stored(self, current: Settings) -> TrainingStore:
        """Where the training keeps its states and its result."""
        run = fingerprint(self.config, self.dataset_hash)
        return TrainingStore.at(training_address(current, self.release_id), run, current.object_store)


@task(
    name="train",
    task_run_name="train-{release_id}",
    persist_result=True,
    cache_key_fn=by_release,
    retries=4,
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=retry_external,
    timeout_seconds=48 * HOURS,
)
def train_elsewhere(release_id: str, order: Order, folder: Path, guard: Callable[[], None]) -> TrainResult:  # noqa: ARG001
    """Have `order` trained by the deployment, unless it was, and bring the result into `folder`, checked.

    `guard` is called at every look and raises when this release must not go on.

    Raises:
        ConfigError: there is no such deployment, or no server that knows it.
        KhetError: what the training ended with.
        ExternalError: it crashed too often, or the server does not answer; the training itself goes on then.
    """
    current = settings()
    kept = order.stored(current)
    found = kept.finished()
    if found is None:
        _refuse_without_server(current)
        with _errors_of_prefect():
            found = _Follower(order, kept, current.training, guard).follow()
    report("train", "running", "bringing the result here", 1.0)
    return kept.bring_result(found, folder)


class _Follower:
    """Starts the deployment, or joins its run, until the result is there."""

    def __init__(self, order: Order, kept: TrainingStore, wanted: TrainingSettings, guard: Callable[[], None]) -> None:
        self._order, self._kept, self._wanted, self._guard = order, kept, wanted, guard
        self._logger = get_run_logger()

    def follow(self) -> Finished:
        """The result of the training. A run that crashed is followed by another, which goes on from its checkpoint."""
        with get_client(sync_client=True) as client:
            for _ in range(self._wanted.attempts):
                run = self._watch(client, self._join_or_start(client))
                if run.state_type is StateType.COMPLETED and (found := self._kept.finished()) is not None:
                    return found
                if run.state_type in (StateType.FAILED, StateType.CANCELLED):
                    raise _error_of(run)
                self._logger.warning("training run %s ended: %s", run.name, _message(run))
        raise ExternalError(
            f"The training of {self._order.release_id} ended {self._wanted.attempts} times without a result; the last "
            f"time: {_message(run)}. Its checkpoints are kept in {self._kept.address}; production is unchanged.\n"
            f"Next: look at {run.name} in the Prefect UI, then `khet release --resume {self._order.release_id}`.",
            retryable=False,
        )

    def _join_or_start(self, client: SyncPrefectClient) -> FlowRun:
        earlier = _runs(client, self._order.key)
        for run in earlier:
            if run.state is not None and not run.state.is_final():
                self._logger.info("joining training run %s", run.name)
                return run
        number = len(earlier) + 1  # the same number gives the same run, should two start it at once
        # Called outside of an event loop it answers with the run itself.
        run = cast(
            FlowRun,
            run_deployment(
                DEPLOYMENT,
                parameters=self._order.parameters,
                tags=[release_tag(self._order.release_id), self._order.key],
                idempotency_key=f"{self._order.key}-{number}",
                timeout=0,
            ),
        )
        self._logger.info("started training run %s in work pool %s", run.name, run.work_pool_name)
        return run

    def _watch(self, client: SyncPrefectClient, run: FlowRun) -> FlowRun:
        """The run as it ended."""
        while True:
            self._guard()
            run = client.read_flow_run(run.id)
            if run.state is not None and run.state.is_final():
                return run
            fraction = _fraction(client, run, self._order.release_id)
            where = f"waiting for a worker of pool {run.work_pool_name}" if fraction is None else run.name
            report("train", "running", where, fraction)
            time.sleep(self._wanted.poll_s)


def cancel_trainings(release_id: str) -> list[str]:
    """Ask every training that a release ordered and that still goes on to end; returns the names of the runs.

    Raises:
        ExternalError: the server does not answer.
    """
    with _errors_of_prefect(), get_client(sync_client=True) as client:
        going = [r for r in _runs(client, release_tag(release_id)) if r.state is None or not r.state.is_final()]
        for run in going:
            client.set_flow_run_state(run.id, Cancelling(message=f"release {release_id} ended"))
        return [run.name for run in going]


def run_is_cancelled(flow_run_id: str) -> bool:
    """Whether somebody asked for the end of a flow run.

    Raises:
        ExternalError: the server does not answer.
    """
    with _errors_of_prefect(), get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
        return any(run.state_type in (StateType.CANCELLING, StateType.CANCELLED) for run in found)


def ensure_deployment(current: Settings) -> str:
    """The work pool of the deployment.

    Raises:
        ConfigError: there is no such deployment, or no server that knows it.
    """
    _refuse_without_server(current)
    with _errors_of_prefect(), get_client(sync_client=True) as client:
        return str(client.read_deployment_by_name(DEPLOYMENT).work_pool_name)


def release_tag(release_id: str) -> str:
    """The tag of every training that a release ordered."""
    return f"release:{release_id}"


def _refuse_without_server(current: Settings) -> None:
    if current.orchestrator.api_url is None:
        raise ConfigError(
            "training.where is deployment, but no Prefect server is configured that could run it. Nothing was started."
            "\nNext: `khet up`, set KHET_ORCHESTRATOR__API_URL, or train here (KHET_TRAINING__WHERE=here)."
        )


def _runs(client: SyncPrefectClient, tag: str) -> list[FlowRun]:
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
    return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC)


def _fraction(client: SyncPrefectClient, run: FlowRun, release_id: str) -> float | None:
    """How far the run's own progress artifact says it is, in [0, 1]; None before there is one."""
    wanted = ArtifactFilter(
        key=ArtifactFilterKey(any_=[progress_key(release_id)]), type=ArtifactFilterType(any_=["progress"])
    )
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    found = client.read_artifacts(artifact_filter=wanted, flow_run_filter=of_run, limit=1)
    return float(found[0].data) / 100.0 if found else None  # type: ignore[arg-type]


def _error_of(run: FlowRun) -> KhetError:
    """What the run ended with, as the error that it was there."""
    said = _message(run)
    if run.state_type is StateType.CANCELLED:
        return SafetyError(
            f"Training run {run.name} was cancelled. Its checkpoints are kept; production is unchanged.\n"
            "Next: `khet release --resume` of this release starts it again from there."
        )
    match = _REASON.search(said)
    kind = _KINDS.get(match[1], ExternalError) if match else ExternalError
    text = f"Training run {run.name} failed: {match[2] if match and match[1] in _KINDS else said}"
    return ExternalError(text, retryable=False) if issubclass(kind, ExternalError) else kind(text)


def _message(run: FlowRun) -> str:
    return (run.state.message if run.state else None) or str(run.state_name)


@contextlib.contextmanager
def _errors_of_prefect() -> Iterator[None]:
    try:
        yield
    except ObjectNotFound as error:
        raise ConfigError(
            f"The Prefect server has no deployment {DEPLOYMENT}. Nothing was started.\nNext: `khet deploy`."
        ) from error
    except (PrefectException, httpx.HTTPError) as error:
        raise ExternalError(
            f"The Prefect server did not answer as it should: {error}. What trains goes on, and is joined by the next "
            "try.\nNext: `khet status`."
        ) from error
