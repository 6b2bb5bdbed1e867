"""What clients of a replica can rely on, asked of a real process over real sockets."""

from __future__ import annotations

import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tasks.cluster.exposition import read_replica
from tests.support.replica import Replica, error_of, launch, photo, running, wait_until
from tests.support.tiny_model import CLASSES, write_tiny_model

VERSION = "v1.2.3"
MAX_BODY_BYTES = 1_000_000
# Small limits, so that exceeding them is quick.
LIMITS = {
    "MODEL_VERSION": VERSION,
    "KHET_SERVING__MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    "KHET_SERVING__BODY_TIMEOUT_S": "1.0",
    "KHET_SERVING__TOP_K": "3",
}


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    tmp = tmp_path_factory.mktemp("serve")
    write_tiny_model(tmp / "model")
    with running(tmp, ["--model", str(tmp / "model"), "--name", "replica-a"], LIMITS) as started:
        yield started
        assert started.get("/healthz").status_code == 200, "the replica must survive every test of this file"
        assert started.terminate() == 0


@pytest.fixture
def address(replica: Replica) -> tuple[str, int]:
    host, port = replica.url.removeprefix("http://").split(":")
    return host, int(port)


def test_a_photo_gets_the_whole_answer(replica: Replica) -> None:
    answer = replica.predict(photo(1), **{"x-request-id": "scan-42"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"] == "scan-42"
    assert answer.headers["x-model-version"] == VERSION
    body = answer.json()
    assert set(body) == {"class", "probability", "top_k", "is_leaf", "ood_score", "model_version", "request_id"}
    assert body["class"] in CLASSES
    assert body["top_k"][0] == {"class": body["class"], "probability": body["probability"]}
    ranked = [entry["probability"] for entry in body["top_k"]]
    assert len(ranked) == 3
    assert ranked == sorted(ranked, reverse=True)
    assert 0.0 < sum(ranked) <= 1.0 + 1e-6
    assert body["is_leaf"] is True
    assert body["model_version"] == VERSION
    assert body["request_id"] == "scan-42"


def test_a_form_gets_the_same_answer_as_the_raw_body(replica: Replica) -> None:
    data = photo(2)
    raw = replica.predict(data).json()
    fields = [("note", ("note.txt", b"from the field\r\n--not a boundary")), ("file", ("leaf.jpg", data))]
    form = replica.client.post(replica.url + "/predict", files=fields).json()
    assert {**form, "request_id": ""} == {**raw, "request_id": ""}


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "BMP"])
def test_other_formats_are_predicted(replica: Replica, format_name: str) -> None:
    sink = io.BytesIO()
    Image.open(io.BytesIO(photo(3))).save(sink, format_name)
    assert replica.predict(sink.getvalue(), "application/octet-stream").status_code == 200


def test_a_body_without_a_content_type_is_taken_as_a_photo(replica: Replica) -> None:
    request = replica.client.build_request("POST", replica.url + "/predict", content=photo(4))
    request.headers.pop("content-type", None)
    assert replica.client.send(request).status_code == 200


