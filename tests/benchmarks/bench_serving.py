"""How much of the machine's limit is left once HTTP, limits, metrics and the prediction log are around the model.

The limit is decode + Predictor.run in one process on the server's core; the service runs on the same core, the load
generator on another one. Slices of both alternate, because other work on the machine comes and goes; each is also
taken per CPU-second, which such work disturbs less.

    python -m tests.benchmarks.bench_serving --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import uvloop
from rich.console import Console
from rich.table import Table

from ml.images import decode
from ml.predictor import Predictor
from tests.support.conv_model import write_conv_model
from tests.support.replica import ROOT, Replica, running, store_environment
from tests.support.stack import object_store

CONNECTIONS = 32
_PHOTOS = 64
_TARGET_BYTES = 20_000
_SLICES = 6
_RESULT = "result.json"


def main(seconds: float = 20.0) -> dict[str, float]:
    """Measure for about `seconds` of load; returns the numbers that the table shows."""
    server_core, client_core = _cores()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        tmp = Path(name)
        write_conv_model(tmp / "model")
        _write_photos(tmp / "photos")
        environment = {"OMP_WAIT_POLICY": "PASSIVE"}
        pin = ["taskset", "-c", str(server_core)]
        with object_store(tmp / "s3") as store:
            arguments = ["--model", str(tmp / "model"), "--log-predictions"]
            with running(tmp, arguments, environment | store_environment(store), prefix=pin) as replica:
                _child(pin, "load", str(tmp), "1", replica.url)  # what is imported late is imported now
                slices = [_slice(replica, tmp, seconds / _SLICES, pin, client_core) for _ in range(_SLICES)]
                result = _summary(slices) | _log_counts(replica)
    _show(result)
    return result


def _slice(replica: Replica, tmp: Path, seconds: float, pin: list[str], client_core: int) -> dict[str, Any]:
    limit = _child(pin, "limit", str(tmp), str(max(1.0, seconds / 3)))
    cpu_before = _cpu_seconds(replica.process.pid)
    load = _child(["taskset", "-c", str(client_core)], "load", str(tmp), str(seconds), replica.url)
    load["server_cpu_s"] = _cpu_seconds(replica.process.pid) - cpu_before
    return {"limit": limit, "load": load}


def _summary(slices: list[dict[str, Any]]) -> dict[str, float]:
    latencies = np.concatenate([part["load"]["latencies_ms"] for part in slices])
    requests = len(latencies)
    rate = requests / sum(part["load"]["wall_s"] for part in slices)
    per_cpu = requests / sum(part["load"]["server_cpu_s"] for part in slices)
    limit = statistics.median(part["limit"]["images_per_s"] for part in slices)
    limit_per_cpu = statistics.median(part["limit"]["images_per_cpu_s"] for part in slices)
    p50, p99 = (float(value) for value in np.percentile(latencies, (50, 99)))
    return {
        "requests_per_s": rate,
        "limit_images_per_s": limit,
        "share_of_limit": rate / limit,
        "requests_per_server_cpu_s": per_cpu,
        "limit_images_per_cpu_s": limit_per_cpu,
        "share_of_limit_by_cpu": per_cpu / limit_per_cpu,
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_over_p50": p99 / p50,
        "requests": float(requests),
        "failures": float(sum(part["load"]["failures"] for part in slices)),
    }


def _log_counts(replica: Replica) -> dict[str, float]:
    return {
        "log_rows_written": replica.metric("prediction_log_rows_total", result="written"),
        "log_rows_dropped": replica.metric("prediction_log_rows_total", result="dropped"),
        "rss_mb": replica.rss_bytes() / 1e6,
    }


def _show(result: dict[str, float]) -> None:
    table = Table(title=f"Serving one 384 px JPEG of 20 KB at {CONNECTIONS} connections, one server core")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:,.2f}" if value < 100 else f"{value:,.0f}")
    Console().print(table)


def _cores() -> tuple[int, int]:
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _write_photos(folder: Path) -> None:
    folder.mkdir()
    for seed in range(_PHOTOS):
        (folder / f"{seed}.jpg").write_bytes(_photo(seed))


def _photo(seed: int) -> bytes:
    """Colours at three scales plus grain, compressed to about 20 KB: as busy as a leaf on soil."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((384, 384, 3), dtype=np.float32)
    for cells, weight in ((6, 0.5), (24, 0.3), (96, 0.2)):
        layer = random.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
        pixels += weight * cv2.resize(layer, (384, 384), interpolation=cv2.INTER_CUBIC)
    pixels += random.normal(0, 3, pixels.shape).astype(np.float32)
    rgb = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
    sizes = {quality: simplejpeg.encode_jpeg(rgb, quality=quality) for quality in range(20, 96, 5)}
    return bytes(min(sizes.values(), key=lambda data: abs(len(data) - _TARGET_BYTES)))


