"""Ports: chosen once, remembered, and chosen again only when a stranger sits on one."""

from __future__ import annotations

import os
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
# SeaweedFS's maintenance worker looks for the admin server at its port + 10000, whatever it was told.
_PAIRED = {"weed_admin": "weed_admin_grpc"}
PAIR_OFFSET = 10_000
# SeaweedFS's inner gRPC ports have a socket in /tmp beside them: its source fixes that place, no option moves them.
_SOCKETS = {
    "master_grpc": "master",
    "volume_grpc": "volume",
    "filer_grpc": "filer",
    "s3_grpc": "s3",
    "weed_admin_grpc": "admin",
}
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


def shared_socket(name: str, port: int) -> Path | None:
    """The socket outside of the home folder that a server makes beside this port; None: it makes none.

    It removes it when it ends, and it stays after a kill -9.
    """
    there = _SOCKETS.get(name)
    return Path(f"/tmp/seaweedfs-{there}-grpc-{port}.sock") if there else None  # noqa: S108


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
    for name in (n for n in NAMES if n not in _PAIRED.values()):
        if name in own and name in ports:
            continue
        others = {port for other, port in ports.items() if other not in (name, _PAIRED.get(name))}
        wanted = fixed.get(name, 0) or ports.get(name, 0)
        if wanted and _suits(name, wanted, others):
            ports[name] = wanted
        elif fixed.get(name, 0):
            raise ConfigError(
                f"stack.{name}_port: {wanted} is taken by another program. Nothing was started. "
                "Next: stop that program, set another port, or set 0 to have one chosen."
            )
        else:
            ports[name] = _free_port(name, others)
        if name in _PAIRED:
            ports[_PAIRED[name]] = ports[name] + PAIR_OFFSET
    write_json(path, ports)
    return ports


def _suits(name: str, port: int, others: set[int]) -> bool:
    wanted = {name: port, **({_PAIRED[name]: port + PAIR_OFFSET} if name in _PAIRED else {})}
    return all(p not in others and p < 65_536 and is_free(p) and not _barred(n, p) for n, p in wanted.items())


def _barred(name: str, port: int) -> bool:
    """Whether another user's server, killed or running, left its socket there: nobody else may take it away."""
    path, me = shared_socket(name, port), os.geteuid()
    try:
        return path is not None and me not in (0, path.lstat().st_uid)
    except FileNotFoundError:
        return False


def _free_port(name: str, others: set[int]) -> int:
    last = LAST - PAIR_OFFSET if name in _PAIRED else LAST
    for _ in range(500):
        port = random.randint(FIRST, last)
        if _suits(name, port, others):
            return port
    raise ExternalError(f"No free port between {FIRST} and {LAST} was found. Nothing was started.")
