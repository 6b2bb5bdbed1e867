"""The control API: JSON over HTTP, a bearer token on everything but /healthz. `tasks.cluster.local_node` is its client.

    POST /v1/deploy /v1/weights /v1/lease /v1/scale /v1/restart /v1/remove /v1/rollback    bodies: see state.py
    GET  /v1/memory    POST /v1/memory    the next revision; {"kept": false} where another was kept since
    GET  /v1/status /v1/room /v1/counters /v1/ready?track= /v1/logs?track=&lines= /v1/events?limit= /v1/shadow-examples
    POST /shutdown    ends every replica and the node; answers when the replicas have ended

Errors are {"error": <name of the KhetError>, "message": ...}: 400 ConfigError, 409 SafetyError, 503 ExternalError.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from configs.base import explain
from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from ml.results import Record
from tasks.cluster import Track
from tasks.cluster.memory import Memory
from tasks.cluster.node import state
from tasks.cluster.node.counters import Counters, Histogram
from tasks.cluster.node.node import Node, bound_name

RecordT = TypeVar("RecordT", bound=Record)
_STATUS = {ConfigError: 400, SafetyError: 409, ExternalError: 503}
_MAX_LINES = 2_000


def application(node: Node, token: str, shutdown: Callable[[], Awaitable[None]]) -> web.Application:
    """The API of `node`; `shutdown` ends its replicas and, soon after it returns, the process."""
    api = _Api(node, shutdown)
    app = web.Application(middlewares=[_errors, _authorised(token)], client_max_size=65_536)
    app.add_routes(
        [
            web.get("/healthz", api.healthz),
            web.post("/v1/deploy", api.deploy),
            web.post("/v1/weights", api.weights),
            web.post("/v1/lease", api.lease),
            web.post("/v1/scale", api.scale),
            web.post("/v1/restart", api.restart),
            web.post("/v1/remove", api.remove),
            web.post("/v1/rollback", api.rollback),
            web.get("/v1/memory", api.memory),
            web.post("/v1/memory", api.remember),
            web.get("/v1/status", api.status),
            web.get("/v1/room", api.room),
            web.get("/v1/counters", api.counters),
            web.get("/v1/ready", api.ready),
            web.get("/v1/logs", api.logs),
            web.get("/v1/events", api.events),
            web.get("/v1/shadow-examples", api.shadow_examples),
            web.post("/shutdown", api.shutdown),
        ]
    )
    return app


class _Api:
    def __init__(self, node: Node, shutdown: Callable[[], Awaitable[None]]) -> None:
        self._node = node
        self._shutdown = shutdown

    async def healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def deploy(self, request: web.Request) -> web.Response:
        call = await _body(request, state.DeployCall)
        return await _done(self._node.deploy(call.track, call.version, call.replicas))

    async def weights(self, request: web.Request) -> web.Response:
        call = await _body(request, state.WeightsCall)
        return await _done(self._node.set_weights(call.weights, call.mirror, call.lease_s))

    async def lease(self, request: web.Request) -> web.Response:
        call = await _body(request, state.LeaseCall)
        return await _done(self._node.renew_lease(call.lease_s))

    async def scale(self, request: web.Request) -> web.Response:
        call = await _body(request, state.ScaleCall)
        return await _done(self._node.scale(call.track, call.replicas))

    async def restart(self, request: web.Request) -> web.Response:
        call = await _body(request, state.RestartCall)
        return await _done(self._node.restart(call.track, call.key))

    async def remove(self, request: web.Request) -> web.Response:
        call = await _body(request, state.RemoveCall)
        return await _done(self._node.remove(call.track))

    async def rollback(self, request: web.Request) -> web.Response:
        call = await _body(request, state.RollbackCall)
        return await _done(self._node.rollback(call.version, call.replicas))

    async def status(self, _request: web.Request) -> web.Response:
        desired = self._node.desired.model_dump(mode="json", exclude={"memory"})
        return web.json_response({"desired": desired, "replicas": self._node.replica_rows()})

    async def memory(self, _request: web.Request) -> web.Response:
        return web.json_response(self._node.desired.memory.model_dump(mode="json"))

    async def remember(self, request: web.Request) -> web.Response:
        return web.json_response({"kept": await self._node.remember(await _body(request, Memory))})

    async def room(self, _request: web.Request) -> web.Response:
        return web.json_response({"replicas": await self._node.room()})

    async def counters(self, _request: web.Request) -> web.Response:
        return web.json_response({track: _counters(kept) for track, kept in self._node.counters().items()})

    async def ready(self, request: web.Request) -> web.Response:
        return web.json_response(asdict(self._node.readiness(_track(request))))

    async def logs(self, request: web.Request) -> web.Response:
        lines = _number(request, "lines", 100, _MAX_LINES)
        return web.json_response({"text": self._node.logs(_track(request), lines)})

    async def events(self, request: web.Request) -> web.Response:
        latest = self._node.events(_number(request, "limit", 100, _MAX_LINES))
        return web.json_response([event.model_dump(mode="json") for event in latest])

    async def shadow_examples(self, _request: web.Request) -> web.Response:
        examples = [example for kept in self._node.counters().values() for example in kept.examples]
        return web.json_response([{**asdict(example), "at": example.at.isoformat()} for example in examples])

    async def shutdown(self, _request: web.Request) -> web.Response:
        await self._shutdown()
        return web.json_response({"status": "stopped"})


def _authorised(token: str) -> Any:
    wanted = f"Bearer {token}".encode()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        sent = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path != "/healthz" and not hmac.compare_digest(sent, wanted):
            return _error(401, "ConfigError", "the node's token is missing or wrong (cluster.node_token)")
        return await handler(request)

    return middleware


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except KhetError as error:
        return _error(_STATUS.get(type(error), 500), type(error).__name__, str(error))


def _error(status: int, name: str, message: str) -> web.Response:
    return web.json_response({"error": name, "message": message}, status=status)


async def _done(work: Awaitable[None]) -> web.Response:
    await work
    return web.json_response({"status": "ok"})


async def _body(request: web.Request, model: type[RecordT]) -> RecordT:
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        raise ConfigError(f"{explain(error, request.path)}\nNothing was changed.") from error


def _track(request: web.Request) -> Track:
    named = request.query.get("track", "")
    if named not in tuple(Track):
        raise ConfigError(f"track={named!r}: no such track (known: {', '.join(Track)})")
    return Track(named)


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    sent = request.query.get(name, str(default))
    if not sent.isdecimal() or not 1 <= int(sent) <= most:
        raise ConfigError(f"{name}={sent!r}: expected a number from 1 to {most}")
    return int(sent)


def _counters(kept: Counters) -> dict[str, Any]:
    return {
        "version": kept.version,
        "since": kept.since.isoformat(),
        "requests": kept.requests,
        "errors": kept.errors,
        "latency_ms": _histogram(kept.latency),
        "predictions": kept.predictions,
        "ood": kept.ood,
        "classes": kept.classes,
        "shadow_pairs": kept.shadow_pairs,
        "shadow_differ": kept.shadow_differ,
        "shadow_errors": kept.shadow_errors,
        "shadow_latency_ms": _histogram(kept.shadow_latency),
        "shadow_ood": kept.shadow_ood,
        "shadow_classes": kept.shadow_classes,
        "shadow_by_class": {told: [pairs, kept.differ_by_class[told]] for told, pairs in kept.pairs_by_class.items()},
    }


def _histogram(histogram: Histogram) -> dict[str, int]:
    return {bound_name(bound): count for bound, count in histogram.cumulative().items()}
