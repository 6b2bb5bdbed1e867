"""Pairs of answers that the replayer makes itself, from two real stub replicas."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from configs.areas import ReplaySettings
from ml.version import Version
from tasks.cluster import Track, TrackCounters
from tasks.cluster.exposition import read_replica
from tasks.rollout.replay import Probe, Replayer
from tasks.rollout.shadow import Answer, Shadow
from tests.support.node import STUB, eventually, free_port

HEALTHY, RUST = Answer("healthy", True), Answer("rust", False)
NOTHING = TrackCounters(Version(1, 1, 0), datetime(2026, 1, 1, tzinfo=UTC), 7, 1, {float("inf"): 7})


def test_pairs_are_counted_by_what_the_user_was_told():
    shadow = Shadow()
    for said, seconds in ((HEALTHY, 0.001), (RUST, 0.02), (RUST, 30.0)):
        shadow.compared(HEALTHY, said, seconds)
    shadow.failed(0.3)
    canary = shadow.added_to({Track.canary: NOTHING})[Track.canary]
    assert (canary.requests, canary.errors, canary.latency_ms) == (7, 1, NOTHING.latency_ms)
    assert (canary.shadow_pairs, canary.shadow_differ, canary.shadow_errors, canary.shadow_ood) == (3, 2, 1, 2)
    assert canary.shadow_by_class == {"healthy": (3, 2)}
    assert canary.shadow_classes == {"healthy": 1, "rust": 2}
    grown = [canary.shadow_latency_ms[bound] for bound in (1.0, 10.0, 25.0, 500.0, 10_000.0, float("inf"))]
    assert grown == [1, 1, 2, 3, 3, 4]


def test_nothing_is_added_before_the_first_pair_or_without_a_canary():
    shadow = Shadow()
    assert shadow.added_to({Track.canary: NOTHING}) == {Track.canary: NOTHING}
    shadow.failed(0.1)
    assert shadow.added_to({Track.stable: NOTHING}) == {Track.stable: NOTHING}


@contextlib.contextmanager
def _stub(home: Path, version: str, **behaviour: object) -> Iterator[str]:
    file, port = home / f"{version}.json", free_port()
    file.write_text(json.dumps({version: behaviour}))
    command = [sys.executable, str(STUB), "--port", str(port), "--name", version, "--behaviour", str(file)]
    process = subprocess.Popen(command, env={**os.environ, "MODEL_VERSION": version}, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: _answers(url), 15)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz").is_success
    return False


def _counters(url: str) -> TrackCounters:
    return read_replica(httpx.get(f"{url}/metrics").text)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[str, str]]:
    with _stub(tmp_path, "v1.0.0") as stable, _stub(tmp_path, "v1.1.0", answer="rust", error_share=0.2) as canary:
        yield stable, canary


def test_a_replayed_photo_goes_to_the_canary_too_while_it_is_asked_for(pair):
    stable, canary = pair
    shadow = Shadow()
    settings = ReplaySettings(rate_per_s=200.0, concurrency=4)
    with Replayer(stable, [Probe(b"leaf", "healthy")], settings, shadow) as replayer:
        eventually(lambda: replayer.sent >= 10, 10)
        shadow.aim(canary)
        eventually(lambda: _pairs(shadow) >= 20, 10)
        shadow.aim(None)
        sent = replayer.sent
        eventually(lambda: replayer.sent >= sent + 20, 10)
    counted = shadow.added_to({Track.canary: _counters(canary)})[Track.canary]
    assert counted.shadow_differ == counted.shadow_pairs < replayer.sent - 30
    assert abs(counted.shadow_errors - 0.25 * counted.shadow_pairs) <= 1
    assert counted.requests == 0, "a copy is no user's request"
    assert _counters(stable).requests == replayer.sent
    assert replayer.failed == 0


def test_a_canary_nobody_can_reach_yet_is_not_blamed_and_one_that_stays_away_is(pair):
    """What knows the way to a new pod learns it seconds after the pod is ready."""
    stable, canary = pair
    now = [0.0]
    shadow = Shadow(lambda: now[0])
    with Replayer(stable, [Probe(b"leaf", "healthy")], ReplaySettings(rate_per_s=200.0), shadow) as replayer:
        shadow.aim(f"http://127.0.0.1:{free_port()}")
        sent = replayer.sent
        eventually(lambda: replayer.sent >= sent + 20, 10)
        assert shadow.added_to({Track.canary: NOTHING}) == {Track.canary: NOTHING}
        now[0] = 31.0
        eventually(lambda: _errors(shadow) >= 20, 10)
        shadow.aim(canary)
        eventually(lambda: _pairs(shadow) >= 20, 10)


def test_a_canary_that_answered_once_is_blamed_for_going_away():
    shadow = Shadow(lambda: 0.0)
    shadow.aim("http://127.0.0.1:1")
    shadow.unreached(0.1)
    shadow.compared(HEALTHY, HEALTHY, 0.1)
    shadow.unreached(0.1)
    assert (_pairs(shadow), _errors(shadow)) == (1, 1)


def test_each_replayed_photo_comes_by_a_connection_of_its_own():
    """A Service deals connections, not requests, to its pods: one that is kept would bring all photos to one pod."""
    body = b'{"class": "rust", "model_version": "v1.0.0", "ood": false}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    connections: set[int] = set()

    class Keeps(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                if line.startswith(b"POST"):
                    connections.add(self.client_address[1])
                if line == b"\r\n":
                    self.rfile.read(len(b"leaf"))
                    self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Keeps) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        settings = ReplaySettings(rate_per_s=200.0, concurrency=2)
        with Replayer(f"http://127.0.0.1:{server.server_address[1]}", [Probe(b"leaf", "rust")], settings) as replayer:
            eventually(lambda: replayer.sent >= 10, 10)
        server.shutdown()
    assert replayer.failed == 0
    assert len(connections) == replayer.sent


def _pairs(shadow: Shadow) -> int:
    return shadow.added_to({Track.canary: NOTHING})[Track.canary].shadow_pairs


def _errors(shadow: Shadow) -> int:
    return shadow.added_to({Track.canary: NOTHING})[Track.canary].shadow_errors
