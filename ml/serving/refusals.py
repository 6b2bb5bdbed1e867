"""Requests that are answered with an error: one exception, one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from configs.errors import GateError
from ml.images import ImageRejected

# RFC 9110: 413 too large, 415 another format, 422 the right format with unusable content.
_IMAGE_STATUS: Final[Mapping[str, int]] = {
    "empty": 400,
    "not_an_image": 415,
    "truncated": 422,
    "too_small": 422,
    "too_many_pixels": 413,
}
RETRY_AFTER_S: Final = 1


class Refused(GateError):  # noqa: N818  (reads as the state it reports)
    """This request gets `status` and nothing is predicted. `error` is for machines, the message for people."""

    def __init__(self, status: int, error: str, detail: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(detail)
        self.status = status
        self.error = error
        self.headers = headers


def refuse_image(rejected: ImageRejected) -> Refused:
    """The answer to bytes that are no acceptable image."""
    return Refused(_IMAGE_STATUS.get(rejected.reason, 422), rejected.reason, str(rejected))


def unavailable(error: str, detail: str) -> Refused:
    """503: not now; the client may try again, here or at another replica."""
    return Refused(503, error, detail, ((b"retry-after", str(RETRY_AFTER_S).encode()),))
