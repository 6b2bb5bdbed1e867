"""The process worker as a program: `python -m deployments.local.worker POOL NAME`.

Prefect's own command line does the same after several more seconds of CPU for parts of it that are not used here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from configs.errors import ExternalError
from deployments.local.prefect_api import PrefectApi

# Runs wait for a free place when this many are under way: a paused release keeps its place while it waits for a person.
CONCURRENT_RUNS = 6
_POLL_S = 0.25


async def serve(pool: str, name: str) -> None:
    """Run flows of `pool` until SIGTERM or SIGINT. Prefect is imported while its server still starts."""
    from prefect.workers.process import ProcessWorker

    wait_for_pool(PrefectApi(os.environ["PREFECT_API_URL"], os.environ.get("PREFECT_API_AUTH_STRING")), pool)
    worker = ProcessWorker(work_pool_name=pool, name=name, limit=CONCURRENT_RUNS, create_pool_if_not_found=False)
    running = asyncio.ensure_future(worker.start())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    await asyncio.wait([running])
    if not running.cancelled():
        running.result()


def wait_for_pool(api: PrefectApi, pool: str) -> None:
    """Return when the server answers and has the pool."""
    while True:
        try:
            if api.call("GET", f"/work_pools/{pool}", missing_ok=True) is not None:
                return
        except ExternalError as error:
            if not error.retryable:
                raise
        time.sleep(_POLL_S)


def main() -> None:
    """Entry point."""
    pool, name = sys.argv[1:]
    asyncio.run(serve(pool, name))


if __name__ == "__main__":
    main()
