"""`khet up`, `down` and `status`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from configs.errors import ConfigError, ExternalError
from configs.settings import load_settings, local_file
from deployments import local
from deployments.local import PartEvent, StackState
from flows.terminal import err, out, print_json, print_table

_MARKS = {"running": "[green]●[/]", "starting": "[yellow]●[/]", "failed": "[red]●[/]", "stopped": "[dim]○[/]"}


@contextlib.contextmanager
def live(*, quiet: bool) -> Iterator[Callable[[PartEvent], None]]:
    """Print what happens to each part as it happens."""

    def show_event(event: PartEvent) -> None:
        if not quiet:
            err.print(f"  {_MARKS.get(event.state, '·')} {event.part:<15} ", end="")
            err.print(f"{event.state:<9} {event.elapsed_s:5.1f} s  {event.detail}".rstrip(), markup=False)

    yield show_event


def show(state: StackState, *, as_json: bool) -> None:
    """The parts of the stack, and where to look."""
    if as_json:
        print_json(state)
        return
    rows = [
        [
            f"{_MARKS.get(part.state, '·')} {part.name}",
            part.state,
            part.address,
            part.pid,
            _age(part.since),
            part.restarts,
        ]
        for part in state.parts
    ]
    print_table("Local stack", ["part", "state", "address", "pid", "up for", "restarts"], rows)
    current = load_settings()
    if api := current.orchestrator.api_url:
        asks = f" (asks for orchestrator.auth_string of {local_file()})" if current.orchestrator.auth_string else ""
        out.print(f"Prefect UI   {api.removesuffix('/api')}{asks}")
    if gateway := current.cluster.gateway_url:
        out.print(f"Predictions  {gateway}/predict")


def show_status(*, as_json: bool) -> None:
    """The stack, the replicas and the traffic."""
    state = local.status()
    traffic = _traffic()
    if as_json:
        print_json({"stack": state, "cluster": traffic})
        return
    show(state, as_json=False)
    if isinstance(traffic, str):
        out.print(traffic, markup=False)
        return
    rows = [
        [
            r.name,
            r.track.value,
            r.version,
            "ready" if r.ready else "not ready",
            f"{traffic.weights.get(r.track, 0):.0%}",
            r.address,
        ]
        for r in traffic.replicas
    ]
    print_table("Replicas", ["replica", "track", "version", "state", "track's traffic", "address"], rows)
    if traffic.lease_expires_at:
        out.print(f"The canary's traffic is held until {traffic.lease_expires_at:%H:%M:%S} UTC unless it is renewed.")


def _traffic() -> Any:
    """The cluster's status, or a sentence that says why there is none."""
    from tasks.cluster import cluster

    try:
        return cluster(load_settings()).status()
    except (ConfigError, ExternalError) as error:
        return f"No cluster status: {error}"


def _age(since: datetime | None) -> str:
    if since is None:
        return "–"
    minutes, rest = divmod(int((datetime.now(UTC) - since).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s"
