"""`/predict` in the OpenAPI document. Its route is plain ASGI, so it is described here by hand."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI

from configs.areas import ServingSettings

_ANSWER_EXAMPLE: Final = {
    "class": "late_blight",
    "probability": 0.91,
    "top_k": [
        {"class": "late_blight", "probability": 0.91},
        {"class": "early_blight", "probability": 0.06},
        {"class": "healthy", "probability": 0.02},
    ],
    "is_leaf": True,
    "ood_score": -6.2,
    "model_version": "v1.3.0",
    "request_id": "0f6a3d0c4c6b4f0e9d6f0c9b7a5e4d3c",
}
_RANKED: Final = {
    "type": "object",
    "required": ["class", "probability"],
    "properties": {
        "class": {"type": "string"},
        "probability": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_SCHEMAS: Final = {
    "RankedClass": _RANKED,
    "Prediction": {
        "type": "object",
        "required": [*_ANSWER_EXAMPLE],
        "properties": {
            "class": {"type": "string", "description": "The most likely class."},
            "probability": {"type": "number", "description": "Its calibrated probability."},
            "top_k": {"type": "array", "items": {"$ref": "#/components/schemas/RankedClass"}},
            "is_leaf": {"type": "boolean", "description": "False: the photo is unlike the training data."},
            "ood_score": {"type": "number", "description": "Energy score; larger is less like a leaf."},
            "model_version": {"type": "string"},
            "request_id": {"type": "string", "description": "Also in the header X-Request-Id."},
        },
    },
    "Error": {
        "type": "object",
        "required": ["error", "detail", "request_id"],
        "properties": {
            "error": {"type": "string", "description": "For machines.", "examples": ["truncated"]},
            "detail": {"type": "string", "description": "For people."},
            "request_id": {"type": "string"},
        },
    },
}
_PHOTO: Final = {"schema": {"type": "string", "format": "binary"}}
_FORM: Final = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary"}},
    }
}
_ERRORS: Final = {
    400: ("Empty body, or a form without a part named file.", "empty", "The body is empty: send a photo."),
    405: ("Not a POST.", "method_not_allowed", "Use POST with the bytes of a photo."),
    408: ("The body came too slowly.", "body_timeout", "The body did not arrive within 15 s."),
    413: ("Too many bytes or pixels.", "too_large", "The body is larger than 12,000,000 bytes."),
    415: ("Not an image, or not sent as one.", "not_an_image", "The bytes are no JPEG, PNG, WebP or BMP image."),
    422: ("A damaged or tiny image.", "truncated", "The image is cut short or damaged."),
    500: ("The model failed.", "internal", "The prediction failed; the log of this replica says why."),
    503: ("Busy, still loading: see Retry-After.", "busy", "66 requests are waiting already. Try again shortly."),
}


def describe_predict(api: FastAPI, limits: ServingSettings) -> None:
    """Make `api.openapi()` list `/predict` beside the other routes."""
    generate = api.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document["paths"]["/predict"] = {"post": _operation(limits)}
        document.setdefault("components", {}).setdefault("schemas", {}).update(_SCHEMAS)
        return document

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document


def _operation(limits: ServingSettings) -> dict[str, Any]:
    types = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    return {
        "tags": ["model"],
        "operationId": "predict",
        "summary": "Tell what is wrong with the leaf on a photo",
        "description": (
            f"At most {limits.max_body_bytes:,} bytes and {limits.max_pixels:,} pixels. "
            "`curl --data-binary @leaf.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8080/predict` or "
            "`curl -F file=@leaf.jpg http://127.0.0.1:8080/predict`"
        ),
        "parameters": [
            {
                "name": "X-Request-Id",
                "in": "header",
                "required": False,
                "description": "Letters, digits, `.`, `_`, `:` and `-`, at most 64; another one is replaced.",
                "schema": {"type": "string", "maxLength": 64},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {**dict.fromkeys(types, _PHOTO), "multipart/form-data": _FORM},
        },
        "responses": {"200": _success(), **{str(code): _error(*text) for code, text in _ERRORS.items()}},
    }


def _success() -> dict[str, Any]:
    text = {"schema": {"type": "string"}}
    schema = {"$ref": "#/components/schemas/Prediction"}
    return {
        "description": "The prediction.",
        "headers": {"X-Request-Id": text, "X-Model-Version": text},
        "content": {"application/json": {"schema": schema, "example": _ANSWER_EXAMPLE}},
    }


def _error(description: str, error: str, detail: str) -> dict[str, Any]:
    example = {"error": error, "detail": detail, "request_id": _ANSWER_EXAMPLE["request_id"]}
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": description, "content": {"application/json": {"schema": schema, "example": example}}}
