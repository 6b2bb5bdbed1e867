"""A running local node in a folder of its own, with stub replicas, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from configs.areas import ClusterSettings
from tasks.cluster import Track
from tasks.cluster.local_node import LocalNode

STUB = Path(__file__).with_name("stub_replica.py")


def eventually(condition: Callable[[], Any], timeout_s: float = 15.0, what: str = "") -> Any:
    """The condition's value as soon as it is true; AssertionError when it is not in time."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        pause.wait(0.02)
    return value


def free_port() -> int:
    """A port that is free now, below the ephemeral ones."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = 32_000 + secrets.randbelow(700)
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class NodeProcess:
    """A node that is started, killed and started again on the same folder."""

    home: Path
    command: tuple[str, ...] = (sys.executable, str(STUB))
    environment: dict[str, str] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)
    areas: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(16)
        self.gateway_url = f"http://127.0.0.1:{free_port()}"
        self.node_url = f"http://127.0.0.1:{free_port()}"
        self.behaviour_file = self.home / "behaviour.json"
        self.users = httpx.Client(timeout=15.0)
        self.behave()

    @property
    def settings(self) -> ClusterSettings:
        return ClusterSettings(
            node_url=self.node_url,
            node_token=self.token,
            gateway_url=self.gateway_url,
            replica_command=self.command,
            **{"health_interval_s": 0.2, "ready_timeout_s": 20.0, **self.cluster},
        )

    @functools.cached_property
    def client(self) -> LocalNode:
        return LocalNode.from_settings(self.settings)

    @property
    def log(self) -> str:
        return (self.home / "node.log").read_text()

    def behave(self, **versions: dict[str, Any]) -> None:
        """Set how versions behave that start from now on: behave(v1_1_0={"answer": "rust"})."""
        named = {version.replace("_", "."): how for version, how in versions.items()}
        self.behaviour_file.write_text(json.dumps(named))

    def start(self, *, wait: bool = True) -> NodeProcess:
        """Start the process; with `wait` until its control API answers."""
        settings = self.settings.model_dump(mode="json", exclude={"node_token"}, exclude_none=True)
        areas = {"cluster": {**settings, "node_token": self.token}, "serving": {"drain_s": 2.0, **self.serving}}
        (self.home / "settings.yaml").write_text(json.dumps({**areas, **self.areas}))
        env = {name: value for name, value in os.environ.items() if not name.startswith("KHET_")}
        env |= {"KHET_HOME": str(self.home), "STUB_BEHAVIOUR": str(self.behaviour_file), **self.environment}
        with (self.home / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.cluster.node"], env=env, stdout=log, stderr=log, start_new_session=True
            )
        if wait:
            eventually(self.answers, 20.0, "the node's control API")
        return self

    def answers(self) -> bool:
        """Whether the control API answers."""
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with contextlib.suppress(httpx.HTTPError):
            return self.users.get(f"{self.node_url}/healthz", timeout=1.0).is_success
        return False

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the node alone a signal and wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(10)

    def stop(self) -> None:
        """End the node and whatever replicas it left."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.client.shutdown()
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(10)
        from tasks.cluster.node import processes

        for handle in processes.find(self.home / "node").values():
            handle.signal(signal.SIGKILL)

    def predict(self, body: bytes = b"leaf", **headers: str) -> httpx.Response:
        """One request through the gateway."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.users.post(f"{self.gateway_url}/predict", content=body, headers=named)

    def pids(self, track: Track = Track.stable) -> list[int]:
        """Processes of the track's replicas."""
        return [int(r.pid_or_pod) for r in self.client.status().replicas if r.track is track]

    def events(self, kind: str) -> list[dict[str, str]]:
        """Events of a kind."""
        return [event for event in self.client.events(1000) if event["kind"] == kind]


@contextlib.contextmanager
def running_node(home: Path, **options: Any) -> Iterator[NodeProcess]:
    """A started node, ended afterwards."""
    node = NodeProcess(home, **options)
    try:
        yield node.start()
    finally:
        node.stop()


@dataclass
class Traffic:
    """Requests at a fixed rate from a thread of their own. `failures` are answers other than 200 and errors.

    Without `keep_alive` each request has a connection of its own: one that is kept stays with its pod.
    """

    url: str
    rate_per_s: float = 50.0
    body: bytes = b"leaf"
    keep_alive: bool = True
    statuses: Counter[str] = field(default_factory=Counter)
    tracks: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    answered: list[tuple[float, str]] = field(default_factory=list)  # when (monotonic clock, s), and by which version
    latencies_s: list[float] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    @property
    def failures(self) -> dict[str, int]:
        return {status: count for status, count in self.statuses.items() if status != "200"}

    def switch_s(self, old: str, new: str, since: float) -> float:
        """Seconds from the first answer of `new` since then until the last one of `old`; 0 where none came after."""
        began = min(at for at, version in self.answered if version == new and at >= since)
        return max([at - began for at, version in self.answered if version == old and at >= began], default=0.0)

    def last_s(self, version: str, since: float) -> float:
        """Seconds from then until the last answer of `version`; 0 where none came."""
        return max([at - since for at, answered in self.answered if answered == version and at >= since], default=0.0)

    def wait_for(self, count: int) -> None:
        """Return when this many more requests were answered."""
        wanted = self.statuses.total() + count
        eventually(lambda: self.statuses.total() >= wanted, 30.0 + count / self.rate_per_s, f"{count} more requests")

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(force_close=not self.keep_alive)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session:
            tasks: set[asyncio.Task[None]] = set()
            due = time.monotonic()
            while not self._over.is_set():
                tasks.add(asyncio.create_task(self._one(session)))
                tasks = {task for task in tasks if not task.done()}
                due += 1.0 / self.rate_per_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await asyncio.gather(*tasks)

    async def _one(self, session: aiohttp.ClientSession) -> None:
        began = time.monotonic()
        try:
            async with session.post(f"{self.url}/predict", data=self.body) as response:
                await response.read()
                self.statuses[str(response.status)] += 1
                self.tracks[response.headers.get("X-Khet-Track", "")] += 1
                version = response.headers.get("X-Model-Version", "")
                self.versions[version] += 1
                self.answered.append((time.monotonic(), version))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.statuses[type(error).__name__] += 1
        self.latencies_s.append(time.monotonic() - began)
