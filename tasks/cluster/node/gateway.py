"""The data plane: one address for users, requests shared among tracks and replicas.

What a user's `POST /predict` meets, in this order:

1. A track, by weight; requests of the same `X-Khet-User` stay on one. `X-Khet-Track` together with the node's token
   (`Authorization: Bearer ...`) pins one instead.
2. Its ready replica with the fewest requests in flight. Where the connection breaks, no answer comes in time, or the
   replica answers 503, another replica of the track is asked (predicting changes nothing, so asking twice is safe).
3. If the track is not stable and gave no answer below 500, a stable replica is asked as in 2. So users never see a
   canary's failure while stable works. The failure is charged to the canary all the same, once an attempt.
4. When no stable replica is ready the request waits a moment for one, then gets 503 with Retry-After.

A pinned request stops after 2 and gets what the track answered. A stable replica's 5xx other than 503 is returned as it
is. Every answer carries X-Request-Id and, when a replica gave it, X-Khet-Track and X-Model-Version.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import TransferEncodingError
from multidict import CIMultiDict

from tasks.cluster import Track
from tasks.cluster.node.answers import Prediction, read_prediction
from tasks.cluster.node.fleet import Fleet, Replica
from tasks.cluster.node.mirror import Book, Copy, Mirror
from tasks.cluster.node.routing import Router
from tasks.cluster.node.upstream import Answer, BrokenError
from tasks.cluster.sticky import USER_HEADER

TRACK_HEADER = "X-Khet-Track"
SHADOW_HEADER = "X-Khet-Shadow"
_PASSED_ON = ("/version", "/metadata")
_PATIENCE_S = 3.0  # a replica that was killed is back within about this time
_MAX_BUFFERED_BYTES = 256_000_000
_MULTIPART_BYTES = 65_536  # what a form may add to the largest image
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")  # what the replicas accept, too
_NOT_FORWARDED = frozenset(
    (b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"te", b"trailer", b"upgrade",
     b"expect", b"proxy-connection", b"x-request-id", b"x-khet-track", b"x-khet-shadow")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what the gateway takes in."""

    max_body_bytes: int
    body_timeout_s: float
    request_timeout_s: float
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was read whole. `head` ends before the empty line, so that headers can be added."""

    request_id: str
    head: bytes
    body: bytes
    pinned: Track | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and who gave it. `prediction`: what it says; None where that is not counted."""

    answer: Answer
    by: Replica
    prediction: Prediction | None = None