def test_a_chunked_body_is_predicted(replica: Replica) -> None:
    data = photo(5)
    parts = (data[start : start + 500] for start in range(0, len(data), 500))
    answer = replica.client.post(replica.url + "/predict", content=parts, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 200


@pytest.mark.parametrize("offered", ["", "-starts-with-a-dash", "x" * 65, "two words", "semi;colon", "<script>"])
def test_a_strange_request_id_is_replaced(replica: Replica, offered: str) -> None:
    answer = replica.predict(photo(1), **{"x-request-id": offered})
    assert answer.status_code == 200
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


def _bomb(width: int, height: int) -> bytes:
    """A valid PNG header that promises far more pixels than it carries."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _tiny_jpeg() -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8)))


REFUSED = {
    "empty body": (b"", "image/jpeg", 400, "empty"),
    "random bytes": (np.random.default_rng(0).bytes(20_000), "image/jpeg", 415, "not_an_image"),
    "text as an image": (b"hello", "image/png", 415, "not_an_image"),
    "truncated JPEG": (photo(1)[:-400], "image/jpeg", 422, "truncated"),
    "only a JPEG's magic": (b"\xff\xd8\xff\xe0", "image/jpeg", 422, "truncated"),
    "8 px JPEG": (_tiny_jpeg(), "image/jpeg", 422, "too_small"),
    "decompression bomb": (_bomb(50_000, 50_000), "image/png", 413, "too_many_pixels"),
    "too many bytes": (photo(1) + bytes(MAX_BODY_BYTES), "image/jpeg", 413, "too_large"),
    "JSON": (b"{}", "application/json", 415, "content_type"),
    "curl's default type": (photo(1), "application/x-www-form-urlencoded", 415, "content_type"),
    "a form of nothing": (b"", "multipart/form-data; boundary=x", 400, "empty"),
    "a form without boundary": (b"--x\r\n\r\n", "multipart/form-data", 400, "malformed_form"),
    "a form that is none": (b"no form at all", "multipart/form-data; boundary=x", 400, "malformed_form"),
    "a form cut short": (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
        "multipart/form-data; boundary=x",
        400,
        "malformed_form",
    ),
    "a form without file": (
        b'--x\r\nContent-Disposition: form-data; name="photo"\r\n\r\nabc\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        400,
        "no_file",
    ),
    "a form with an empty file": (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        400,
        "empty",
    ),
    "a form with text as file": (
        b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--x--\r\n',
        "multipart/form-data; boundary=x",
        415,
        "not_an_image",
    ),
}


@pytest.mark.parametrize(("data", "content_type", "status", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_photo_is_refused_with_a_reason(
    replica: Replica, data: bytes, content_type: str, status: int, error: str
) -> None:
    answer = replica.predict(data, content_type)
    assert (answer.status_code, error_of(answer)) == (status, error)
    assert answer.headers["x-model-version"] == VERSION
    assert replica.predict(photo(1)).status_code == 200


def test_a_compressed_body_is_refused(replica: Replica) -> None:
    answer = replica.predict(zlib.compress(photo(1)), **{"content-encoding": "deflate"})
    assert (answer.status_code, error_of(answer)) == (415, "content_encoding")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_only_post_predicts(replica: Replica, method: str) -> None:
    answer = replica.client.request(method, replica.url + "/predict")
    assert (answer.status_code, error_of(answer)) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_the_other_routes_refuse_in_the_same_form(replica: Replica) -> None:
    missing = replica.get("/nothing/here")
    assert (missing.status_code, error_of(missing)) == (404, "not_found")
    wrong = replica.client.post(replica.url + "/version")
    assert (wrong.status_code, error_of(wrong)) == (405, "method_not_allowed")


def test_a_hundred_megabytes_are_refused_without_being_kept(replica: Replica) -> None:
    before = replica.rss_bytes()
    megabyte = bytes(1_000_000)

    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield megabyte

    announced = {"content-type": "image/jpeg", "content-length": str(100 * len(megabyte))}
    for headers in (announced, {"content-type": "image/jpeg"}):
        answer = replica.client.post(replica.url + "/predict", content=body(), headers=headers)
        assert (answer.status_code, error_of(answer)) == (413, "too_large")
    assert replica.rss_bytes() - before < 30_000_000


def test_a_large_body_is_refused_before_it_is_sent(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
            b"Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_many_large_uploads_at_once_are_bounded_in_memory(replica: Replica, address: tuple[str, int]) -> None:
    """Forty clients that send all but the last byte would hold 40 MB; eight bodies' worth are kept at most."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {MAX_BODY_BYTES}\r\n\r\n"
    before = replica.rss_bytes()
    connections = [socket.create_connection(address, timeout=10) for _ in range(40)]
    try:
        for connection in connections:
            connection.sendall(head.encode() + bytes(MAX_BODY_BYTES - 1))
        first_lines = [connection.recv(12) for connection in connections]
        assert set(first_lines) <= {b"HTTP/1.1 503", b"HTTP/1.1 408"}
        assert b"HTTP/1.1 503" in first_lines
        assert replica.rss_bytes() - before < 30_000_000
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: replica.metric("http_bodies_held_bytes") == 0, what="memory given back")


