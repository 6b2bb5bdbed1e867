"""Ending the stack in an order that loses nothing: who uses a server ends before it. With and without supervisor."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable

from deployments.local import process, stack
from deployments.local.files import Layout, read_json
from deployments.local.node import ask_to_shut_down, recorded_replicas
from deployments.local.ports import LOOPBACK, remembered
from deployments.local.process import Identity
from deployments.local.seaweedfs import shared_sockets

_SERVERS = ("prefect-server", "postgres", "object-store")
# Seen on a busy machine: Prefect 0.3 s, PostgreSQL 0.1 s, the object store 3.2 s.
_SERVERS_S = 4.5
_PREFECT_S = 1.5
_KILLED_IN_S = 1.0


def stop_everything(layout: Layout, timeout_s: float) -> None:
    """Stop flow runs, worker, replicas and node, then the servers; what is left after `timeout_s` is killed."""
    deadline = time.monotonic() + timeout_s
    running = stack.running(layout)
    # Half of the time: replicas deliver their last predictions to the object store, which then needs the other half.
    _end_users(layout, running, timeout_s / 2)
    _end_servers(running, min(deadline, time.monotonic() + _SERVERS_S))
    _kill(stack.leftovers(layout.root))
    for socket in shared_sockets(remembered(layout.ports)):
        socket.unlink(missing_ok=True)
    for name in running:
        layout.pid(name).unlink(missing_ok=True)


def _end_users(layout: Layout, running: dict[str, Identity], timeout_s: float) -> None:
    asked = threading.Thread(target=_shut_node_down, args=(layout, timeout_s), daemon=True)
    if "node" in running:
        asked.start()
    flow_runs = process.marked(layout.root, "prefect-worker")
    for who in flow_runs:
        who.signal(signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    process.wait_gone(flow_runs, timeout_s)
    if "node" in running:
        asked.join(max(deadline - time.monotonic(), 0.0))
    serving = [*process.marked(layout.root, "node"), *recorded_replicas(layout.root)]
    for who in serving:
        who.signal(signal.SIGTERM)
    process.wait_gone(serving, max(deadline - time.monotonic(), 0.1))
    _kill([who for who in (*flow_runs, *serving) if who.alive])


def _end_servers(running: dict[str, Identity], deadline: float) -> None:
    """The object store takes longest and nobody needs it any more; PostgreSQL still serves the ending Prefect."""
    for name in ("object-store", "prefect-server"):
        if name in running:
            running[name].signal(signal.SIGTERM)
    if "prefect-server" in running:
        # In the middle of its start it hears no signal: the kill at the end is harmless then.
        process.wait_gone([running["prefect-server"]], _PREFECT_S)
    if "postgres" in running:
        running["postgres"].signal(signal.SIGINT)  # rolls running transactions back; SIGTERM would wait for clients
    servers = [running[name] for name in _SERVERS if name in running]
    process.wait_gone(servers, max(deadline - time.monotonic(), 0.1))


def _shut_node_down(layout: Layout, timeout_s: float) -> None:
    token = (read_json(layout.credentials) or {}).get("node_token")
    port = remembered(layout.ports).get("node")
    if token and port:
        ask_to_shut_down(f"http://{LOOPBACK}:{port}", str(token), timeout_s)


def _kill(processes: Iterable[Identity]) -> None:
    killed = list(processes)
    for who in killed:
        who.signal(signal.SIGKILL)
    process.wait_gone(killed, _KILLED_IN_S)