class RefusedError(Exception):
    """The gateway itself answers: `status`, a word for programs and a sentence for people."""

    def __init__(self, status: int, error: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.error = error


class Gateway:
    """Handles the requests of the data port."""

    def __init__(
        self,
        fleet: Fleet,
        router: Router,
        book: Book,
        mirror: Mirror,
        limits: Limits,
        token: str,
        metrics: Callable[[], str],
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._book = book
        self._mirror = mirror
        self._limits = limits
        self._token = b"Bearer " + token.encode()
        self._metrics = metrics
        self._buffered = 0
        self.in_flight = 0
        self.rejected: dict[str, int] = {"overload": 0, "no_replica": 0}
        self.retries = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request of the data port; never raises for what a client or a replica did."""
        sent = request.headers.get("X-Request-Id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        try:
            return await self._answer(request, request_id)
        except RefusedError as refused:
            return _refusal(refused, request_id)

    async def _answer(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        path, method = request.path, request.method
        if path == "/predict":
            if method != "POST":
                raise RefusedError(405, "method_not_allowed", "Use POST with the bytes of a photo.")
            return await self._predict(request, request_id)
        if method not in ("GET", "HEAD"):
            raise RefusedError(405, "method_not_allowed", "Use GET.")
        if path == "/healthz":
            return web.json_response({"status": "ok", "ready": {t: self._fleet.ready_count(t) for t in Track}})
        if path == "/metrics":
            return web.Response(text=self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})
        if path in _PASSED_ON:
            return await self._pass_on(request, request_id)
        raise RefusedError(404, "not_found", "Predictions are at POST /predict.")

    async def _predict(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        pinned = self._pinned(request)
        limit = self._limits.max_body_bytes + _MULTIPART_BYTES
        expected = limit if request.content_length is None else request.content_length
        if expected > limit:
            raise RefusedError(413, "too_large", f"The body is larger than {self._limits.max_body_bytes} bytes.")
        self._admit(self._buffered + expected <= _MAX_BUFFERED_BYTES)
        self._buffered += expected
        try:
            body = await self._read(request, limit)
            user = request.headers.get(USER_HEADER)
            call = Call(request_id, _head(request, request_id, "POST", len(body)), body, pinned, user)
            served = await self._serve_one_of_few(call)
        finally:
            self._buffered -= expected
        self._copy(call, served)
        return _response(served, request_id)

    def _admit(self, has_room: bool) -> None:
        if not has_room:
            self.rejected["overload"] += 1
            raise RefusedError(503, "overloaded", "Too many requests are in flight.")

    async def _serve_one_of_few(self, call: Call) -> Served:
        self._admit(self.in_flight < self._limits.max_in_flight)
        self.in_flight += 1
        try:
            return await self._serve(call)
        finally:
            self.in_flight -= 1

    async def _pass_on(self, request: web.BaseRequest, request_id: str) -> web.StreamResponse:
        """A question about the model, to the one track that answers everybody, else to stable (or the pinned one); not
        counted."""
        replica = self._fleet.pick(self._pinned(request) or self._router.main)
        if replica is None:
            raise RefusedError(503, "unavailable", "No replica is ready.")
        head = _head(request, request_id, "GET", 0) + b"\r\n"
        try:
            answer = await replica.pool.send(head, b"", self._limits.request_timeout_s)
        except (BrokenError, TimeoutError) as error:
            replica.check_now.set()
            raise RefusedError(502, "bad_gateway", "The replica did not answer.") from error
        return _response(Served(answer, replica), request_id)

    def _pinned(self, request: web.BaseRequest) -> Track | None:
        named = request.headers.get(TRACK_HEADER)
        if named is None:
            return None
        sent = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(sent, self._token):
            raise RefusedError(403, "forbidden", f"{TRACK_HEADER} needs the node's token.")
        if named not in tuple(Track):
            raise RefusedError(400, "bad_request", f"{TRACK_HEADER}: no such track.")
        return Track(named)

    async def _read(self, request: web.BaseRequest, limit: int) -> bytes:
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                return await _read_up_to(request, limit)
        except TimeoutError as error:
            detail = f"The body was not here after {self._limits.body_timeout_s:g} s."
            raise RefusedError(408, "timeout", detail) from error
        except (OSError, web.PayloadAccessError, TransferEncodingError, ClientPayloadError) as error:
            raise RefusedError(400, "bad_body", "The body broke off, or is not what its headers say.") from error

    async def _serve(self, call: Call) -> Served:
        """The answer a user gets; see the module's text.

        Raises:
            RefusedError: no replica answered.
        """
        track = call.pinned or self._router.choose(time.monotonic(), call.user)
        served = await self._ask(track, call)
        if not call.pinned:
            if track is not Track.stable and (served is None or served.answer.status >= 500):
                self.retries += 1
                served = await self._ask(Track.stable, call) or served
            served = served or await self._ask_when_ready(call)
        if served is None:
            self.rejected["no_replica"] += 1
            raise RefusedError(503, "unavailable", "No replica answered.")
        return served

    async def _ask_when_ready(self, call: Call) -> Served | None:
        """One more attempt as soon as a stable replica is there: a killed one is back within seconds."""
        if not self._fleet.on(Track.stable):
            return None
        replica = await self._fleet.wait_for(Track.stable, _PATIENCE_S)
        if replica is None:
            return None
        self.retries += 1
        return await self._attempt(replica, call)

    async def _ask(self, track: Track, call: Call) -> Served | None:
        """Up to two replicas of a track; None when neither answered at all."""
        first = self._fleet.pick(track)
        if first is None:
            if track is not Track.stable:
                self._book(track, None).failed("unavailable")
            return None
        served = await self._attempt(first, call)
        if served is not None and served.answer.status != 503:
            return served
        second = self._fleet.pick(track, avoid=first)
        if second is None:
            return served
        self.retries += 1
        return await self._attempt(second, call) or served

    async def _attempt(self, replica: Replica, call: Call) -> Served | None:
        """Ask one replica and charge its track. None: no answer."""
        counters = self._book(replica.record.track, replica)
        began = time.monotonic()
        replica.in_flight += 1
        try:
            answer = await replica.pool.send(call.head + b"\r\n", call.body, self._limits.request_timeout_s)
        except BrokenError:
            counters.failed("broken")
            replica.suspect()
            return None
        except TimeoutError:
            counters.failed("timeout", (time.monotonic() - began) * 1e3)
            replica.check_now.set()
            return None
        finally:
            replica.in_flight -= 1
        counters.answered(answer.status, (time.monotonic() - began) * 1e3)
        prediction = _prediction(call, answer)
        if prediction is not None:
            counters.predicted(prediction)
        return Served(answer, replica, prediction)

    def _copy(self, call: Call, served: Served) -> None:
        """Offer the request to mirrored tracks, now that the user's answer is known."""
        if call.pinned or served.answer.status != 200:
            return
        for track in self._router.copies(served.by.record.track, time.monotonic()):
            head = call.head + f"{SHADOW_HEADER}: 1\r\n\r\n".encode()
            copy = Copy(call.request_id, head, call.body, served.by.record.version, served.prediction)
            self._mirror.offer(track, copy)


def _prediction(call: Call, answer: Answer) -> Prediction | None:
    """What a user was told. Not for pinned requests: who pins chose both photo and track, and would shift a track's
    mix of classes away from that of its share of the users."""
    return read_prediction(answer.body) if answer.status == 200 and call.pinned is None else None


async def _read_up_to(request: web.BaseRequest, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await request.content.readany():
        size += len(chunk)
        if size > limit:
            raise RefusedError(413, "too_large", f"The body is larger than {limit} bytes.")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _head(request: web.BaseRequest, request_id: str, method: str, length: int) -> bytes:
    """Request line and headers for a replica, without the empty line at the end."""
    query = request.rel_url.raw_query_string
    target = request.rel_url.raw_path + (f"?{query}" if query else "")
    lines = [f"{method} {target} HTTP/1.1\r\nHost: replica\r\nContent-Length: {length}\r\n".encode("latin-1")]
    pinned = TRACK_HEADER in request.headers
    for name, value in _forwarded(request.raw_headers, drop_token=pinned):
        lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(f"X-Request-Id: {request_id}\r\n".encode("latin-1"))
    return b"".join(lines)


def _forwarded(headers: Sequence[tuple[bytes, bytes]], *, drop_token: bool) -> list[tuple[bytes, bytes]]:
    """A client's headers that a replica may see; the node's token never is one."""
    kept = [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]
    return [(n, v) for n, v in kept if n.lower() != b"authorization"] if drop_token else kept


def _response(served: Served, request_id: str) -> web.Response:
    headers = CIMultiDict(served.answer.headers)
    headers["X-Request-Id"] = request_id
    headers[TRACK_HEADER] = served.by.record.track.value
    headers["X-Model-Version"] = served.by.record.version
    return web.Response(status=served.answer.status, body=served.answer.body, headers=headers)


def _refusal(refused: RefusedError, request_id: str) -> web.Response:
    headers = {"X-Request-Id": request_id}
    if refused.status == 503:
        headers["Retry-After"] = "1"
    if refused.status == 405:
        headers["Allow"] = "POST" if "POST" in str(refused) else "GET, HEAD"
    body = {"error": refused.error, "detail": str(refused), "request_id": request_id}
    return web.json_response(body, status=refused.status, headers=headers)