def test_a_body_that_dribbles_in_times_out(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
        assert received.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in received


def test_endless_headers_end_the_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        received = b""
        try:
            for index in range(100):
                connection.sendall(b"X-%d: %s\r\n" % (index, b"a" * 4000))
            received = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            received = received or b"HTTP/1.1 431"
        assert received.startswith(b"HTTP/1.1 431")


def test_a_client_that_goes_away_costs_nothing(replica: Replica, address: tuple[str, int]) -> None:
    before = replica.metric("http_requests_total", status="499", path="/predict")
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    wait_until(lambda: replica.metric("http_requests_total", status="499", path="/predict") > before)
    assert replica.predict(photo(1)).status_code == 200


def test_metrics_carry_the_runbooks_names_and_the_version(replica: Replica) -> None:
    labels = {"version": VERSION, "path": "/predict"}
    before = replica.metric("http_requests_total", status="200", **labels)
    chosen = replica.predict(photo(1)).json()["class"]
    assert replica.metric("http_requests_total", status="200", **labels) == before + 1
    assert replica.metric("http_request_duration_seconds_count", **labels) >= before + 1
    assert replica.metric("model_inference_seconds_count", version=VERSION) >= 1
    assert replica.metric("model_predictions_total", version=VERSION, **{"class": chosen}) >= 1
    assert replica.metric("model_ready", version=VERSION) == 1


def test_a_scan_of_the_web_adds_no_series(replica: Replica) -> None:
    replica.get("/first-unknown")
    before = len(replica.get("/metrics").text.splitlines())
    for index in range(50):
        replica.get(f"/wp-admin-{index}")
    assert len(replica.get("/metrics").text.splitlines()) == before
    assert replica.metric("http_requests_total", path="other", status="404") >= 50


def test_the_replica_says_who_it_is(replica: Replica) -> None:
    version = replica.get("/version").json()
    assert (version["version"], version["replica"]) == (VERSION, "replica-a")
    metadata = replica.get("/metadata").json()
    assert metadata["model"]["classes"] == list(CLASSES)
    assert metadata["version"] == VERSION
    assert replica.get("/readyz").json() == {"status": "ready"}
    assert replica.get("/healthz").json() == {"status": "ok"}


def test_openapi_describes_every_route_with_examples(replica: Replica) -> None:
    document = replica.get("/openapi.json").json()
    assert {"/predict", "/healthz", "/readyz", "/metrics", "/metadata", "/version"} <= set(document["paths"])
    predict = document["paths"]["/predict"]["post"]
    assert {"image/jpeg", "multipart/form-data"} <= set(predict["requestBody"]["content"])
    answered = replica.predict(photo(1)).json()
    assert set(predict["responses"]["200"]["content"]["application/json"]["example"]) == set(answered)
    for status in ("400", "405", "408", "413", "415", "422", "500", "503"):
        assert predict["responses"][status]["content"]["application/json"]["example"]["error"]
    assert json.dumps(document).count("#/components/schemas/Prediction") >= 1


def test_more_work_than_fits_is_refused_with_retry_after(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    one_at_a_time = {"KHET_SERVING__THREADS": "1", "KHET_SERVING__MAX_WAITING": "1"}
    large = bytes(simplejpeg.encode_jpeg(np.zeros((4000, 4000, 3), dtype=np.uint8)))
    with running(tmp_path, ["--model", str(tmp_path / "model")], one_at_a_time) as replica:

        def ask(_: int) -> httpx.Response:
            return httpx.post(replica.url + "/predict", content=large, headers={"content-type": "image/jpeg"})

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(48)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503}
        busy = answers[statuses.index(503)]
        assert error_of(busy) == "busy"
        assert int(busy.headers["retry-after"]) >= 1
        assert replica.predict(large).status_code == 200
        assert replica.metric("http_requests_total", status="503", path="/predict") == statuses.count(503)


REFUSED_MODELS = {
    "another decode contract": ({"decode_contract": "other-v9"}, "decoded as 'other-v9'"),
    "an unknown leaf score": ({"ood_method": "tarot"}, "'tarot'"),
    "a wrong embedding size": ({"embedding_size": 7}, "promises"),
}


@pytest.mark.parametrize(("metadata", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS.keys())
def test_a_model_that_does_not_fit_is_never_served(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write_tiny_model(tmp_path / "model", **metadata)
    _assert_refused(tmp_path, ["--model", str(tmp_path / "model")], {}, 4, message)


def test_a_file_that_is_no_model_is_never_served(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    _assert_refused(tmp_path, ["--model", str(tmp_path)], {}, 4, "is not a model that onnxruntime can load")


def test_what_is_missing_or_misspelt_is_said(tmp_path: Path) -> None:
    _assert_refused(tmp_path, [], {}, 2, "MODEL_VERSION is not set")
    _assert_refused(tmp_path, [], {"MODEL_VERSION": "latest"}, 2, "'latest' is not a model version")
    _assert_refused(tmp_path, ["--model", str(tmp_path / "nowhere")], {}, 2, "no such file")
    _assert_refused(tmp_path, [], {"MODEL_VERSION": "v1.0.0", "KHET_SERVING__THREAD": "2"}, 2, "thread")


def _assert_refused(tmp: Path, arguments: list[str], environment: dict[str, str], code: int, message: str) -> None:
    replica = launch(tmp, arguments, environment)
    try:
        assert replica.process.wait(30) == code, replica.text()
    finally:
        replica.end()
    errors = [line for line in replica.text().splitlines() if "ERROR" in line]
    assert len(errors) == 1, replica.text()
    assert message in errors[0]
    assert "Ready" not in replica.text()
    assert "Traceback" not in replica.text()


def test_a_copy_whose_answer_nobody_gets_is_not_counted_among_users_requests(replica: Replica) -> None:
    def counted() -> tuple[int, int]:
        seen = read_replica(replica.get("/metrics").text)
        return seen.requests, seen.predictions

    before = counted()
    assert replica.predict(photo(1), **{"x-khet-shadow": "1"}).status_code == 200
    assert counted() == before
    assert replica.predict(photo(1), **{"x-khet-probe": "1"}).status_code == 200
    assert counted() == (before[0] + 1, before[1] + 1)
