"""A real, tiny HTTP replica for tests of the node: the command line and endpoints of `ml.serve`, no model.

STUB_BEHAVIOUR or --behaviour names a JSON file, read at every start:
{"v1.1.0": {"answer": "late_blight", "error_share": 0.1}, ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
import uvloop

QUIET_S = 0.1
BOUNDS_S = (0.005, 0.05, 0.5, float("inf"))


@dataclass(frozen=True)
class Behaviour:
    """How one version behaves. `exit_code`: ends at once with it; `crash_after`: dies while answering this request;
    `reset_share`: closes the connection instead of answering; `die_if_exists`: ends at a start while this file is."""

    answer: str = "healthy"
    ood_share: float = 0.0
    latency_ms: float = 0.0
    error_share: float = 0.0
    busy_share: float = 0.0
    reset_share: float = 0.0
    start_delay_s: float = 0.0
    never_ready: bool = False
    exit_code: int | None = None
    crash_after: int | None = None
    keep_alive_s: float | None = None
    ignore_sigterm: bool = False


class Stub:
    """What all connections share."""

    def __init__(self, version: str, name: str, behaviour: Behaviour) -> None:
        self.version = version
        self.name = name
        self.behaviour = behaviour
        self.predictions = 0
        self.in_flight = 0
        self.draining = False
        self.answered_at = 0.0
        self.ready_at = time.monotonic() + behaviour.start_delay_s
        self.started = time.time()
        self.statuses: Counter[int] = Counter({200: 0})
        self.seconds: list[float] = []
        self.classes: Counter[str] = Counter()
        self.no_leaf = 0
        self._shares = dict.fromkeys(("error", "busy", "reset", "ood"), 0.0)

    def ready(self) -> bool:
        return not self.behaviour.never_ready and time.monotonic() >= self.ready_at

    def due(self, kind: str, share: float) -> bool:
        """Exactly this share of the calls, evenly."""
        self._shares[kind] += share
        if self._shares[kind] < 1.0 - 1e-9:
            return False
        self._shares[kind] -= 1.0
        return True

    def note(self, status: int, answer: dict[str, Any], seconds: float) -> None:
        """Count an answer; one to a copy is nobody's."""
        if "x-khet-shadow" in answer["headers"]:
            return
        self.statuses[status] += 1
        self.seconds.append(seconds)
        if status == 200:
            self.classes[answer["class"]] += 1
            self.no_leaf += not answer["is_leaf"]

    def metrics(self) -> str:
        """The series of `ml.serve` that a judge reads."""
        labels = f'version="{self.version}",path="/predict"'
        within = [(bound, sum(s <= bound for s in self.seconds)) for bound in BOUNDS_S]
        lines = [
            f"process_start_time_seconds {self.started}",
            *[f'http_requests_total{{status="{status}",{labels}}} {n}' for status, n in self.statuses.items()],
            *[
                f'http_request_duration_seconds_bucket{{le="{"+Inf" if bound > 1e9 else bound}",{labels}}} {n}'
                for bound, n in within
            ],
            *[
                f'model_predictions_total{{class="{name}",version="{self.version}"}} {n}'
                for name, n in self.classes.items()
            ],
            f'model_ood_total{{version="{self.version}"}} {self.no_leaf}',
        ]
        return "".join(f"{line}\n" for line in lines)


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._begin()

    def data_received(self, data: bytes) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._size += len(body)

    def on_message_complete(self) -> None:
        url, headers, size = self._url, self._headers, self._size
        if url.partition("?")[0] == "/predict":
            self._predict(headers, size)
        elif url == "/readyz":
            self._send(200 if self._stub.ready() else 503, {})
        elif url == "/metrics":
            self._write(200, self._stub.metrics().encode(), "text/plain; version=0.0.4")
        else:
            self._send(200, {"version": self._stub.version, "name": self._stub.name, "started": self._stub.started})

    def _begin(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._headers: dict[str, str] = {}
        self._url, self._size = "", 0

    def _predict(self, headers: dict[str, str], size: int) -> None:
        stub, how = self._stub, self._stub.behaviour
        stub.predictions += 1
        if how.crash_after is not None and stub.predictions > how.crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if stub.due("reset", how.reset_share):
            self._transport.abort()
            return
        status = 503 if stub.due("busy", how.busy_share) else 500 if stub.due("error", how.error_share) else 200
        answer = {
            "class": how.answer,
            "is_leaf": not stub.due("ood", how.ood_share),
            "model_version": stub.version,
            "replica": stub.name,
            "bytes": size,
            "headers": headers,
        }
        stub.in_flight += 1
        if how.latency_ms:
            asyncio.get_running_loop().call_later(how.latency_ms / 1e3, self._finish, status, answer)
        else:
            self._finish(status, answer)

    def _finish(self, status: int, answer: dict[str, Any]) -> None:
        self._stub.in_flight -= 1
        self._stub.note(status, answer, self._stub.behaviour.latency_ms / 1e3)
        self._send(status, answer)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        self._write(status, json.dumps(answer).encode(), "application/json")

    def _write(self, status: int, body: bytes, kind: str) -> None:
        named = {"Content-Type": kind, "Content-Length": len(body), "X-Model-Version": self._stub.version}
        if self._stub.draining:
            named["Connection"] = "close"
        head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        if not self._transport.is_closing():
            self._transport.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)
        self._begin()
        self._stub.answered_at = time.monotonic()
        if self._stub.draining:
            self._transport.close()
        if (idle := self._stub.behaviour.keep_alive_s) is not None:
            self._idle = asyncio.get_running_loop().call_later(idle, self._transport.close)


async def serve(stub: Stub, host: str, port: int) -> None:
    """Serve until SIGTERM, then as `ml.serve` does: finish what is under way, and tell clients to leave until none
    has come for a moment."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if stub.behaviour.ignore_sigterm else over.set)
    server = await loop.create_server(lambda: Connection(stub), host, port)
    await over.wait()
    stub.draining, stub.answered_at = True, time.monotonic()
    while stub.in_flight or time.monotonic() - stub.answered_at < QUIET_S:
        await asyncio.sleep(0.01)
    server.close()


def main() -> int:
    """Run one replica."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--behaviour", default=os.environ.get("STUB_BEHAVIOUR"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    version = os.environ["MODEL_VERSION"]
    file = options.behaviour
    behaviour = Behaviour(**json.loads(Path(file).read_text()).get(version, {})) if file else Behaviour()
    print(f"{options.name} serves {version} on port {options.port}", flush=True)
    if behaviour.exit_code is not None:
        print(f"cannot load {version}: this is the reason", flush=True)
        return behaviour.exit_code
    uvloop.run(serve(Stub(version, options.name, behaviour), options.host, options.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
