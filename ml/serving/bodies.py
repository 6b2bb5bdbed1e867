"""Read request bodies within limits: size, time, and memory over all requests together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

from configs.areas import ServingSettings
from ml.serving.refusals import Refused, unavailable

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MULTIPART: Final = b"multipart/form-data"
_RAW_TYPES: Final = (b"image/", b"application/octet-stream", b"binary/octet-stream")
# Memory for bodies of all requests together, in bodies of the largest size allowed.
_LARGEST_BODIES_AT_ONCE: Final = 8
# What is thrown away so that a client which sends before it listens still gets to read its answer.
_LINGER_BYTES: Final = 256_000_000


# A copy of a request, whose answer nobody gets: counted apart from what users asked.
SHADOW: Final = "shadow"
SHADOW_HEADER: Final = b"x-khet-shadow"
# Who asked, as the prediction log keeps it: copies for a canary and replayed holdout photos are no users' photos, and
# whoever judges drift by the log must be able to leave them out.
_SOURCES: Final = {SHADOW_HEADER: SHADOW, b"x-khet-probe": "probe"}


@dataclass(frozen=True, slots=True)
class Head:
    """The headers this service looks at; empty where a request has none."""

    content_type: bytes
    content_length: bytes
    content_encoding: bytes
    request_id: bytes
    source: str = "user"


def read_head(scope: Scope) -> Head:
    """Pick them in one pass."""
    content_type = content_length = content_encoding = request_id = b""
    source = "user"
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value
        elif name == b"content-length":
            content_length = value
        elif name == b"content-encoding":
            content_encoding = value
        elif name == b"x-request-id":
            request_id = value
        elif name in _SOURCES:
            source = _SOURCES[name]
    return Head(content_type, content_length, content_encoding, request_id, source)


class Body:
    """The body of one request while it comes in. `complete`: nothing of it is left unread."""

    __slots__ = ("complete", "data", "held")

    def __init__(self) -> None:
        self.data = b""
        self.held = 0
        self.complete = False


class Bodies:
    """Reads bodies; knows how much memory all unfinished requests hold."""

    def __init__(self, limits: ServingSettings) -> None:
        self._max_bytes = limits.max_body_bytes
        self._timeout_s = limits.body_timeout_s
        self._budget = _LARGEST_BODIES_AT_ONCE * limits.max_body_bytes
        self.held_bytes = 0

    async def read(self, head: Head, receive: Receive, body: Body) -> None:
        """Fill `body`. What it holds counts until `release`, also when this raises.

        Raises:
            Refused: 400 empty, 408 too slow, 413 too large, 415 not an image's type, 503 no memory left for bodies.
        """
        self._check_head(head)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                while not body.complete:
                    chunks.append(await self._chunk(receive, body))
        except TimeoutError:
            detail = f"The body did not arrive within {self._timeout_s:g} s."
            raise Refused(408, "body_timeout", detail, ((b"connection", b"close"),)) from None
        body.data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if not body.data:
            raise Refused(400, "empty", "The body is empty: send the bytes of one photo.")

    def release(self, body: Body) -> None:
        """The request is over: its memory is free again."""
        self.held_bytes -= body.held
        body.held = 0

    async def linger(self, receive: Receive) -> None:
        """Throw the rest of a refused body away, within limits: a closed connection would hide the answer."""
        left = _LINGER_BYTES
        try:
            async with asyncio.timeout(self._timeout_s):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return  # slow and refused already: the connection is closed

    def _check_head(self, head: Head) -> None:
        if head.content_length.isdigit():
            self._check_size(int(head.content_length))
        if head.content_encoding not in (b"", b"identity"):
            raise Refused(415, "content_encoding", "Send the photo as it is, without a Content-Encoding.")
        if head.content_type and not head.content_type.lower().startswith((*_RAW_TYPES, MULTIPART)):
            raise Refused(
                415,
                "content_type",
                "Send the photo's bytes as image/jpeg, image/png, image/webp or application/octet-stream, "
                "or as multipart/form-data with a field `file`.",
            )

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise Refused(413, "too_large", f"The body is larger than {self._max_bytes:,} bytes.")

    async def _chunk(self, receive: Receive, body: Body) -> bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            body.complete = True
            raise Refused(499, "client_closed", "The client went away before its body was complete.")
        chunk: bytes = message.get("body", b"")
        body.complete = not message.get("more_body", False)
        body.held += len(chunk)
        self.held_bytes += len(chunk)
        self._check_size(body.held)
        if self.held_bytes > self._budget:
            raise unavailable("busy", "Too many large bodies are being received. Try again shortly.")
        return chunk
