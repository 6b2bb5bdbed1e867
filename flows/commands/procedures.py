"""`khet rolling-update`, `blue-green`, `ab-test`, `scale`, `restart` and `watchdog`: run a flow in this terminal."""

from __future__ import annotations

import importlib
from typing import Any, Final

from configs.settings import settings
from flows.commands.running import run_flow, view
from flows.orchestrator import connect
from flows.terminal import out, print_json

_MODULES: Final = {"scale": "scaling", "restart": "scaling"}


def run(name: str, parameters: dict[str, Any], *, as_json: bool) -> None:
    """Run one of the procedures and say how it ended."""
    connect(settings(), quiet=True)
    with view(as_json):
        record = run_flow(_flow(name), parameters)
    if as_json:
        print_json(record)
        return
    if record.diff and record.outcome == "dry_run":
        out.print(record.diff, markup=False)
    ended = "Dry run, nothing was changed" if record.outcome == "dry_run" else record.outcome.replace("_", " ")
    out.print(f"{ended}: {'; '.join(record.reasons)}", markup=False)


def watch(parameters: dict[str, Any], *, as_json: bool) -> None:
    """Run the watchdog once."""
    connect(settings(), quiet=True)
    with view(as_json):
        from flows.watchdog import rollout_watchdog

        found = run_flow(rollout_watchdog, parameters)
    if as_json:
        print_json(found)
        return
    verb = "would: " if parameters["dry_run"] else ""
    for sentence in (*found.done, *found.failed) or ("all is well",):
        out.print(f"{verb if found.done or found.failed else ''}{sentence}", markup=False)


def _flow(name: str) -> Any:
    """Imported here: `khet --help` must not wait for Prefect."""
    return getattr(importlib.import_module(f"flows.{_MODULES.get(name, name)}"), name)
