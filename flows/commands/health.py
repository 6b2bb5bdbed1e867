"""`khet doctor`: is everything reachable, and was something left half done?"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable
from typing import Any, Final

from configs.errors import ExternalError, KhetError
from configs.settings import Settings, load_settings
from deployments import local
from flows.commands import rollbacks
from flows.orchestrator import PrefectApi
from flows.terminal import out, print_json

WATCHDOG: Final = "rollout-watchdog"
_MARKS: Final = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failed": "[red]✗[/]", "skipped": "[dim]–[/]"}


def run(*, fix: bool, as_json: bool) -> None:
    """Print every check; with `fix`, finish or undo interrupted releases.

    Raises:
        ExternalError: a check failed.
    """
    checks = _everything()
    checks += [_check(*found) for found in rollbacks.checks(fix=fix)]
    checks += _interrupted(fix) if _store_answers(checks) else [_not_asked()]
    if as_json:
        print_json(checks)
    else:
        show(checks)
    if bad := [check["name"] for check in checks if not check["ok"]]:
        raise ExternalError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}.", retryable=False)


def show(checks: Iterable[dict[str, Any]]) -> None:
    """One line a check, and what to do about those that are not well."""
    for check in checks:
        out.print(f"{_MARKS[check['state']]} {check['name']:<26} ", end="")
        out.print(check["detail"], markup=False)
        if check["state"] != "ok" and check["fix"]:
            out.print(f"    next: {check['fix']}", markup=False)


def cluster_checks(settings: Settings) -> list[dict[str, Any]]:
    """What is asked of a Kubernetes cluster; nothing where replicas run on the local node."""
    if settings.cluster.backend != "kubernetes":
        return []
    from tasks.cluster.kubernetes.inspection import inspect

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        watchdog = pool.submit(_watchdog, settings)
        found = [_check(f"cluster: {one.name}", one.state, one.detail, one.fix) for one in inspect(settings)]
        return [*found, watchdog.result()]


def _watchdog(settings: Settings) -> dict[str, Any]:
    """Nothing in a Kubernetes cluster ends a lost lease by itself: a deployment of Prefect has to."""
    name = "cluster: watchdog"
    wanted = {"deployments": {"name": {"any_": [WATCHDOG]}}}
    try:
        found = PrefectApi(settings).post("/deployments/filter", wanted)
    except KhetError as error:
        return _check(name, "failed", str(error), "khet up")
    if any(schedule["active"] for one in found if not one["paused"] for schedule in one["schedules"]):
        return _check(name, "ok", f"Prefect starts {WATCHDOG} by its schedule")
    said = f"Prefect does not start {WATCHDOG}: the canary of a release that is killed keeps its traffic"
    return _check(name, "warning", said, "`khet deploy` registers it; `khet watchdog` looks once.")


def _everything() -> list[dict[str, Any]]:
    """The stack and the cluster, side by side."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stack = pool.submit(local.doctor)
        cluster = _cluster()
        found = [_check(one.name, "ok" if one.ok else "failed", one.detail, one.fix) for one in stack.result()]
    return found + cluster


def _cluster() -> list[dict[str, Any]]:
    try:
        return cluster_checks(load_settings())
    except KhetError:  # settings that are wrong are the first check of the stack
        return []


def _check(name: str, state: str, detail: str, fix: str = "") -> dict[str, Any]:
    """A check as programs read it: only a failed one is not ok."""
    return {"name": name, "ok": state != "failed", "state": state, "detail": detail, "fix": fix}


def _store_answers(checks: Iterable[dict[str, Any]]) -> bool:
    return any(check["name"] == "object store" and check["ok"] for check in checks)


def _not_asked() -> dict[str, Any]:
    return _check("interrupted releases", "skipped", "not asked: their records are in the object store", "khet up")


def _interrupted(fix: bool) -> list[dict[str, Any]]:
    from flows import recovery
    from flows.session import LEASE_TTL_S
    from flows.systems import systems

    try:
        connected = systems()
        left = recovery.left_behind(connected)
    except KhetError as error:
        return [_check("interrupted releases", "failed", str(error), "khet up")]
    if not left:
        return [_check("interrupted releases", "ok", "none")]
    checks = []
    for record in left:
        name = f"{record.kind} {record.release_id}"
        if not fix:
            intent = f"in the middle of {record.intent.action}" if record.intent else "before it changed anything"
            checks.append(_check(name, "failed", f"interrupted or running, {intent}", "khet doctor --fix"))
            continue
        try:
            done = recovery.recover_under_lease(connected, record, LEASE_TTL_S)
            checks.append(_check(name, "ok", f"was interrupted; {done}"))
        except KhetError as error:
            checks.append(_check(name, "failed", str(error), "wait for it to end, then again"))
    return checks
