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
    """Take the canary of a dead run away, or finish the promotion it had begun."""
    from flows import recovery
    from flows.session import LEASE, LEASE_TTL_S
    from flows.systems import systems

    release_id = (flow_run.parameters or {}).get("resume") or flow_run.id.hex[-10:]
    connected = systems()
    try:
        for record in recovery.left_behind(connected):
            if record.release_id == release_id:
                done = recovery.recover_under_lease(connected, record, LEASE, LEASE_TTL_S)
                _log.warning("release %s: %s", release_id, done)
    except KhetError as error:
        _log.error("release %s could not be recovered: %s. Next: `khet doctor --fix`.", release_id, error)
