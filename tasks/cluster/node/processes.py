"""Replica processes: started in sessions of their own, so that they outlive the node, and found again after it died."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from configs.errors import ExternalError
from tasks.cluster.node.state import ReplicaRecord

# Marks that a replica carries in its environment; without the prefix of settings, which refuse names they do not know.
OWNER = "REPLICA_OF_NODE"
NAME = "REPLICA_NAME"
EXIT_UNKNOWN = -1000  # an adopted process died: only its parent could have learned the code
# Below Linux's ephemeral ports (32768..60999), so that no outgoing connection takes a port before its replica does.
_PORTS = range(20_000, 32_000)


@dataclass(slots=True)
class Handle:
    """A process that leads its own group: our child (`child` set) or an adopted one."""

    pid: int
    created: float
    child: subprocess.Popen[bytes] | None = None

    def exit_code(self) -> int | None:
        """None while it runs; negative: killed by that signal."""
        if self.child is not None:
            return self.child.poll()
        return None if _is_alive(self.pid, self.created) else EXIT_UNKNOWN

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; a process that is gone is fine."""
        if self.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def start(command: Sequence[str], environment: dict[str, str], log: Path) -> Handle:
    """Start a process that appends its output to `log`.

    Raises:
        ExternalError: the operating system refused.
    """
    try:
        with log.open("ab") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        return Handle(child.pid, psutil.Process(child.pid).create_time(), child)
    except (OSError, psutil.Error) as error:
        raise ExternalError(f"cannot start {command[0]}: {error}. It will be tried again.") from error


def marks(owner: Path, name: str) -> dict[str, str]:
    """Environment variables by which `find` knows a replica again."""
    return {OWNER: str(owner), NAME: name}


def find(owner: Path) -> dict[str, Handle]:
    """Every running replica that a node of this folder started, by name."""
    found: dict[str, Handle] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) != process.pid:
                continue  # a helper inside a replica's group
            marked = process.environ()
            if marked.get(OWNER) == str(owner) and _is_alive(process.pid, process.create_time()):
                found[marked.get(NAME, "")] = Handle(process.pid, process.create_time())
    return found


def memory(handles: Iterable[Handle]) -> tuple[int, int]:
    """Bytes that could be had without swapping, and those the largest of these processes holds (0 without any)."""
    held = [0]
    for handle in handles:
        with contextlib.suppress(psutil.Error):
            held.append(psutil.Process(handle.pid).memory_info().rss)
    return psutil.virtual_memory().available, max(held)


def is_same(record: ReplicaRecord, handle: Handle) -> bool:
    """Whether the process is the one on record (or the record was written just before its start)."""
    return record.pid in (0, handle.pid)


def free_port(taken: Collection[int]) -> int:
    """A port on the loopback that nobody listens on now.

    Raises:
        ExternalError: none was found.
    """
    for _ in range(200):
        port = random.choice(_PORTS)
        if port not in taken and _can_bind(port):
            return port
    raise ExternalError(f"no free port among {_PORTS.start}-{_PORTS.stop}; no replica was started.")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _is_alive(pid: int, created: float) -> bool:
    """Whether this very process runs. A second of tolerance: the boot time in /proc moves when the clock is set."""
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < 1.0)
    except psutil.NoSuchProcess:
        return False
