"""A replica that is stopped, fed a photo its model chokes on, or given a model that is not what was signed."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import simplejpeg
from onnx import TensorProto, helper, numpy_helper

from configs.areas import ObjectStoreSettings
from ml.bundle import MANIFEST, MODEL, SIGNATURE, FileEntry, Lineage, Manifest
from ml.objects import ObjectStore, file_sha256
from ml.signing import Signer, generate_keypair
from ml.version import Version
from tests.support.replica import Replica, error_of, launch, photo, running, store_environment, wait_until
from tests.support.stack import object_store, stop_parts
from tests.support.tiny_model import write_tiny_model

VERSION = Version(1, 3, 0)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_tiny_model(tmp_path / "model")
    return ["--model", str(tmp_path / "model")]


# Stopping ---------------------------------------------------------------------------------------------------------


def test_sigterm_answers_what_is_in_flight_and_exits_cleanly(tmp_path: Path, arguments: list[str]) -> None:
    data = photo(1)
    with running(tmp_path, arguments) as replica:
        host, port = replica.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            head = (
                f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            )
            slow.sendall(head.encode() + data[:100])
            wait_until(lambda: replica.metric("http_requests_in_flight") >= 2)  # the slow one, and this look
            replica.process.send_signal(signal.SIGTERM)
            draining = wait_until(lambda: (a := replica.get("/readyz")).status_code == 503 and a)
            assert draining.json() == {"status": "draining"}
            assert "retry-after" in draining.headers
            assert replica.predict(photo(2)).status_code == 200, "what still comes is answered"
            slow.sendall(data[100:])
            assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        assert replica.process.wait(10) == 0
    assert "Stopped." in replica.text()


def test_no_request_is_lost_when_a_busy_replica_stops(tmp_path: Path, arguments: list[str]) -> None:
    """Clients that stop sending once /readyz says so see no failure: what a gateway does."""
    outcomes: list[int] = []
    with running(tmp_path, arguments) as replica:

        def client(seed: int) -> None:
            with httpx.Client() as http:
                while http.get(replica.url + "/readyz").status_code == 200:
                    answer = http.post(
                        replica.url + "/predict", content=photo(seed), headers={"content-type": "image/jpeg"}
                    )
                    outcomes.append(answer.status_code)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(outcomes) > 100)
        assert replica.terminate() == 0
        for thread in threads:
            thread.join(10)
    assert set(outcomes) == {200}


def test_a_client_that_keeps_its_connection_is_told_to_leave_before_it_is_closed(
    tmp_path: Path, arguments: list[str]
) -> None:
    """Clients of a Service look at no probe: whoever has a connection to a pod goes on using it."""
    with running(tmp_path, arguments) as replica, httpx.Client(base_url=replica.url) as http:
        image = {"content": photo(1), "headers": {"content-type": "image/jpeg"}}
        assert "connection" not in http.post("/predict", **image).headers
        replica.process.send_signal(signal.SIGTERM)
        last = wait_until(lambda: (a := http.post("/predict", **image)).headers.get("connection") and a)
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        assert replica.process.wait(10) == 0


def test_a_request_that_never_ends_does_not_keep_a_replica_for_ever(tmp_path: Path, arguments: list[str]) -> None:
    with running(tmp_path, arguments, {"KHET_SERVING__DRAIN_S": "0.5"}) as replica:
        host, port = replica.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as stuck:
            stuck.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            wait_until(lambda: replica.metric("http_requests_in_flight") >= 2)
            started = time.monotonic()
            assert replica.terminate(timeout_s=8) == 0
            assert time.monotonic() - started < 6


def test_a_second_signal_ends_at_once(tmp_path: Path, arguments: list[str]) -> None:
    with running(tmp_path, arguments, {"KHET_SERVING__DRAIN_S": "60"}) as replica:
        host, port = replica.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as stuck:
            stuck.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
            wait_until(lambda: replica.metric("http_requests_in_flight") >= 2)
            replica.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "Draining." in replica.text())
            replica.process.send_signal(signal.SIGTERM)
            replica.process.wait(8)


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path, arguments: list[str]) -> None:
    with running(tmp_path, arguments) as replica:
        port = replica.url.rpartition(":")[2]
        second = launch(tmp_path, [*arguments, "--port", port])
        try:
            assert second.process.wait(20) == 2
        finally:
            second.end()
        assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in second.text()


# A model that fails -----------------------------------------------------------------------------------------------


def _white() -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.full((96, 96, 3), 255, dtype=np.uint8)))


def _write_model_that_fails_on_white(folder: Path) -> None:
    """The tiny model, plus a lookup by brightness in a table that has no place for white."""
    path = write_tiny_model(folder)
    model = onnx.load(str(path))
    graph = model.graph
    graph.node[-2].output[0] = "raw_logits"
    lookup = [
        helper.make_node("ReduceMean", ["scaled"], ["brightness"], keepdims=0),
        helper.make_node("Mul", ["brightness", "steps"], ["step"]),
        helper.make_node("Cast", ["step"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["factor"]),
        helper.make_node("Mul", ["raw_logits", "factor"], ["logits"]),
    ]
    softmax = graph.node.pop()
    graph.node.extend([*lookup, softmax])
    graph.initializer.append(numpy_helper.from_array(np.array(1.02, dtype=np.float32), "steps"))
    graph.initializer.append(numpy_helper.from_array(np.ones(1, dtype=np.float32), "table"))
    onnx.save(model, str(path))


def test_a_photo_the_model_fails_on_is_a_500_and_the_replica_lives(tmp_path: Path) -> None:
    _write_model_that_fails_on_white(tmp_path / "model")
    with running(tmp_path, ["--model", str(tmp_path / "model")]) as replica:
        assert replica.predict(photo(1)).status_code == 200
        for _ in range(5):  # more than there are threads
            answer = replica.predict(_white())
            assert (answer.status_code, error_of(answer)) == (500, "internal")
        assert replica.predict(photo(1)).status_code == 200
        assert replica.metric("http_requests_total", status="500", path="/predict") == 5
        assert replica.get("/readyz").status_code == 200
        assert f"Request {answer.json()['request_id']} failed." in replica.text()


# Trust ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as settings:
        yield settings


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    generate_keypair(tmp_path / "private.pem", tmp_path / "public.pem")
    return tmp_path / "public.pem"


def _publish(store: ObjectStoreSettings, tmp: Path, version: Version) -> ObjectStore:
    """What the registry writes, by hand: files first, then the signed manifest."""
    model = write_tiny_model(tmp / "published")
    lineage = Lineage(
        git_commit=None,
        git_dirty=None,
        config={},
        seed=0,
        lock_sha256=None,
        hardware={},
        dataset="tiny",
        dataset_hash="0" * 64,
    )
    entry = FileEntry(sha256=file_sha256(model), size_bytes=model.stat().st_size)
    manifest = Manifest(
        version=version,
        created_at=datetime.now(UTC),
        created_by="a test",
        files={MODEL: entry},
        lineage=lineage,
        metrics={"accuracy": 0.93},
    )
    client = ObjectStore(store)
    data = manifest.model_dump_json().encode()
    client.put(store.models_bucket, f"{version}/{MODEL}", model.read_bytes())
    client.put(store.models_bucket, f"{version}/{SIGNATURE}", Signer(tmp / "private.pem").sign(data))
    client.put(store.models_bucket, f"{version}/{MANIFEST}", data)
    return client


def _environment(store: ObjectStoreSettings, trusted: Path, version: Version, **changes: str) -> dict[str, str]:
    base = {"MODEL_VERSION": str(version), "KHET_REGISTRY__TRUSTED_KEYS": f'["{trusted}"]'}
    return base | store_environment(store) | changes


def test_a_published_version_is_served_with_its_lineage(
    tmp_path: Path, store: ObjectStoreSettings, trusted: Path
) -> None:
    _publish(store, tmp_path, VERSION)
    with running(tmp_path, [], _environment(store, trusted, VERSION)) as replica:
        assert replica.predict(photo(1)).json()["model_version"] == str(VERSION)
        assert replica.metric("model_accuracy", version=str(VERSION)) == pytest.approx(0.93)
        manifest = replica.get("/metadata").json()["manifest"]
        assert manifest["version"] == str(VERSION)
        assert manifest["lineage"]["dataset"] == "tiny"
        assert replica.terminate() == 0


def test_a_tampered_model_is_never_served(tmp_path: Path, store: ObjectStoreSettings, trusted: Path) -> None:
    version = Version(6, 6, 6)
    client = _publish(store, tmp_path, version)
    model = bytearray(client.get(store.models_bucket, f"{version}/{MODEL}"))
    model[len(model) // 2] ^= 0xFF
    client.put(store.models_bucket, f"{version}/{MODEL}", bytes(model))
    _assert_refused(tmp_path, _environment(store, trusted, version), 4, "does not match its manifest")


def test_a_version_signed_by_a_stranger_is_never_served(
    tmp_path: Path, store: ObjectStoreSettings, trusted: Path
) -> None:
    version = Version(6, 6, 7)
    _publish(store, tmp_path, version)
    generate_keypair(tmp_path / "other-private.pem", tmp_path / "other.pem")
    _assert_refused(tmp_path, _environment(store, tmp_path / "other.pem", version), 4, "manifest.json of v6.6.7")


def test_a_version_that_is_not_published_is_said(tmp_path: Path, store: ObjectStoreSettings, trusted: Path) -> None:
    _assert_refused(tmp_path, _environment(store, trusted, Version(9, 9, 9)), 2, "v9.9.9 is not published")


def test_a_damaged_local_copy_is_fetched_again(tmp_path: Path, store: ObjectStoreSettings, trusted: Path) -> None:
    environment = _environment(store, trusted, VERSION)
    _publish(store, tmp_path, VERSION)
    local = tmp_path / "serving" / "models" / str(VERSION) / MODEL
    with running(tmp_path, [], environment) as replica:
        assert replica.terminate() == 0
    original = local.read_bytes()
    local.write_bytes(original[:-10] + b"0123456789")
    with running(tmp_path, [], environment) as replica:
        assert replica.predict(photo(1)).status_code == 200
    assert local.read_bytes() == original


def test_a_verified_local_copy_is_served_while_the_store_is_away(tmp_path: Path, trusted: Path) -> None:
    with object_store(tmp_path / "own-s3") as own:
        _publish(own, tmp_path, VERSION)
        with running(tmp_path, [], _environment(own, trusted, VERSION)) as replica:
            assert replica.terminate() == 0
        stop_parts(tmp_path / "own-s3")
        with running(tmp_path, [], _environment(own, trusted, VERSION)) as replica:
            assert replica.predict(photo(1)).status_code == 200


def test_an_unreachable_store_ends_the_start_with_its_own_exit_code(tmp_path: Path, trusted: Path) -> None:
    nowhere = ObjectStoreSettings(endpoint_url="http://127.0.0.1:9", access_key_id="a", patience_s=0.0, max_attempts=1)
    replica = _assert_refused(tmp_path, _environment(nowhere, trusted, VERSION), 5, "127.0.0.1:9")
    assert "secret" not in replica.text().lower()


def test_before_it_is_ready_a_replica_answers_probes_and_refuses_predictions(tmp_path: Path, trusted: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a store that takes connections and never answers
        hanging = ObjectStoreSettings(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}", access_key_id="a")
        replica = launch(tmp_path, [], _environment(hanging, trusted, VERSION))
        try:
            replica.wait_listening()
            assert replica.get("/healthz").status_code == 200
            assert replica.get("/readyz").json() == {"status": "loading"}
            answer = replica.predict(photo(1))
            assert (answer.status_code, error_of(answer)) == (503, "not_ready")
            assert replica.get("/metadata").status_code == 503
            replica.process.send_signal(signal.SIGTERM)
            replica.process.wait(8)
        finally:
            replica.end()


def _assert_refused(tmp: Path, environment: dict[str, str], code: int, message: str) -> Replica:
    replica = launch(tmp, [], environment)
    try:
        assert replica.process.wait(30) == code, replica.text()
    finally:
        replica.end()
    errors = [line for line in replica.text().splitlines() if " ERROR " in line]
    assert len(errors) == 1, replica.text()
    assert message in errors[0]
    assert "Ready" not in replica.text()
    return replica
