"""Take the field `file` out of a multipart/form-data body that is in memory already (RFC 7578)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ml.serving.refusals import Refused

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD: Final = b"file"
_MAX_HEADERS: Final = 16


class _FileField:
    """Collects the bytes of the first part named `file`; other parts are skipped."""

    def __init__(self) -> None:
        self.found = False
        self.ended = False
        self.chunks: list[bytes] = []
        self._name = b""
        self._value = b""
        self._wanted = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition" and not self.found:
            _, options = parse_options_header(self._value)
            self._wanted = self.found = options.get(b"name") == FIELD
        self._name = self._value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            self.chunks.append(data[start:end])

    def on_part_end(self) -> None:
        self.ended = self.ended or self._wanted
        self._wanted = False


def extract_file(body: bytes, content_type: bytes) -> bytes:
    """The bytes of the part named `file`.

    Raises:
        Refused: 400, the form is malformed, cut short, or has no such part; or the part is empty.
    """
    _, options = parse_options_header(content_type)
    field = _FileField()
    try:
        parser = MultipartParser(options.get(b"boundary", b""), _callbacks(field), max_header_count=_MAX_HEADERS)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refused(400, "malformed_form", f"The multipart form cannot be read: {error}.") from error
    if not field.found:
        raise Refused(400, "no_file", "The form has no part named `file`. Try: curl -F file=@photo.jpg")
    if not field.ended:
        raise Refused(400, "malformed_form", "The multipart form ends in the middle of `file`.")
    if not (data := b"".join(field.chunks)):
        raise Refused(400, "empty", "The part `file` is empty.")
    return data


def _callbacks(field: _FileField) -> MultipartCallbacks:
    return {
        "on_header_field": field.on_header_field,
        "on_header_value": field.on_header_value,
        "on_header_end": field.on_header_end,
        "on_part_data": field.on_part_data,
        "on_part_end": field.on_part_end,
    }
