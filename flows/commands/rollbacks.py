"""`khet rollback`: run the flow in this terminal, show what served before, and what `khet doctor` says about both."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from configs.errors import KhetError
from configs.settings import settings
from flows.commands.running import run_flow, view
from flows.orchestrator import connect_or_go_alone
from flows.terminal import err, out, print_json, print_table

if TYPE_CHECKING:
    from flows.history import History, HistoryRow
    from flows.systems import Systems


def rollback(parameters: dict[str, Any], *, as_json: bool) -> None:
    """Run the rollback flow here."""
    if not connect_or_go_alone(settings()):
        err.print("The Prefect server does not answer: this run is recorded in the cluster and the audit log alone.")
    with view(as_json):
        from flows.rollback import rollback as flow

        record = run_flow(flow, parameters)
    if as_json:
        print_json(record)
    elif record.outcome == "dry_run":
        out.print(record.diff, markup=False)
        out.print(f"Dry run: rollback to {record.version}, nothing was changed. The steps are listed above.")
    else:
        out.print(f"[bold green]{record.version} serves all traffic.[/] {'; '.join(record.reasons)}")


def show_history(*, as_json: bool) -> None:
    """Which versions served, newest first; every one is held against its signed manifest."""
    from flows.books import Books
    from flows.history import read_history
    from flows.systems import systems

    found = read_history(Books(systems()))
    if as_json:
        print_json(found)
        return
    columns = ["version", "since (UTC)", "by", "why", "switch took", "verifies", ""]
    print_table("Versions that served production", columns, [_cells(row) for row in found.rows])
    for sentence in _notes(found):
        out.print(sentence, markup=False)


def _cells(row: HistoryRow) -> list[object]:
    verdict = {True: "yes", False: f"no: {row.problem}", None: None}[row.verifies]
    took = None if row.took_s is None else f"{row.took_s:.1f} s"
    kept = f"{row.kept_ready} replica(s) warm until {row.kept_until:%H:%M}" if row.kept_until else None
    return [
        row.version,
        f"{row.at:%Y-%m-%d %H:%M}",
        row.by,
        row.reason,
        took,
        verdict,
        "serves" if row.serves else kept,
    ]


def _notes(found: History) -> list[str]:
    notes = []
    if found.registry != "answers":
        notes.append(f"This is what the cluster remembers; the registry does not answer: {found.registry}")
    if found.pending is not None:
        notes.append(f"The rollback to {found.pending.version} is not finished: `khet doctor --fix` does it.")
    return notes


def checks(*, fix: bool) -> list[tuple[str, str, str, str]]:
    """What the cluster remembers as unfinished, and what it keeps warm: name, state, detail and what to do. Nothing
    where the cluster does not answer, which other checks tell."""
    from flows.systems import systems

    with contextlib.suppress(KhetError):
        connected = systems()
        return [*_unfinished(connected, fix=fix), *_kept(connected)]
    return []


def _unfinished(connected: Systems, *, fix: bool) -> list[tuple[str, str, str, str]]:
    from flows import recovery
    from flows.session import LEASE_TTL_S

    what = recovery.unsettled(connected)
    if not what:
        return []
    if not fix:
        return [("rollback", "failed", f"not finished: {what}", "khet doctor --fix")]
    try:
        return [("rollback", "ok", recovery.settle_under_lease(connected, LEASE_TTL_S), "")]
    except KhetError as error:
        return [("rollback", "failed", f"{what}: {error}", "khet doctor --fix, as soon as that is well")]


def _kept(connected: Systems) -> list[tuple[str, str, str, str]]:
    from tasks.cluster import Track

    status, kept = connected.cluster.status(), connected.cluster.memory().kept
    replicas = [replica for replica in status.replicas if replica.track is Track.previous]
    if kept is None or Track.previous not in status.versions:
        return []
    ready = sum(replica.ready for replica in replicas)
    detail = f"{kept.version} until {kept.until:%Y-%m-%d %H:%M} UTC, {ready} of {len(replicas)} replica(s) ready"
    state = "ok" if replicas and ready == len(replicas) else "warning"
    return [("kept warm", state, detail, "khet status shows the replicas; a rollback would start new ones")]
