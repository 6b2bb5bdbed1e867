"""Point this process at the Prefect server before `prefect` is imported, and speak to its API where no flow runs."""

from __future__ import annotations

import os
import time
from typing import Any

import httpx

from configs.errors import ConfigError, ExternalError
from configs.settings import Settings, home

_TIMEOUT_S = 10.0
_SILENT_AFTER_S = 3.0
# A run is PAUSED a moment before its question is stored, and refuses answers until then.
_RESUME_PAUSES_S = (0.5, 1.0, 2.0)


def prefect_environment(settings: Settings) -> dict[str, str]:
    """The variables a process needs to report to the configured server."""
    area = settings.orchestrator
    values = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(area.heartbeat_s),
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # a restarting server is waited for, 62 s in all
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the default of 20 s is too short on a busy machine
    }
    if area.api_url:
        values["PREFECT_API_URL"] = area.api_url
    if area.auth_string:
        values["PREFECT_API_AUTH_STRING"] = area.auth_string.get_secret_value()
    return values


def connect(settings: Settings, *, quiet: bool) -> None:
    """Set the environment of this process; `quiet` keeps Prefect's log lines off the terminal (the UI has them)."""
    for name, value in prefect_environment(settings).items():
        os.environ.setdefault(name, value)
    if quiet:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")


def connect_or_go_alone(settings: Settings) -> bool:
    """`connect`, or where the server is silent let this process be its own: what users wait for does not wait for
    Prefect. False: the run will be in no UI."""
    url = settings.orchestrator.api_url
    alone = url is not None and not _is_up(url)
    if alone:
        os.environ.pop("PREFECT_API_URL", None)
        area = settings.orchestrator.model_copy(update={"api_url": None})
        settings = settings.model_copy(update={"orchestrator": area})
    connect(settings, quiet=True)
    return not alone


def _is_up(api_url: str) -> bool:
    try:
        return httpx.get(f"{api_url.rstrip('/')}/health", timeout=_SILENT_AFTER_S).is_success
    except httpx.HTTPError:
        return False


class PrefectApi:
    """The few calls of the REST API that the terminal makes without importing prefect."""

    def __init__(self, settings: Settings) -> None:
        area = settings.orchestrator
        if area.api_url is None:
            raise ConfigError("No Prefect server is configured. Next: `khet up`, or set KHET_ORCHESTRATOR__API_URL.")
        user, _, password = (area.auth_string.get_secret_value() if area.auth_string else "").partition(":")
        auth = (user, password) if user else None
        self._client = httpx.Client(base_url=area.api_url, timeout=_TIMEOUT_S, auth=auth)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST and return the JSON answer.

        Raises:
            ExternalError: no answer, or a refusal.
        """
        try:
            answer = self._client.post(path, json=body)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ExternalError(f"The Prefect server did not accept {path}: {error}. Next: `khet status`.") from error
        return answer.json() if answer.content else None

    def find_flow_run(self, release_id: str) -> dict[str, Any]:
        """The flow run of a release, by the id that its name carries.

        Raises:
            ConfigError: there is none.
        """
        names = {"name": {"any_": [f"release-{release_id}"]}}
        found = self.post("/flow_runs/filter", {"flow_runs": names, "limit": 1})
        if not found:
            raise ConfigError(f"Prefect knows no run of release {release_id}. `khet releases` lists them.")
        return dict(found[0])

    def paused_releases(self) -> list[dict[str, Any]]:
        """Flow runs that wait for a person, newest first."""
        states = {"state": {"type": {"any_": ["PAUSED"]}}, "name": {"like_": "release-"}}
        return list(self.post("/flow_runs/filter", {"flow_runs": states, "sort": "START_TIME_DESC", "limit": 20}))

    def resume(self, flow_run_id: str, answer: dict[str, Any]) -> None:
        """Answer the question a paused run asks.

        Raises:
            ExternalError: the server refused the answer (it says so with HTTP 200).
        """
        for pause_s in (*_RESUME_PAUSES_S, None):
            result = self.post(f"/flow_runs/{flow_run_id}/resume", {"run_input": answer}) or {}
            if result.get("status") in ("ACCEPT", None):
                return
            if pause_s is not None:
                time.sleep(pause_s)
        reason = (result.get("details") or {}).get("reason", "no reason given")
        raise ExternalError(f"The answer was not accepted: {reason}. The release still waits.", retryable=False)
