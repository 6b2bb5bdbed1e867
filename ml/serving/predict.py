"""`POST /predict` and what every answer has: request id, version, counters. Plain ASGI, because it runs each time."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any, Final

import orjson

from ml.images import ImageRejected
from ml.serving.bodies import SHADOW, SHADOW_HEADER, Body, Head, Message, Receive, Scope, Send, read_head
from ml.serving.refusals import Refused, refuse_image
from ml.serving.service import Photo, Service

logger = logging.getLogger(__name__)
PREDICT: Final = "/predict"
# What a client may choose as its id: short, and harmless in a header, a log line and a file.
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_JSON: Final = (b"content-type", b"application/json")


def choose_request_id(offered: bytes) -> str:
    """The client's id where it is a sane one, else a new one."""
    if offered and _REQUEST_ID.fullmatch(offered):
        return offered.decode("ascii")
    return uuid.uuid4().hex


def error_body(error: str, detail: str, request_id: str) -> bytes:
    """The JSON of every error."""
    return orjson.dumps({"error": error, "detail": detail, "request_id": request_id})


class Front:
    """The outermost layer: answers `/predict` itself, hands everything else on, counts both.

    `known_paths` bound the `path` label; every other path is counted as `other`.
    """

    def __init__(self, app: Any, service: Service, known_paths: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._known_paths = known_paths
        self._version = service.identity.version.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        path: str = scope["path"]
        self._service.in_flight += 1
        status = 500
        try:
            if path == PREDICT:
                status = await self._predict(scope, receive, send, started)
            else:
                status = await self._hand_on(scope, receive, send)
        finally:
            self._service.in_flight -= 1
            self._service.metrics.request_finished(status, self._label(scope), time.perf_counter() - started)

    def _label(self, scope: Scope) -> str:
        path: str = scope["path"]
        if path == PREDICT and any(name == SHADOW_HEADER for name, _ in scope["headers"]):
            return SHADOW
        return path if path in self._known_paths else "other"

    async def _predict(self, scope: Scope, receive: Receive, send: Send, started: float) -> int:
        head = read_head(scope)
        request_id = choose_request_id(head.request_id)
        body = Body()
        try:
            answer = await self._answer(scope, head, receive, body, request_id, started)
        except Refused as refused:
            return await self._refuse(send, receive, refused, request_id, body)
        except ImageRejected as rejected:
            return await self._refuse(send, receive, refuse_image(rejected), request_id, body)
        except Exception:  # the replica survives whatever one photo does to the model
            logger.exception("Request %s failed.", request_id)
            failed = Refused(500, "internal", "The prediction failed; the log of this replica says why.")
            return await self._refuse(send, receive, failed, request_id, body)
        finally:
            self._service.bodies.release(body)
        await self._send(send, 200, answer, request_id)
        return 200

    async def _answer(
        self, scope: Scope, head: Head, receive: Receive, body: Body, request_id: str, started: float
    ) -> bytes:
        if scope["method"] != "POST":
            raise Refused(405, "method_not_allowed", "Use POST with the bytes of a photo.", ((b"allow", b"POST"),))
        await self._service.bodies.read(head, receive, body)
        return await self._service.predict(Photo(body.data, head.content_type, request_id, started, head.source))

    async def _refuse(self, send: Send, receive: Receive, refused: Refused, request_id: str, body: Body) -> int:
        """Answer at once; where the body is still coming, swallow it before the connection is closed."""
        answer = error_body(refused.error, str(refused), request_id)
        if body.complete or refused.status == 405:
            await self._send(send, refused.status, answer, request_id, refused.headers)
            return refused.status
        headers = (*refused.headers, (b"connection", b"close")) if refused.status != 408 else refused.headers
        await self._send(send, refused.status, answer, request_id, headers, more=True)
        if refused.status != 408:
            await self._service.bodies.linger(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return refused.status

    async def _send(
        self,
        send: Send,
        status: int,
        answer: bytes,
        request_id: str,
        extra: tuple[tuple[bytes, bytes], ...] = (),
        *,
        more: bool = False,
    ) -> None:
        headers = [_JSON, (b"content-length", b"%d" % len(answer)), *self._stamp(request_id), *extra]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer, "more_body": more})

    def _stamp(self, request_id: str) -> tuple[tuple[bytes, bytes], ...]:
        stamp = ((b"x-request-id", request_id.encode("ascii")), (b"x-model-version", self._version))
        # A client that keeps its connection would send its next request just when this replica closes it.
        return (*stamp, (b"connection", b"close")) if self._service.draining else stamp

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> int:
        request_id = choose_request_id(read_head(scope).request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._stamp(request_id)]
            await send(message)

        await self._app(scope, receive, stamped)
        return status
