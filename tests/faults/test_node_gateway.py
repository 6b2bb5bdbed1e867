"""What the gateway and the control API do with requests that are wrong, too many, or not allowed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from configs.errors import ConfigError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.local_node import LocalNode
from tests.support.node import NodeProcess, eventually, running_node

V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
LIMIT = 100_000


@pytest.fixture(scope="module")
def node(tmp_path_factory: Any) -> Iterator[NodeProcess]:
    """v1.0.0 on stable, a slow v1.1.0 without traffic on canary, low limits."""
    limits = {"max_in_flight": 4, "request_timeout_s": 5.0}
    serving = {"max_body_bytes": LIMIT, "body_timeout_s": 0.5}
    with running_node(tmp_path_factory.mktemp("node"), cluster=limits, serving=serving) as made:
        made.behave(v1_1_0={"latency_ms": 400, "answer": "rust"})
        made.client.deploy(Track.stable, V1, 1)
        made.client.deploy(Track.canary, V2, 1)
        made.client.wait_ready(Track.stable, 20)
        made.client.wait_ready(Track.canary, 20)
        yield made


def send_raw(node: NodeProcess, data: bytes) -> bytes:
    """Send bytes to the gateway, return what comes until it closes or falls silent."""
    address = urlsplit(node.gateway_url)
    received = b""
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=3.0) as connection:
        connection.sendall(data)
        try:
            while chunk := connection.recv(65_536):
                received += chunk
                if b"\r\n\r\n" in received:
                    break
        except TimeoutError:
            return received
    return received


def test_the_body_and_the_headers_reach_the_replica_and_the_answer_names_its_maker(node):
    answer = node.predict(bytes(LIMIT), Content_Type="image/jpeg", X_Request_Id="scan-17")
    assert (answer.status_code, answer.json()["bytes"]) == (200, LIMIT)
    assert answer.headers["X-Request-Id"] == "scan-17"
    assert (answer.headers["X-Khet-Track"], answer.headers["X-Model-Version"]) == ("stable", "v1.0.0")
    seen = answer.json()["headers"]
    assert (seen["content-type"], seen["x-request-id"]) == ("image/jpeg", "scan-17")


@pytest.mark.parametrize("offered", ["", "a b", "x" * 65, "a;b"], ids=repr)
def test_a_request_without_a_sane_id_gets_one(node, offered):
    answer = node.predict(X_Request_Id=offered)
    assert len(answer.headers["X-Request-Id"]) == 32
    assert answer.json()["headers"]["x-request-id"] == answer.headers["X-Request-Id"]


def test_a_body_that_says_it_is_too_large_is_refused_unread(node):
    answer = send_raw(node, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_that_turns_out_too_large_is_refused(node):
    answer = node.users.post(f"{node.gateway_url}/predict", content=(bytes(50_000) for _ in range(5)))
    assert (answer.status_code, answer.json()["error"]) == (413, "too_large")


def test_a_body_that_never_comes_is_given_up(node):
    answer = send_raw(node, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_chunked_body_that_is_not_one_is_refused(node):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = send_raw(node, head + b"4\r\nleaf\r\nzz\r\n")
    assert b" 400 " in answer.splitlines()[0]
    assert "Traceback" not in node.log


def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(node):
    address = urlsplit(node.gateway_url)
    for _ in range(3):
        with socket.create_connection((address.hostname or "", address.port or 0)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\nhalf")
    assert node.predict().status_code == 200
    assert "Traceback" not in node.log


def test_a_client_that_leaves_before_its_answer_leaves_no_trace(node):
    with pytest.raises(httpx.ReadTimeout):
        pin = {"X-Khet-Track": "canary", "Authorization": f"Bearer {node.token}"}
        httpx.post(f"{node.gateway_url}/predict", content=b"leaf", headers=pin, timeout=0.1)
    eventually(lambda: "gateway_in_flight 0" in metrics(node))
    assert "Traceback" not in node.log


def test_a_client_that_asks_whether_to_go_on_is_told_to(node):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
    assert send_raw(node, head).startswith(b"HTTP/1.1 100 Continue")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("POST", "/version", 405), ("GET", "/v1/status", 404), ("GET", "/", 404)],
)
def test_other_paths_and_methods_are_refused(node, method, path, status):
    answer = node.users.request(method, f"{node.gateway_url}{path}")
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "detail", "request_id"}


def test_what_is_no_http_does_not_hurt(node):
    assert b" 400 " in send_raw(node, b"\x16\x03\x01 hello\r\n\r\n").splitlines()[0]
    assert node.predict().status_code == 200


def test_questions_about_the_model_go_to_stable(node):
    assert node.users.get(f"{node.gateway_url}/version").json()["version"] == "v1.0.0"
    assert node.users.head(f"{node.gateway_url}/version").status_code == 200
    assert node.users.get(f"{node.gateway_url}/healthz").json()["ready"]["stable"] == 1


def test_a_probe_with_the_token_reaches_the_track_it_names_and_the_token_stays_here(node):
    probe = {"X_Khet_Track": "canary", "Authorization": f"Bearer {node.token}"}
    answer = node.predict(**probe)
    assert (answer.json()["class"], answer.headers["X-Khet-Track"]) == ("rust", "canary")
    assert "authorization" not in answer.json()["headers"]


@pytest.mark.parametrize("token", ["", "Bearer wrong", "Bearer \u00e9"], ids=repr)
def test_a_probe_without_the_token_is_refused(node, token):
    answer = node.users.post(
        f"{node.gateway_url}/predict",
        content=b"x",
        headers=[(b"X-Khet-Track", b"canary"), (b"Authorization", token.encode())],
    )
    assert answer.status_code == 403


def test_too_many_requests_are_refused_with_a_time_to_come_back(node):
    probe = {"X_Khet_Track": "canary", "Authorization": f"Bearer {node.token}"}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: node.predict(**probe), range(12)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert 0 < len(refused) <= 8
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert {answer.status_code for answer in answers} == {200, 503}


def test_a_slow_canary_does_not_slow_the_answers_it_is_mirrored_from(node):
    node.client.set_weights({Track.stable: 1.0}, mirror={Track.canary: 1.0}, lease_s=30)
    took = [node.predict().elapsed.total_seconds() for _ in range(20)]
    assert sorted(took)[10] < 0.2
    eventually(lambda: node.client.counters()[Track.canary].shadow_pairs > 0)
    node.client.set_weights({Track.stable: 1.0})
    example = node.client.shadow_examples()[0]
    assert (example["served_class"], example["mirrored_class"]) == ("healthy", "rust")
    assert (example["served_by"], example["mirrored_to"]) == ("v1.0.0", "v1.1.0")


def test_copies_that_do_not_fit_are_dropped_and_counted(node):
    node.client.set_weights({Track.stable: 1.0}, mirror={Track.canary: 1.0}, lease_s=30)
    assert {node.predict().status_code for _ in range(120)} == {200}
    node.client.set_weights({Track.stable: 1.0})
    dropped = [line for line in metrics(node) if 'track="canary"' in line and 'outcome="dropped"' in line]
    assert int(dropped[0].rpartition(" ")[2]) > 0


def metrics(node: NodeProcess) -> list[str]:
    """The gateway's metrics, a line each."""
    return node.users.get(f"{node.gateway_url}/metrics").text.splitlines()


