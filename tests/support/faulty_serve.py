"""The model's service with faults around it, for tests of what guards users from a bad canary.

    FAULTY_VERSION=v1.1.0 FAULTY_LATENCY_MS=300 FAULTY_ERROR_SHARE=0.1 python -m tests.support.faulty_serve --port 8080

Takes the arguments of `python -m ml.serve`. Faults only hit `/predict`, and only where MODEL_VERSION is FAULTY_VERSION.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from typing import Any

from ml.serve import main

_FAILURE = b'{"error":"internal","detail":"A fault on purpose.","request_id":""}'


class Faults:
    """ASGI layer: waits `latency_s`, then answers 500 for a share of the predictions."""

    def __init__(self, app: Any, latency_s: float, error_share: float, seed: int = 0) -> None:
        self._app = app
        self._latency_s = latency_s
        self._error_share = error_share
        self._random = random.Random(seed)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self._app(scope, receive, send)
            return
        await asyncio.sleep(self._latency_s)
        if self._random.random() < self._error_share:
            await _fail(receive, send)
        else:
            await self._app(scope, receive, send)


async def _fail(receive: Any, send: Any) -> None:
    while (await receive()).get("more_body", False):
        continue
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_FAILURE))]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": _FAILURE, "more_body": False})


def add_faults(app: Any) -> Any:
    """Wrap the app as the environment says; unchanged where another version is served."""
    if os.environ.get("FAULTY_VERSION") != os.environ.get("MODEL_VERSION"):
        return app
    latency_s = float(os.environ.get("FAULTY_LATENCY_MS", "0")) / 1000
    return Faults(app, latency_s, float(os.environ.get("FAULTY_ERROR_SHARE", "0")))


if __name__ == "__main__":
    sys.exit(main(wrap=add_faults))
