"""A model's life on a real cluster, with the real serving image, under users' requests: no request fails, every number
is kept, and tools that nobody here wrote see what the flows report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cluster_stack import ClusterStack
from tests.support.node import Traffic
from tests.support.replica import photo
from tests.support.variants import disturb_weights, publish_variant

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
RATE_PER_S = 50
REQUESTS = 10_000
RELEASE_S, WARM_S, COLD_S, SWITCH_S = 240, 20, 60, 2


def kubectl(stack: ClusterStack, *arguments: str) -> str:
    program = Path(sys.executable).with_name("kubectl")
    command = [program, "--kubeconfig", stack.namespace.kubeconfig, "-n", stack.namespace.name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=dict(os.environ)).stdout


def timed(stack: ClusterStack, *arguments: str) -> tuple[Any, float]:
    began = time.monotonic()
    return stack.json(*arguments), time.monotonic() - began


def agree(stack: ClusterStack, version: str) -> None:
    """The registry, Kubernetes and plain HTTP say that `version` serves everybody."""
    assert stack.production() == version
    assert stack.traffic() == {version: 1.0}
    assert kubectl(stack, "rollout", "status", "deployment/ml-service", "--timeout=30s").endswith("rolled out\n")
    assert f"serve {version}" in kubectl(stack, "rollout", "history", "deployment/ml-service").splitlines()[-2]
    pods = json.loads(kubectl(stack, "get", "pods", "-l", "khet.guard/track=stable", "-o", "json"))["items"]
    running = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    assert {pod["metadata"]["labels"]["app.kubernetes.io/version"] for pod in running} == {version}
    assert httpx.get(f"{stack.gateway()}/version", timeout=10).json()["version"] == version


def test_a_model_lives_on_the_cluster_and_no_request_fails(
    cluster_stack: ClusterStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = replace(cluster_stack, environment=dict(cluster_stack.environment))
    first = stack.production()
    assert first is not None
    agree(stack, first)
    second = publish_variant(stack, monkeypatch, tmp_path, disturb_weights(1))

    with Traffic(stack.gateway(), RATE_PER_S, photo(), keep_alive=False) as users:

        def back(to: str, from_: str) -> float:
            """Roll back; seconds from the command until the version that served answered nobody any more."""
            users.wait_for(100)
            began = time.monotonic()
            assert stack.json("rollback")["outcome"] == "rolled_back"
            agree(stack, to)
            return users.last_s(from_, began)

        stack.environment["KHET_CLUSTER__KEEP_PREVIOUS_S"] = "600"
        ended, release_s = timed(stack, "release", "--version", second)
        assert ended["outcome"] == "promoted"
        agree(stack, second)
        warm_s = back(first, second)

        stack.environment["KHET_CLUSTER__KEEP_PREVIOUS_S"] = "0"
        began = time.monotonic()
        assert stack.json("blue-green", "--version", second, "--watch", "10")["outcome"] == "promoted"
        agree(stack, second)
        switch_s = users.switch_s(first, second, began)

        assert stack.json("rolling-update", "--version", first)["outcome"] == "promoted"
        agree(stack, first)
        cold_s = back(second, first)
        users.wait_for(max(0, REQUESTS - users.statuses.total()))
    seconds = {"release": release_s, "warm rollback": warm_s, "cold rollback": cold_s, "blue-green switch": switch_s}
    with capsys.disabled():
        print(f"\nseconds: { {name: round(value, 1) for name, value in seconds.items()} }; answers: {users.statuses}")
    assert users.failures == {}
    assert users.versions.keys() == {first, second}
    assert release_s <= RELEASE_S
    assert warm_s <= WARM_S
    assert cold_s <= COLD_S
    assert switch_s < SWITCH_S
