"""Ports: chosen once, remembered, and chosen again only when a stranger sits on one."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from configs.errors import ConfigError, ExternalError
from deployments.local.files import read_json, write_json

LOOPBACK = "127.0.0.1"
NAMES = (
    "s3", "s3_grpc", "master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "weed_admin",
    "weed_admin_grpc", "postgres", "prefect", "node", "gateway",
)  # fmt: skip
# Below Linux's default range for outgoing connections (32768-60999): a remembered port is not taken by a mere client.
FIRST, LAST = 20_000, 32_000


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of the loopback now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def remembered(path: Path) -> dict[str, int]:
    """The ports chosen before; those that make no sense are left out."""
    stored = read_json(path) or {}
    return {n: stored[n] for n in NAMES if isinstance(stored.get(n), int) and 0 < stored[n] < 65_536}


def choose(path: Path, fixed: Mapping[str, int], in_use: Iterable[str] = ()) -> dict[str, int]:
    """A port for every name: the fixed ones, then the remembered ones, else free ones; the result is remembered.

    `in_use` names ports on which our own running parts listen: they are kept without a look.

    Raises:
        ConfigError: a fixed port is taken by another program.
    """
    ports, own = remembered(path), set(in_use)
    for name in NAMES:
        wanted = fixed.get(name, 0) or ports.get(name, 0)
        if name in own and name in ports:
            continue
        if wanted and is_free(wanted) and wanted not in (p for n, p in ports.items() if n != name):
            ports[name] = wanted
        elif fixed.get(name, 0):
            raise ConfigError(
                f"stack.{name}_port: {wanted} is taken by another program. Nothing was started. "
                "Next: stop that program, set another port, or set 0 to have one chosen."
            )
        else:
            ports[name] = _free_port(set(ports.values()))
    write_json(path, ports)
    return ports


def _free_port(taken: set[int]) -> int:
    for _ in range(500):
        port = random.randint(FIRST, LAST)
        if port not in taken and is_free(port):
            return port
    raise ExternalError(f"No free port between {FIRST} and {LAST} was found. Nothing was started.")
