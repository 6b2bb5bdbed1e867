"""The gateway against a replica asked directly, and a canary, promotion and rollback under 50 requests/s.

Throughput with stub replicas (`tests/support/stub_replica.py`), so that the gateway is what is measured; the rollout
with them and with the real service.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.node.upstream import Pool
from tests.support.node import NodeProcess, Traffic, running_node
from tests.support.replica import photo
from tests.support.tiny_model import write_tiny_model

V1, V2 = Version(1, 0, 0), Version(1, 1, 0)
CONNECTIONS = 16
SECONDS = 4.0
BODY = bytes(2_000)
PATIENCE_S = 90.0


def main() -> dict[str, Any]:
    """Requests/s and failed requests; see the module's text."""
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as folder:
        with running_node(Path(folder) / "stub") as node:
            measured = {"throughput": _throughput(node), "rollout": _rollout(node, b"leaf")}
        model = write_tiny_model(Path(folder) / "model").parent
        command = (sys.executable, "-m", "ml.serve", "--model", str(model))
        with running_node(Path(folder) / "serve", command=command, cluster={"ready_timeout_s": 90.0}) as node:
            node.client.deploy(Track.stable, V1, 1)
            node.client.wait_ready(Track.stable, PATIENCE_S)
            return {**measured, "rollout_of_ml_serve": _rollout(node, photo(side_px=384))}


def _throughput(node: NodeProcess) -> dict[str, float]:
    cluster = node.client
    cluster.deploy(Track.stable, V1, 1)
    cluster.wait_ready(Track.stable, PATIENCE_S)
    assert node.process is not None
    gateway = psutil.Process(node.process.pid)
    direct_port = int(cluster.status().replicas[0].address.rpartition(":")[2])
    direct = uvloop.run(_load(direct_port))
    before = sum(gateway.cpu_times()[:2])
    through = uvloop.run(_load(int(node.gateway_url.rpartition(":")[2])))
    cpu_s = sum(gateway.cpu_times()[:2]) - before
    return {
        "direct_per_s": round(direct["count"] / SECONDS),
        "gateway_per_s": round(through["count"] / SECONDS),
        "gateway_per_cpu_s": round(through["count"] / cpu_s),
        "ratio": round(through["count"] / direct["count"], 2),
        "direct_p50_ms": direct["p50_ms"],
        "gateway_p50_ms": through["p50_ms"],
        "gateway_p99_ms": through["p99_ms"],
        "failed": through["failed"],
    }


async def _load(port: int) -> dict[str, float]:
    """Closed loop on `CONNECTIONS` kept connections."""
    head = b"POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(
        BODY
    )
    pool, taken, failed = Pool(port), list[float](), 0
    over = time.monotonic() + SECONDS

    async def worker() -> None:
        nonlocal failed
        while (began := time.monotonic()) < over:
            answer = await pool.send(head, BODY, 10.0)
            failed += answer.status != 200
            taken.append((time.monotonic() - began) * 1e3)

    await asyncio.gather(*(worker() for _ in range(CONNECTIONS)))
    pool.abort()
    cuts = statistics.quantiles(taken, n=100)
    return {"count": len(taken), "failed": failed, "p50_ms": round(cuts[49], 2), "p99_ms": round(cuts[98], 2)}


def _rollout(node: NodeProcess, body: bytes) -> dict[str, Any]:
    """Canary, promotion, rollback while users send 50 requests/s; every answer must be 200."""
    cluster = node.client
    with Traffic(node.gateway_url, 50.0, body) as traffic:
        cluster.scale(Track.stable, 2)
        cluster.wait_ready(Track.stable, PATIENCE_S)
        cluster.deploy(Track.canary, V2, 1)
        cluster.wait_ready(Track.canary, PATIENCE_S)
        for share in (0.05, 0.25, 0.5):
            cluster.set_weights({Track.stable: 1 - share, Track.canary: share}, lease_s=30)
            traffic.wait_for(100)
            cluster.renew_lease(30)
        cluster.deploy(Track.stable, V2, 2)
        cluster.wait_ready(Track.stable, PATIENCE_S)
        cluster.set_weights({Track.stable: 1.0})
        cluster.remove(Track.canary)
        traffic.wait_for(100)
        began = time.monotonic()
        cluster.rollback(V1, 2)
        rollback_s = time.monotonic() - began
        traffic.wait_for(50)
    return {
        "requests": traffic.statuses.total(),
        "failed": sum(traffic.failures.values()),
        "failures": traffic.failures,
        "versions": dict(traffic.versions),
        "p99_ms": round(statistics.quantiles(traffic.latencies_s, n=100)[98] * 1e3, 1),
        "rollback_s": round(rollback_s, 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
