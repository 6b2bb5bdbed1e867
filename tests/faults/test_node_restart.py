"""The node itself dies; replicas do not, and the next node takes over where the last one was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.node import processes
from tests.support.node import STUB, NodeProcess, eventually, free_port

V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
STABLE, CANARY, BASELINE, *_ = Track


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A started node with v1.0.0 on stable."""
    made = NodeProcess(tmp_path)
    try:
        made.start()
        made.client.deploy(STABLE, V1, 1)
        made.client.wait_ready(STABLE, 20)
        yield made
    finally:
        made.stop()


def test_replicas_survive_a_killed_node_and_are_adopted_without_a_restart(node):
    node.client.scale(STABLE, 2)
    node.client.wait_ready(STABLE, 20)
    before = node.client.status()
    node.kill()
    for replica in before.replicas:
        assert httpx.get(f"http://{replica.address}/readyz").status_code == 200
    node.start()
    assert node.predict().status_code == 200
    node.client.wait_ready(STABLE, 20)
    assert node.client.status() == before
    assert len(node.events("adopted")) == 2


def test_canary_and_baseline_are_adopted_with_their_traffic(node):
    for track, version in ((CANARY, V2), (BASELINE, V1)):
        node.client.deploy(track, version, 1)
        node.client.wait_ready(track, 20)
    node.client.set_weights({STABLE: 0.5, CANARY: 0.25, BASELINE: 0.25}, mirror={CANARY: 1.0}, lease_s=60)
    before = node.client.status()
    node.kill()
    node.start()
    eventually(lambda: node.client.status() == before)
    assert {node.predict().headers["X-Khet-Track"] for _ in range(20)} == {"stable", "canary", "baseline"}


def test_sigterm_ends_the_node_alone(node):
    pids = node.pids()
    node.kill(signal.SIGTERM)
    assert node.process.returncode == 0
    assert all(psutil.pid_exists(pid) for pid in pids)
    node.start()
    assert node.pids() == pids


def test_shutdown_ends_everything_quickly_and_the_next_start_serves_the_same(node):
    node.client.scale(STABLE, 3)
    node.client.wait_ready(STABLE, 20)
    pids = node.pids()
    began = time.monotonic()
    node.client.shutdown()
    assert node.process.wait(5) == 0
    assert time.monotonic() - began < 8
    assert not any(psutil.pid_exists(pid) for pid in pids)
    node.client.shutdown()
    node.start()
    node.client.wait_ready(STABLE, 20)
    assert len(node.pids()) == 3


def test_a_shutdown_does_not_wait_for_a_replica_that_hangs(node):
    node.behave(v1_1_0={"ignore_sigterm": True})
    node.client.deploy(CANARY, V2, 1)
    node.client.wait_ready(CANARY, 20)
    began = time.monotonic()
    node.client.shutdown()
    node.process.wait(5)
    assert time.monotonic() - began < 8
    assert processes.find(node.home / "node") == {}


def test_a_replica_that_died_while_the_node_was_dead_is_started_again(node):
    [pid] = node.pids()
    node.kill()
    os.kill(pid, signal.SIGKILL)
    node.start()
    node.client.wait_ready(STABLE, 20)
    assert node.pids() != [pid]


def test_a_lease_that_ended_while_the_node_was_dead_gives_no_traffic_to_the_canary(node):
    node.client.deploy(CANARY, V2, 1)
    node.client.wait_ready(CANARY, 20)
    node.client.set_weights({STABLE: 0.5, CANARY: 0.5}, mirror={CANARY: 1.0}, lease_s=0.5)
    lease = node.client.status().lease_expires_at
    node.kill()
    eventually(lambda: time.time() > lease.timestamp())
    node.start()
    assert {node.predict().headers["X-Model-Version"] for _ in range(20)} == {"v1.0.0"}
    assert node.client.status().mirror == {}
    assert node.events("lease_expired")


def test_a_rollout_goes_on_after_the_node_was_killed_in_the_middle(node):
    node.behave(v1_1_0={"start_delay_s": 1.0})
    node.client.deploy(STABLE, V2, 2)
    eventually(lambda: len(node.pids()) >= 2, what="the new version is starting")
    node.kill()
    node.start()
    node.client.wait_ready(STABLE, 20)
    assert {r.version for r in node.client.status().replicas} == {V2}


def test_a_retiring_replica_is_still_retired_by_the_next_node(node):
    node.behave(v1_1_0={"ignore_sigterm": True})
    node.client.deploy(CANARY, V2, 1)
    node.client.wait_ready(CANARY, 20)
    [pid] = node.pids(CANARY)
    node.client.remove(CANARY)
    eventually(lambda: node.events("retiring"))
    node.kill()
    node.start()
    eventually(lambda: not psutil.pid_exists(pid), 20, "the replica is gone")


def test_a_process_that_nobody_recorded_is_ended(node):
    node.kill()
    env = {**os.environ, **processes.marks(node.home / "node", "stray"), "MODEL_VERSION": "v1.0.0"}
    command = [sys.executable, str(STUB), "--port", str(free_port()), "--name", "stray"]
    with subprocess.Popen(command, env=env, start_new_session=True) as stray:
        eventually(lambda: "stray" in processes.find(node.home / "node"), what="the stray runs")
        node.start()
        assert stray.wait(15) is not None
    assert node.events("orphan")
    assert node.predict().status_code == 200


def test_a_process_that_took_over_the_number_of_a_dead_replica_is_left_alone(node):
    [pid] = node.pids()
    node.kill()
    os.kill(pid, signal.SIGKILL)
    record = next((node.home / "node" / "replicas").glob("*.json"))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        record.write_text(record.read_text().replace(f'"pid": {pid}', f'"pid": {other.pid}'))
        node.start()
        node.client.wait_ready(STABLE, 20)
        assert other.poll() is None
        assert node.pids() != [other.pid]
        other.communicate(b"\n")


def test_a_damaged_state_starts_from_its_copy(node):
    pids = node.pids()
    node.kill()
    (node.home / "node" / "desired.json").write_text('{"format": 1, "tracks": {"stab')
    node.start()
    assert node.predict().status_code == 200
    assert node.pids() == pids
    assert "desired.json" in node.events("recovered")[0]["detail"]


def test_a_state_that_is_lost_twice_stops_the_node_and_names_the_file(node):
    [pid] = node.pids()
    node.kill()
    for name in ("desired.json", "desired.json.bak"):
        (node.home / "node" / name).write_text("{")
    node.start(wait=False)
    assert node.process.wait(20) == 4
    assert "desired.json cannot be read" in node.log
    assert psutil.pid_exists(pid)


def test_a_second_node_on_the_same_folder_is_refused_and_the_first_goes_on(node):
    first = node.process
    node.start(wait=False)
    assert node.process.wait(20) == 2
    assert "another node runs" in node.log
    node.process = first
    assert node.predict().status_code == 200


def test_a_taken_port_is_named(tmp_path):
    made = NodeProcess(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", made.gateway_url.rpartition(":")[2]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    ) as other:
        eventually(lambda: _listens(made.gateway_url))
        made.start(wait=False)
        assert made.process.wait(20) == 2
        other.kill()
    assert f"cannot listen on 127.0.0.1:{made.gateway_url.rpartition(':')[2]}" in made.log


def _listens(url: str) -> bool:
    try:
        return httpx.get(url).status_code > 0
    except httpx.HTTPError:
        return False
