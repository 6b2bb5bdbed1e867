"""The whole local stack below a folder of the test's own, driven as a person does: with `khet`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.settings import PROJECT_ROOT, Settings
from ml.objects import ObjectStore
from tasks.cluster import ClusterStatus, cluster
from tasks.registry import Registry
from tasks.rollout import journal

KHET = [sys.executable, "-c", "from flows.cli import main; main()"]


@dataclass
class LocalStack:
    """A running stack and how to use it."""

    home: Path
    environment: dict[str, str]
    faults: Path

    def khet(self, *arguments: str, code: int | None = 0, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; `code` None accepts any exit code."""
        done = subprocess.run(
            [*KHET, *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=PROJECT_ROOT,
            timeout=timeout_s,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, (
                f"khet {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        """Run a command with --json and read its answer."""
        return json.loads(self.khet(*arguments, "--json", code=code).stdout)

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command and leave it running."""
        log = (self.home / "begun.log").open("ab")
        return subprocess.Popen([*KHET, *arguments], stdout=log, stderr=log, env=self.environment, cwd=PROJECT_ROOT)

    def settings(self) -> dict[str, Any]:
        """What the stack wrote for its clients."""
        return dict(yaml.safe_load((self.home / "settings.yaml").read_text()))

    def gateway(self) -> str:
        """Where predictions are asked for."""
        return str(self.settings()["cluster"]["gateway_url"])

    # What is looked at again and again is read in this process: a command a look would cost more than what it watches.

    def typed(self) -> Settings:
        """The settings as the flows of this stack read them."""
        return Settings(**self.settings())

    def releases(self) -> list[dict[str, Any]]:
        """Every release's record."""
        store = self.typed().object_store
        return [r.model_dump(mode="json") for r in journal.releases(ObjectStore(store), store.models_bucket)]

    def production(self) -> str | None:
        """The version the alias points at."""
        alias = Registry.from_settings(self.typed()).alias("production")
        return str(alias.version) if alias else None

    def versions(self) -> set[str]:
        """Published versions."""
        return {str(info.version) for info in Registry.from_settings(self.typed()).versions()}

    def cluster(self) -> ClusterStatus:
        """What the node says."""
        return cluster(self.typed()).status()

    def traffic(self) -> dict[str, float]:
        """Share of the traffic by version."""
        status = self.cluster()
        return {str(status.versions[track]): share for track, share in status.weights.items() if share}

    def set_faults(self, faults: dict[str, dict[str, float]]) -> None:
        """What the replicas of these versions do wrong, from their next start."""
        self.faults.write_text(json.dumps(faults))


def start_local_stack(home: Path, **variables: str) -> LocalStack:
    """`khet up` below `home`; replicas are the real service, with the faults that a test asks for."""
    faults = home / "faults.json"
    home.mkdir(parents=True, exist_ok=True)
    faults.write_text("{}")
    environment = {
        **os.environ,
        "KHET_HOME": str(home),
        "KHET_TEST_FAULTS": str(faults),
        "KHET_CLUSTER__REPLICA_COMMAND": json.dumps([sys.executable, "-m", "tests.support.chaos_replica"]),
        "PREFECT_LOGGING_TO_API_ENABLED": "true",
        **variables,
    }
    environment.pop("PREFECT_HOME", None)
    stack = LocalStack(home, environment, faults)
    try:
        stack.khet("up", timeout_s=240)
    except BaseException:
        stack.khet("down", code=None)
        raise
    return stack


def wait_until(what: str, condition: Callable[[], Any], timeout_s: float = 60.0, poll_s: float = 0.1) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(poll_s)
    return value


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9, and reap."""
    process.send_signal(signal.SIGKILL)
    process.wait(10)


def aws(stack: LocalStack, *arguments: str) -> Sequence[str]:
    """The AWS command line against the stack's store; its output's lines."""
    store = stack.settings()["object_store"]
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": store["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": store["secret_access_key"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "awscli", "--endpoint-url", store["endpoint_url"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60)
    return done.stdout.splitlines()
