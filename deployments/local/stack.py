"""Which parts a stack consists of, and which of their processes are found running."""

from __future__ import annotations

from pathlib import Path

from deployments.local import node, process
from deployments.local.door import OPENED, Door
from deployments.local.files import Layout
from deployments.local.node import NODE_PORTS, Node
from deployments.local.parts import Part
from deployments.local.postgres import Postgres
from deployments.local.prefect_parts import PrefectServer, PrefectWorker
from deployments.local.process import Identity
from deployments.local.seaweedfs import WEED_PORTS, ObjectStore
from deployments.local.site import Site

NAMES = frozenset({"object-store", "postgres", "prefect-server", "prefect-worker", "node", "door"})
PART_PORTS = {"object-store": WEED_PORTS, "postgres": ("postgres",), "prefect-server": ("prefect",), "node": NODE_PORTS}


def parts(site: Site) -> list[Part]:
    """The embedded parts, as the settings ask for them."""
    chosen: list[Part] = []
    if site.settings.stack.object_store == "embedded":
        chosen.append(ObjectStore(site))
    if site.settings.stack.database == "embedded":
        chosen.append(Postgres(site))
    if site.settings.stack.orchestrator == "embedded":
        chosen += [PrefectServer(site), PrefectWorker(site)]
    if site.settings.cluster.backend == "local-node" and node.is_installed():
        chosen.append(Node(site, needs=("object-store",) if site.settings.stack.object_store == "embedded" else ()))
    opened = tuple(part.name for part in chosen if part.name in OPENED)
    if site.settings.stack.listen is not None and opened:
        chosen.append(Door(site, opened))
    return chosen


def running(layout: Layout) -> dict[str, Identity]:
    """The parts that were written down and still run."""
    found = {path.stem: process.recall(path) for path in layout.run.glob("*.json") if path.stem not in _NOT_PARTS}
    return {name: who for name, who in found.items() if who}


def ports_in_use(layout: Layout) -> set[str]:
    """Names of the ports that our own running parts hold."""
    return {port for name in running(layout) for port in PART_PORTS.get(name, ())}


def leftovers(root: Path) -> list[Identity]:
    """Every process of the stack in `root`, except its supervisor and this process: parts, replicas, flow runs."""
    layout = Layout(root)
    everything = {*process.marked(root), *running(layout).values(), *node.recorded_replicas(root)}
    everything.update(_postgres_children(root))
    supervisor = process.recall(layout.supervisor)
    return [who for who in everything if who != supervisor]


_NOT_PARTS = {"state", "supervisor"}


def _postgres_children(root: Path) -> list[Identity]:
    from deployments.local.postgres import server_processes

    return server_processes(Layout(root).data("postgres") / "data")
