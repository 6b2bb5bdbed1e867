"""The FastAPI application: the small routes, the OpenAPI document, and `Front` around them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from ml.serving import metrics
from ml.serving.openapi import describe_predict
from ml.serving.predict import PREDICT, Front, error_body
from ml.serving.refusals import RETRY_AFTER_S
from ml.serving.service import Service

KNOWN_PATHS: Final = frozenset(
    (PREDICT, "/healthz", "/readyz", "/metrics", "/metadata", "/version", "/docs", "/openapi.json")
)


def build_app(service: Service) -> Any:
    """The ASGI application of one replica."""
    api = FastAPI(
        title="Khet Guard: leaf disease model",
        version=service.identity.version,
        description="Send a photo of a leaf, get the most likely disease. One replica serves one model version.",
        redoc_url=None,
        exception_handlers={HTTPException: _answer_error, Exception: _answer_error},
    )
    _add_probes(api, service)
    _add_descriptions(api, service)
    describe_predict(api, service.limits)
    return Front(api, service, KNOWN_PATHS)


def _add_probes(api: FastAPI, service: Service) -> None:
    @api.get("/healthz", tags=["probes"], summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @api.get(
        "/readyz",
        tags=["probes"],
        summary="Traffic may be sent here",
        responses={503: {"description": "The model is still being loaded, or the replica is about to stop."}},
    )
    async def readyz() -> Response:
        if service.ready:
            return _json({"status": "ready"})
        status = "draining" if service.draining else "loading"
        return _json({"status": status}, 503, {"retry-after": str(RETRY_AFTER_S)})

    @api.get("/metrics", tags=["probes"], summary="Counters in the Prometheus text format", response_class=Response)
    async def read_metrics() -> Response:
        return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)


def _add_descriptions(api: FastAPI, service: Service) -> None:
    @api.get("/version", tags=["model"], summary="Which version this replica serves")
    async def version() -> Response:
        identity = service.identity
        return _json(
            {"version": identity.version, "replica": identity.replica, "started_at": identity.started_at.isoformat()}
        )

    @api.get(
        "/metadata",
        tags=["model"],
        summary="What the model says about itself, and its lineage",
        responses={503: {"description": "The model is still being loaded."}},
    )
    async def metadata() -> Response:
        if service.model is None:
            raise HTTPException(503, "The model is still being loaded.", {"retry-after": str(RETRY_AFTER_S)})
        model = service.model
        about = model.metadata.model_dump(mode="json")
        return _json({"version": service.identity.version, "model": about, "manifest": model.manifest})


async def _answer_error(request: Request, error: Exception) -> Response:
    """Unknown path, wrong method and the like, in the same form as every other error."""
    status, detail, headers = 500, "This replica failed; its log says why.", None
    if isinstance(error, HTTPException):
        status, detail, headers = error.status_code, str(error.detail), error.headers
    name = HTTPStatus(status).phrase.lower().replace(" ", "_")
    body = error_body(name, detail, request.scope["state"]["request_id"])
    return Response(body, status, dict(headers or {}), media_type="application/json")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")
