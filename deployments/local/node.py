"""The model's local node: replicas as processes behind one gateway. The program is `tasks.cluster.node`."""

from __future__ import annotations

import importlib.util
import signal
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ExternalError
from configs.settings import PROJECT_ROOT
from deployments.local.files import read_json
from deployments.local.process import Identity, Launch, identify
from deployments.local.site import Site

MODULE = "tasks.cluster.node"
NODE_PORTS = ("node", "gateway")
# Start times of the replicas' records are seconds since the epoch, computed from clock ticks: they differ in rounding.
_SAME_START_S = 2.0


def is_installed() -> bool:
    """Whether this version of the project has a node."""
    try:
        return importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class Node:
    """Control API and gateway. Its replicas live in sessions of their own and outlast it."""

    site: Site
    name: str = "node"
    needs: tuple[str, ...] = ("object-store",)
    ports: tuple[str, ...] = NODE_PORTS
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """Where predictions are asked for."""
        return self.site.url("gateway")

    def prepare(self) -> None:
        """Nothing: the node makes its own folder."""

    def launch(self) -> Launch:
        """The node reads everything from the settings file of the home folder."""
        env = self.site.python_environment(self.name)
        return Launch((sys.executable, "-m", MODULE), env, PROJECT_ROOT, self.site.layout.log(self.name))

    def check(self) -> str:
        """The control API's own health answer."""
        url = f"{self.site.url('node')}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=3) as answer:  # noqa: S310  (always http to the loopback)
                return f"HTTP {answer.status}"
        except OSError as error:
            raise ExternalError(f"node: {url} does not answer: {error}") from error

    def furnish(self) -> None:
        """Nothing."""


def ask_to_shut_down(node_url: str, token: str, timeout_s: float) -> bool:
    """Ask the node to drain and end its replicas and itself; whether it agreed."""
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(  # noqa: S310  (the stack's own address)
        f"{node_url}/shutdown", data=b"", method="POST", headers=headers
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            return bool(answer.status < 300)
    except OSError:  # not running, or too slow: its processes are ended by signals next
        return False


def recorded_replicas(root: Path) -> list[Identity]:
    """The replicas written down below the home folder that still run, whether or not a node watches them."""
    found = []
    for path in (root / "node" / "replicas").glob("*.json"):
        record = read_json(path) or {}
        pid, created = record.get("pid"), record.get("create_time")
        if isinstance(pid, int) and isinstance(created, int | float) and _started_at(pid, float(created)):
            who = identify(pid)
            found += [who] if who else []
    return found


def _started_at(pid: int, created: float) -> bool:
    import psutil

    try:
        return abs(float(psutil.Process(pid).create_time()) - created) < _SAME_START_S
    except psutil.Error:
        return False
