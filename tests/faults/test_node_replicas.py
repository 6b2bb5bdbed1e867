"""Replicas die, hang and fail under load; users notice nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from configs.errors import ExternalError
from ml.version import Version
from tasks.cluster import Track
from tests.support.node import NodeProcess, Traffic, eventually, running_node

V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
STABLE, CANARY = Track.stable, Track.canary


@pytest.fixture(scope="module")
def shared(tmp_path_factory: Any) -> Iterator[NodeProcess]:
    """One node for the module, with short patience."""
    with running_node(tmp_path_factory.mktemp("node"), cluster={"request_timeout_s": 6.0}) as node:
        yield node


@pytest.fixture
def node(shared: NodeProcess) -> NodeProcess:
    """Two replicas of v1.0.0 on stable, nothing else."""
    shared.behave()
    shared.client.rollback(V1, 2)
    eventually(lambda: len(shared.client.status().replicas) == 2, what="two replicas")
    return shared


def canary(node: NodeProcess, share: float, **behaviour: Any) -> None:
    """v1.1.0 with this behaviour gets a share of the traffic."""
    node.behave(v1_1_0=behaviour)
    node.client.deploy(CANARY, V2, 1)
    node.client.wait_ready(CANARY, 20)
    node.client.set_weights({STABLE: 1 - share, CANARY: share}, lease_s=60)


def test_a_replica_killed_under_load_fails_no_request_and_is_replaced(node):
    [victim, other] = node.pids()
    with Traffic(node.gateway_url, 100) as traffic:
        traffic.wait_for(30)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(set(node.pids()) - {victim}) == 2, what="a new process")
        node.client.wait_ready(STABLE, 20)
        traffic.wait_for(50)
    assert traffic.failures == {}
    assert other in node.pids()
    assert [r.restarts for r in node.client.status().replicas if int(r.pid_or_pod) != other] == [1]


def test_the_only_replica_killed_under_load_fails_no_request(node):
    node.client.scale(STABLE, 1)
    node.client.wait_ready(STABLE, 20)
    [victim] = node.pids()
    with Traffic(node.gateway_url, 50) as traffic:
        traffic.wait_for(20)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in node.pids(), what="a new process")
        traffic.wait_for(50)
    assert traffic.failures == {}


def test_all_replicas_killed_at_once_are_back_within_seconds(node):
    for pid in node.pids():
        os.kill(pid, signal.SIGKILL)
    assert node.predict().status_code == 200


def test_a_stopped_replica_is_passed_over_and_its_requests_go_elsewhere(node):
    [victim, _] = node.pids()
    with Traffic(node.gateway_url, 20) as traffic:
        traffic.wait_for(10)
        os.kill(victim, signal.SIGSTOP)
        eventually(lambda: any(not r.ready for r in node.client.status().replicas), what="the health check")
        traffic.wait_for(20)
        os.kill(victim, signal.SIGCONT)
        node.client.wait_ready(STABLE, 20)
        traffic.wait_for(20)
    assert traffic.failures == {}
    assert victim in node.pids()


def test_a_canary_killed_under_load_is_charged_and_users_get_stable_answers(node):
    canary(node, 0.5, latency_ms=50)
    with Traffic(node.gateway_url, 100) as traffic:
        traffic.wait_for(50)
        os.kill(node.pids(CANARY)[0], signal.SIGKILL)
        eventually(lambda: node.client.counters()[CANARY].errors > 0, what="the canary is charged")
        traffic.wait_for(50)
    assert traffic.failures == {}
    assert node.client.counters()[STABLE].errors == 0 or node.client.counters()[STABLE].version == V1


@pytest.mark.parametrize(
    "behaviour", [{"error_share": 1.0}, {"reset_share": 1.0}, {"busy_share": 1.0}, {"crash_after": 3}], ids=str
)
def test_a_failing_canary_is_charged_with_every_failure_and_users_see_none(node, behaviour):
    canary(node, 0.5, **behaviour)
    with Traffic(node.gateway_url, 60) as traffic:
        traffic.wait_for(100)
    assert traffic.failures == {}
    seen = node.client.counters()[CANARY]
    assert seen.errors >= 20
    assert seen.errors <= seen.requests


def test_a_replica_that_closes_idle_connections_costs_no_request(node):
    node.behave(v1_1_0={"keep_alive_s": 0.05})
    node.client.deploy(STABLE, V2, 1)
    node.client.wait_ready(STABLE, 20)
    with Traffic(node.gateway_url, 19) as traffic:
        traffic.wait_for(60)
    assert traffic.failures == {}
    assert node.client.counters()[STABLE].errors == 0


def test_replacing_scaling_and_restarting_under_load_fails_no_request(node):
    node.behave(v1_0_0={"latency_ms": 40}, v1_1_0={"latency_ms": 40})
    steps = (
        lambda: node.client.restart(STABLE),
        lambda: node.client.scale(STABLE, 4),
        lambda: node.client.deploy(STABLE, V2, 2),
        lambda: node.client.scale(STABLE, 1),
        lambda: node.client.rollback(V1, 2),
    )
    with Traffic(node.gateway_url, 50) as traffic:
        for step in steps:
            step()
            node.client.wait_ready(STABLE, 30)
            traffic.wait_for(15)
    assert traffic.failures == {}


def test_a_replica_that_ignores_sigterm_is_killed(node):
    node.behave(v1_1_0={"ignore_sigterm": True})
    node.client.deploy(CANARY, V2, 1)
    node.client.wait_ready(CANARY, 20)
    [pid] = node.pids(CANARY)
    node.client.remove(CANARY)
    eventually(lambda: not psutil.pid_exists(pid), 20, "the process is gone")
    assert any(event["subject"].startswith("canary") for event in node.events("killed"))


def test_a_version_that_never_becomes_ready_leaves_the_old_one_serving(node):
    node.behave(v1_1_0={"never_ready": True})
    node.client.deploy(STABLE, V2, 2)
    with Traffic(node.gateway_url, 50) as traffic:
        with pytest.raises(
            ExternalError, match=r"(?s)not ready after 1 s: 0 of 2 .*serves v1\.1\.0 on port \d+\Z"
        ) as caught:
            node.client.wait_ready(STABLE, 1.0)
        traffic.wait_for(20)
    assert caught.value.retryable
    assert traffic.failures == {}
    assert set(traffic.versions) == {"v1.0.0"}


def test_an_old_replica_that_dies_during_a_stuck_rollout_comes_back(node):
    node.behave(v1_1_0={"never_ready": True})
    node.client.deploy(STABLE, V2, 2)
    victim = next(int(r.pid_or_pod) for r in node.client.status().replicas if r.version == V1)
    os.kill(victim, signal.SIGKILL)
    eventually(
        lambda: (
            sum(r.ready and r.version == V1 for r in node.client.status().replicas) == 2 and victim not in node.pids()
        ),
        what="two old replicas",
    )


def test_a_crash_loop_slows_down_and_is_counted(node):
    node.behave(v1_1_0={"exit_code": 5})
    node.client.deploy(CANARY, V2, 1)
    eventually(lambda: [r.restarts >= 3 for r in node.client.status().replicas if r.track is CANARY] == [True])
    pauses = [event["detail"].rpartition(" in ")[2] for event in node.events("died") if "canary" in event["subject"]]
    assert pauses[-3:] == ["0 s", "0.5 s", "1 s"]
    with pytest.raises(ExternalError, match="exited with code 5") as caught:
        node.client.wait_ready(CANARY, 0.1)
    assert caught.value.retryable, "exit code 5 is a system that did not answer: it may yet"


def test_a_version_that_cannot_be_loaded_is_given_up_on_early(node):
    node.behave(v1_1_0={"exit_code": 4})
    node.client.deploy(CANARY, V2, 1)
    with pytest.raises(ExternalError, match=r"gave up early: .*exited with code 4") as caught:
        node.client.wait_ready(CANARY, 60)
    assert not caught.value.retryable