# The two children; each leaves its numbers in a file. --------------------------------------------------------------


def _child(prefix: list[str], *arguments: str) -> dict[str, Any]:
    """Run one and read what it wrote; its second argument is the folder."""
    command = [*prefix, sys.executable, "-m", "tests.benchmarks.bench_serving", "--child", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return dict(json.loads((Path(arguments[1]) / _RESULT).read_text(encoding="utf-8")))


def _report(folder: Path, numbers: dict[str, Any]) -> None:
    (folder / _RESULT).write_text(json.dumps(numbers), encoding="utf-8")


def _run_limit(folder: Path, seconds: float) -> dict[str, Any]:
    """Decode and predict in this process, one image at a time."""
    predictor = Predictor(folder / "model" / "model.onnx")
    photos = _photos(folder)
    px = predictor.metadata.px
    for data in photos[:20]:
        predictor.run(decode(data, px)[None])
    count, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        predictor.run(decode(photos[count % len(photos)], px)[None])
        count += 1
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {"images_per_s": count / wall_s, "images_per_cpu_s": count / cpu_s}


class _Client(asyncio.Protocol):
    """One keep-alive connection that sends the next photo as soon as the last is answered."""

    def __init__(self, requests: list[bytes], first: int, result: dict[str, Any]) -> None:
        self._requests = requests
        self._next = first
        self._result = result
        self._buffer = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        self._transport: Any = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        """Collect one answer, then send again."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator or len(body) < int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0]):
            return
        self._result["latencies_ms"].append(1e3 * (time.perf_counter() - self._sent_at))
        self._result["failures"] += not head.startswith(b"HTTP/1.1 200")
        self._buffer = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that the server closes is a failure."""
        self._result["failures"] += not self._result["over"]

    def _send(self) -> None:
        if self._result["over"]:
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1


async def _run_load(folder: Path, seconds: float, url: str) -> dict[str, Any]:
    host, port = url.removeprefix("http://").split(":")
    head = "POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"
    requests = [head.format(len(data)).encode() + data for data in _photos(folder)]
    result: dict[str, Any] = {"latencies_ms": [], "failures": 0, "over": False}
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    for index in range(CONNECTIONS):
        await loop.create_connection(lambda first=index: _Client(requests, first, result), host, int(port))  # type: ignore[misc]
    await asyncio.sleep(seconds)
    result["over"] = True
    result["wall_s"] = time.perf_counter() - started
    await asyncio.sleep(0.5)
    return result


def _photos(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "photos").iterdir())]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--child", nargs="+", default=())
    return parser.parse_args()


if __name__ == "__main__":
    chosen = _arguments()
    if not chosen.child:
        main(chosen.seconds)
    elif chosen.child[0] == "limit":
        _report(Path(chosen.child[1]), _run_limit(Path(chosen.child[1]), float(chosen.child[2])))
    else:
        _report(
            Path(chosen.child[1]),
            uvloop.run(_run_load(Path(chosen.child[1]), float(chosen.child[2]), chosen.child[3])),
        )
