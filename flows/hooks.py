"""What happens when a run is cancelled or its process dies.

After a kill the worker runs these in a new process, by keyword: the parameters must be named exactly
`(flow, flow_run, state)`, and nothing of the dead process is left. They may run twice.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from configs.errors import KhetError

_log = logging.getLogger(__name__)


def undo_release(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Undo what a dead run had begun and nobody had judged; finish what was judged."""
    from flows import recovery
    from flows.session import LEASE_TTL_S
    from flows.systems import systems

    release_id = _release_id(flow_run)
    connected = systems()
    try:
        for record in recovery.left_behind(connected):
            if record.release_id == release_id:
                done = recovery.recover_under_lease(connected, record, LEASE_TTL_S)
                _log.warning("release %s: %s", release_id, done)
    except KhetError as error:
        _log.error("release %s could not be recovered: %s. Next: `khet doctor --fix`.", release_id, error)


def end_training(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Cancel what the deployment trains for a release that was cancelled. One that crashed is resumed and joins it."""
    from configs.settings import settings
    from tasks.training.elsewhere import cancel_trainings

    if settings().training.where != "deployment":
        return
    try:
        ended = cancel_trainings(_release_id(flow_run))
    except KhetError as error:
        _log.error("the training of release %s goes on: %s. Next: cancel it.", _release_id(flow_run), error)
    else:
        _log.warning("cancelled %s", ", ".join(ended) or "no training: none was going on")


def _release_id(flow_run: FlowRun) -> str:
    return str((flow_run.parameters or {}).get("resume") or flow_run.id.hex[-10:])
