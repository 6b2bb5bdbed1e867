"""A real replica in a process of its own: `python -m ml.serve` on a free port, its log in a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import simplejpeg
from prometheus_client.parser import text_string_to_metric_families

from configs.areas import ObjectStoreSettings

ROOT = Path(__file__).resolve().parents[2]
_LISTENS = re.compile(r"listens on (http://\S+);")


def photo(seed: int = 0, side_px: int = 96, quality: int = 85) -> bytes:
    """A JPEG of smooth colours, different for every seed."""
    small = np.random.default_rng(seed).integers(40, 215, (4, 4, 3))
    pixels = np.kron(small, np.ones((side_px // 4, side_px // 4, 1))).astype(np.uint8)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality))


def wait_until(condition: Callable[[], Any], timeout_s: float = 15.0, what: str = "the condition") -> Any:
    """Poll until `condition()` is truthy; returns it."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout_s:g} s"
        time.sleep(0.02)
    return value


def store_environment(settings: ObjectStoreSettings) -> dict[str, str]:
    """The object store as environment overrides for a child process."""
    values = settings.model_dump(exclude_none=True, exclude={"secret_access_key"})
    named = {f"KHET_OBJECT_STORE__{name.upper()}": str(value) for name, value in values.items()}
    if settings.secret_access_key is not None:
        named["KHET_OBJECT_STORE__SECRET_ACCESS_KEY"] = settings.secret_access_key.get_secret_value()
    return named


@dataclass
class Replica:
    """A started replica. `url` is known once it listens."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=20.0))

    def wait_listening(self) -> None:
        """Until the log says where."""
        match = wait_until(lambda: _LISTENS.search(self.text()) or self.process.poll() is not None, 30.0, "listening")
        assert isinstance(match, re.Match), self.text()
        self.url = match[1]

    def wait_ready(self) -> None:
        """Until /readyz says so."""
        self.wait_listening()
        wait_until(lambda: self.process.poll() is not None or self.get("/readyz").status_code == 200, 30.0, "ready")
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(encoding="utf-8")

    def get(self, path: str) -> httpx.Response:
        """GET."""
        return self.client.get(self.url + path)

    def predict(self, data: bytes, content_type: str = "image/jpeg", **headers: str) -> httpx.Response:
        """POST a raw body."""
        return self.client.post(self.url + "/predict", content=data, headers={"content-type": content_type, **headers})

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the samples `name` that carry these labels; 0 where there is none."""
        samples = [
            sample
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name
        ]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def rss_bytes(self) -> int:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def terminate(self, timeout_s: float = 15.0) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def end(self) -> None:
        """Whatever state it is in."""
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


def launch(
    tmp: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    module: str = "ml.serve",
    prefix: Sequence[str] = (),
) -> Replica:
    """Start `python -m <module> --port 0 <arguments>` with `tmp` as KHET_HOME and no settings of the machine."""
    tmp.mkdir(parents=True, exist_ok=True)
    log = tmp / f"replica-{time.monotonic_ns()}.log"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("KHET_", "MODEL_VERSION"))}
    command = [*prefix, sys.executable, "-m", module, "--port", "0", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, "KHET_HOME": str(tmp), **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return Replica(process, log)


@contextlib.contextmanager
def running(
    tmp: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    module: str = "ml.serve",
    prefix: Sequence[str] = (),
) -> Iterator[Replica]:
    """A ready replica for the length of a `with` block."""
    replica = launch(tmp, arguments, environment, module=module, prefix=prefix)
    try:
        replica.wait_ready()
        yield replica
    finally:
        replica.end()


def error_of(answer: httpx.Response) -> str:
    """The machine-readable error, after checking the form every error has."""
    body = json.loads(answer.content)
    assert set(body) == {"error", "detail", "request_id"}, body
    assert body["request_id"] == answer.headers["x-request-id"]
    return str(body["error"])
