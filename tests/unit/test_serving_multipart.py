"""Forms: the file comes out byte for byte, and whatever is no form is a 400."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.serving.multipart import extract_file
from ml.serving.refusals import Refused


def _form(*parts: tuple[str, bytes], boundary: str = "b0und") -> bytes:
    lines = b""
    for name, data in parts:
        lines += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'.encode()
        lines += data + b"\r\n"
    return lines + f"--{boundary}--\r\n".encode()


TYPE = b"multipart/form-data; boundary=b0und"


@given(st.binary(min_size=1, max_size=2000).filter(lambda data: b"--b0und" not in data))
def test_the_file_comes_out_as_it_went_in(data: bytes) -> None:
    assert extract_file(_form(("note", b"x"), ("file", data), ("other", b"y")), TYPE) == data


def test_of_two_files_the_first_is_taken() -> None:
    assert extract_file(_form(("file", b"one"), ("file", b"two")), TYPE) == b"one"


def test_a_quoted_boundary_and_an_odd_case_are_understood() -> None:
    assert extract_file(_form(("file", b"x")), b'Multipart/Form-Data; charset=utf-8; boundary="b0und"') == b"x"


@given(st.binary(max_size=500))
def test_bytes_that_are_no_form_are_a_400(data: bytes) -> None:
    with pytest.raises(Refused) as refused:
        extract_file(data, TYPE)
    assert refused.value.status == 400


@given(st.integers(min_value=0, max_value=len(_form(("file", b"x" * 100))) - 14))
def test_a_form_cut_anywhere_is_a_400(length: int) -> None:
    with pytest.raises(Refused) as refused:
        extract_file(_form(("file", b"x" * 100))[:length], TYPE)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"x" * 5000,
        b"multipart/form-data; boundary=\xff\xfe",
    ],
)
def test_a_useless_boundary_is_a_400(content_type: bytes) -> None:
    with pytest.raises(Refused) as refused:
        extract_file(_form(("file", b"x")), content_type)
    assert refused.value.status == 400


def test_a_part_with_too_many_headers_is_a_400() -> None:
    headers = b"".join(b"X-%d: y\r\n" % index for index in range(50))
    body = b'--b0und\r\nContent-Disposition: form-data; name="file"\r\n' + headers + b"\r\nx\r\n--b0und--\r\n"
    with pytest.raises(Refused):
        extract_file(body, TYPE)
