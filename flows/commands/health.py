"""`khet doctor`: is everything reachable, and was something left half done?"""

from __future__ import annotations

from typing import Any

from configs.errors import ExternalError, KhetError
from deployments import local
from flows.terminal import out, print_json


def run(*, fix: bool, as_json: bool) -> None:
    """Print every check; with `fix`, finish or undo interrupted releases.

    Raises:
        ExternalError: a check failed.
    """
    checks = [_plain(check) for check in local.doctor()]
    checks += _interrupted(fix)
    if as_json:
        print_json(checks)
    else:
        for check in checks:
            mark = "[green]✓[/]" if check["ok"] else "[red]✗[/]"
            out.print(f"{mark} {check['name']:<26} ", end="")
            out.print(check["detail"], markup=False)
            if not check["ok"] and check["fix"]:
                out.print(f"    next: {check['fix']}", markup=False)
    if bad := [check["name"] for check in checks if not check["ok"]]:
        raise ExternalError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}.", retryable=False)


def _plain(check: Any) -> dict[str, Any]:
    return {"name": check.name, "ok": check.ok, "detail": check.detail, "fix": check.fix}


def _interrupted(fix: bool) -> list[dict[str, Any]]:
    from flows import recovery
    from flows.session import LEASE, LEASE_TTL_S
    from flows.systems import systems

    try:
        connected = systems()
        left = recovery.left_behind(connected)
    except KhetError as error:
        return [{"name": "interrupted releases", "ok": False, "detail": str(error), "fix": "khet up"}]
    if not left:
        return [{"name": "interrupted releases", "ok": True, "detail": "none", "fix": ""}]
    checks = []
    for record in left:
        name = f"release {record.release_id}"
        if not fix:
            intent = f"in the middle of {record.intent.action}" if record.intent else "before it changed anything"
            checks.append(
                {"name": name, "ok": False, "detail": f"interrupted or running, {intent}", "fix": "khet doctor --fix"}
            )
            continue
        try:
            done = recovery.recover_under_lease(connected, record, LEASE, LEASE_TTL_S)
            checks.append({"name": name, "ok": True, "detail": f"was interrupted; {done}", "fix": ""})
        except KhetError as error:
            checks.append({"name": name, "ok": False, "detail": str(error), "fix": "wait for it to end, then again"})
    return checks
