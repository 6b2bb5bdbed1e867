"""What every `steps.py` shares: retry and cache rules of Prefect tasks, and artifacts that never fail a step."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.tasks import Task, exponential_backoff

from configs.errors import is_retryable

# What an artifact call can fail with: the server is away or refuses. A picture is never worth a release.
_ARTIFACT_ERRORS = (PrefectException, OSError, RuntimeError, ValueError)
RETRY_DELAYS = exponential_backoff(backoff_factor=2)


def retry_external(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Retry only what may succeed when asked again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_retryable(error)


def by_release(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Cache key of a stage: its name and the release it belongs to, so that a resumed release skips what is done."""
    return f"release-{parameters['release_id']}-{context.task.name}"


class ProgressArtifact:
    """One progress bar in the Prefect UI."""

    def __init__(self, key: str, description: str) -> None:
        self._id: UUID | None = None
        try:
            self._id = create_progress_artifact(progress=0.0, key=key, description=description)  # type: ignore[assignment]
        except _ARTIFACT_ERRORS as error:
            _warn(key, error)

    def update(self, fraction: float) -> None:
        """Move the bar to `fraction` of its length."""
        if self._id is None:
            return
        try:
            update_progress_artifact(artifact_id=self._id, progress=round(100 * min(max(fraction, 0.0), 1.0), 1))
        except _ARTIFACT_ERRORS as error:
            _warn("progress", error)


def show_markdown(key: str, markdown: str, description: str) -> None:
    """Put a card into the UI."""
    try:
        create_markdown_artifact(markdown=markdown, key=key, description=description)
    except _ARTIFACT_ERRORS as error:
        _warn(key, error)


def show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    """Put a table into the UI."""
    try:
        create_table_artifact(table=rows, key=key, description=description)
    except _ARTIFACT_ERRORS as error:
        _warn(key, error)


def show_link(key: str, link: str, text: str, description: str) -> None:
    """Put a link into the UI."""
    try:
        create_link_artifact(link=link, link_text=text, key=key, description=description)
    except _ARTIFACT_ERRORS as error:
        _warn(key, error)


def show_picture(key: str, address: str, description: str) -> None:
    """Put a picture into the UI, read from `address` by the browser."""
    try:
        create_image_artifact(image_url=address, key=key, description=description)
    except _ARTIFACT_ERRORS as error:
        _warn(key, error)


def announce(event: str, resource_id: str, name: str, payload: dict[str, Any]) -> None:
    """Send an event that automations may listen for. What matters is recorded elsewhere too: one may get lost."""
    try:
        emit_event(event, {"prefect.resource.id": resource_id, "prefect.resource.name": name}, payload=payload)
    except _ARTIFACT_ERRORS as error:
        get_run_logger().warning("event %s was not sent: %s", event, error)


def _warn(key: str, error: BaseException) -> None:
    get_run_logger().warning("artifact %s was not stored: %s", key, error)