def test_the_metrics_are_prometheus_text(node):
    from prometheus_client.parser import text_string_to_metric_families

    from tasks.cluster.exposition import read_gateway

    node.predict()
    families = {family.name: family for family in text_string_to_metric_families("\n".join(metrics(node)) + "\n")}
    [served] = [
        s for s in families["gateway_requests"].samples if s.labels["track"] == "stable" and s.labels["status"] == "200"
    ]
    buckets = [s for s in families["gateway_request_duration_seconds"].samples if s.labels.get("track") == "stable"]
    assert served.labels["version"] == "v1.0.0"
    assert {s.value for s in buckets if s.name.endswith("_count")} >= {served.value}
    eventually(lambda: read_gateway("\n".join(metrics(node)) + "\n") == node.client.counters())
    assert {s.labels["track"]: s.value for s in families["gateway_track_weight"].samples}["stable"] == 1.0


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer wrong", "Basic abc"])
def test_the_control_api_wants_its_token(node, token):
    for method, path in (("GET", "/v1/status"), ("POST", "/v1/remove"), ("POST", "/shutdown")):
        answer = node.users.request(method, f"{node.node_url}{path}", headers={"Authorization": token})
        assert answer.status_code == 401
    assert node.users.get(f"{node.node_url}/healthz").status_code == 200


def test_a_client_with_a_wrong_token_says_so(node):
    with pytest.raises(ConfigError, match="token"):
        LocalNode(node.node_url, "wrong").status()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"track": "canary"}', b'{"track": "blue", "version": "v1.0.0", "replicas": 1}']
    + [json.dumps({"track": "canary", "version": v, "replicas": 1}).encode() for v in ("1.0", "v1.0.0; rm", "v1")],
    ids=repr,
)
def test_a_control_call_that_makes_no_sense_changes_nothing(node, body):
    before = node.client.status()
    headers = {"Authorization": f"Bearer {node.token}"}
    answer = httpx.post(f"{node.node_url}/v1/deploy", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "ConfigError")
    assert "Nothing was changed" in answer.json()["message"]
    assert node.client.status() == before
