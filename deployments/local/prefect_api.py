"""The few calls the stack makes to Prefect's REST API, without importing Prefect (seconds of CPU)."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from configs.errors import ExternalError

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PrefectApi:
    """One Prefect API. `auth` is user:password, or None where it asks for none."""

    url: str
    auth: str | None = field(default=None, repr=False)

    def call(self, method: str, path: str, body: Any = None, *, missing_ok: bool = False) -> Any:
        """Send one request and return the decoded answer; None for an empty one, or a 404 with `missing_ok`.

        Raises:
            ExternalError: no answer (retryable), or one that is not a success.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310  (the scheme is ours: http to the stack's own server)
            f"{self.url}{path}", data=data, method=method, headers=self._headers()
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code == 404 and missing_ok:
                return None
            detail = error.read(500).decode(errors="replace")
            raise ExternalError(
                f"prefect: {method} {path} was answered with {error.code}: {detail}", retryable=error.code >= 500
            ) from error
        except (OSError, ValueError) as error:
            raise ExternalError(f"prefect: {method} {self.url}{path} was not answered: {error}") from error

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.auth:
            headers["Authorization"] = "Basic " + base64.b64encode(self.auth.encode()).decode()
        return headers


def ensure_pool(api: PrefectApi, name: str) -> None:
    """Create the process work pool unless it exists. The worker fills in the job template when it first connects."""
    if api.call("GET", f"/work_pools/{name}", missing_ok=True) is not None:
        return
    pool = {"name": name, "type": "process", "description": "Flow runs as processes on this machine (khet up)."}
    try:
        api.call("POST", "/work_pools/", pool)
    except ExternalError as error:
        if "409" not in str(error):  # created meanwhile
            raise


def ensure_automations(api: PrefectApi, heartbeat_s: int) -> None:
    """Create or update the two automations that end runs whose process is gone; a person's enabled/disabled stays."""
    for wanted in automations(heartbeat_s):
        query = {"automations": {"name": {"any_": [wanted["name"]]}}}
        existing = api.call("POST", "/automations/filter", query)
        if not existing:
            api.call("POST", "/automations/", wanted)
        elif not _same(wanted, existing[0]):
            update = wanted | {"enabled": existing[0].get("enabled", True)}
            api.call("PUT", f"/automations/{existing[0]['id']}", update)


def automations(heartbeat_s: int) -> list[dict[str, Any]]:
    """What Prefect itself does not notice: a run whose process and supervisor both died, and one that never starts.

    Every process that runs flows must send heartbeats this often (`flow_environment`): Prefect's default is 180 s.
    """
    # Prefect sends no more than one heartbeat in 30 s, whatever it is asked for.
    silence_s = 3.0 * max(heartbeat_s, 30)
    return [
        _crash_when_silent(
            "khet: crash zombie runs",
            f"A running flow that sends no heartbeat for {silence_s:.0f} s has lost its process.",
            # Running too: a run that dies at once may not have delivered a single heartbeat.
            after=["prefect.flow-run.Running", "prefect.flow-run.heartbeat"],
            within_s=silence_s,
        ),
        _crash_when_silent(
            "khet: crash runs that stay pending",
            "A run that nothing happens to for 600 s after it was handed to a worker will not start any more.",
            after=[f"prefect.flow-run.{s}" for s in ("InfrastructurePending", "Pending", "Submitting")],
            within_s=600.0,
        ),
    ]


def _crash_when_silent(name: str, description: str, after: list[str], within_s: float) -> dict[str, Any]:
    return {
        "name": name,
        "description": description,
        "enabled": True,
        "tags": ["khet"],
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
            "after": after,
            "expect": ["prefect.flow-run.*"],
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": within_s,
        },
        "actions": [{"type": "change-flow-run-state", "state": "CRASHED", "message": description}],
    }


def _same(wanted: dict[str, Any], existing: dict[str, Any]) -> bool:
    trigger, there = wanted["trigger"], existing.get("trigger", {})
    return bool(
        wanted["description"] == existing.get("description")
        and float(there.get("within", -1)) == trigger["within"]
        and sorted(there.get("after", [])) == trigger["after"]
        and there.get("match") == trigger["match"]
    )
