"""`khet release`, `train` and `approve`: run a flow in this terminal and follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from configs.errors import ConfigError, ExternalError, KhetError
from configs.settings import settings
from flows.orchestrator import PrefectApi, connect
from flows.terminal import ReleaseView, out, print_json, shown_path


def release(parameters: dict[str, Any], *, as_json: bool) -> None:
    """Run the release flow here; the Prefect UI shows the same run."""
    connect(settings(), quiet=True)
    with view(as_json):
        from flows.release import release as flow

        record = run_flow(flow, parameters)
    if as_json:
        print_json(record)
        return
    if record.outcome == "dry_run":
        out.print(record.diff, markup=False)
        out.print(f"Dry run: release of {record.version}, nothing was changed. The steps are listed above.")
        return
    from flows.reporting import report_file

    out.print(f"[bold green]{record.version} serves all traffic.[/] {'; '.join(record.reasons)}")
    out.print(f"Report       {shown_path(report_file(record.release_id))}")
    show_where()


def train(parameters: dict[str, Any], *, as_json: bool) -> None:
    """Run the training flow here."""
    connect(settings(), quiet=True)
    with view(as_json):
        from flows.train import train as flow

        training = run_flow(flow, parameters)
    if as_json:
        print_json(training)
        return
    if training.outcome == "dry_run":
        out.print(f"Dry run: nothing was changed. It would be kept in {training.address}.", markup=False)
        return
    out.print(f"Validation accuracy {training.val_accuracy:.1%} after {training.epochs} epochs.", markup=False)
    out.print(f"Stored       {training.address}", markup=False)
    out.print(f"Here         {shown_path(training.folder)}", markup=False)


def approve(release_id: str | None, *, approve: bool, comment: str) -> None:
    """Answer a paused release."""
    api = PrefectApi(settings())
    run = api.find_flow_run(release_id) if release_id else _only(api.paused_releases())
    if run["state_type"] != "PAUSED":
        raise ConfigError(f"{run['name']} does not wait for anybody: it is {run['state_name']}.")
    api.resume(run["id"], {"approve": approve, "comment": comment})
    out.print(f"{run['name']}: {'approved' if approve else 'declined'}")


def _only(paused: list[dict[str, Any]]) -> dict[str, Any]:
    if len(paused) != 1:
        names = ", ".join(run["name"] for run in paused) or "none"
        raise ConfigError(f"Name the release to answer; those that wait: {names}.")
    return paused[0]


def run_flow(flow: Any, parameters: dict[str, Any]) -> Any:
    """Call the flow; its KhetErrors pass through, Prefect's own become one."""
    from prefect.exceptions import PrefectException

    try:
        return flow(**{name: value for name, value in parameters.items() if value is not None})
    except KhetError:
        raise
    except PrefectException as error:
        raise ExternalError(f"Prefect did not run the flow: {error}. Next: `khet doctor`.") from error


@contextlib.contextmanager
def view(as_json: bool) -> Iterator[None]:
    """Follow the flow on the terminal, unless a program reads."""
    if as_json:
        yield
        return
    with ReleaseView():
        yield


def show_where() -> None:
    """Where to look next."""
    current = settings()
    if api := current.orchestrator.api_url:
        out.print(f"Prefect UI   {api.removesuffix('/api')}")
    if gateway := current.cluster.gateway_url:
        out.print(f"Service      {gateway}/predict   (khet predict photo.jpg)")
