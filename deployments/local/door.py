"""The stack on one more address than the loopback, for pods: `python -m deployments.local.door ADDRESS PORT...`.

It passes bytes on to the same port of the loopback. The servers themselves stay where they are, and what of them has no
password (SeaweedFS's inner ports) stays closed to others.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from configs.errors import ConfigError, ExternalError
from configs.settings import PROJECT_ROOT
from deployments.local.ports import LOOPBACK
from deployments.local.process import Launch
from deployments.local.site import Site

# What pods use, by the part that it belongs to. Each asks for a password (Site.prefect_auth for Prefect's).
OPENED: Final = {"object-store": "s3", "postgres": "postgres", "prefect-server": "prefect"}
_CHUNK: Final = 1 << 17
_LOOK_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Door:
    """One forwarder for all of `parts` that run here."""

    site: Site
    parts: tuple[str, ...]
    name: str = "door"
    needs: tuple[str, ...] = ()
    # Its ports are those of the parts behind it, on another address: nothing is chosen for it.
    ports: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """Where pods knock."""
        return f"{self._host}, ports {', '.join(map(str, self._numbers))}"

    def prepare(self) -> None:
        """Refuse an address that is not this machine's.

        Raises:
            ConfigError: it is not.
        """
        with socket.socket(_family(self._host), socket.SOCK_STREAM) as probe:
            try:
                probe.bind((self._host, 0))
            except OSError as error:
                raise ConfigError(
                    f"stack.listen: {self._host} is no address of this machine ({error.strerror}); pods cannot reach "
                    "the stack. Next: `ip -brief address` lists them; `khet down`, then `khet up --listen ADDRESS`."
                ) from error

    def launch(self) -> Launch:
        """This module."""
        argv = (sys.executable, "-m", "deployments.local.door", self._host, *map(str, self._numbers))
        env = self.site.python_environment(self.name)
        return Launch(argv, env, PROJECT_ROOT, self.site.layout.log(self.name))

    def check(self) -> str:
        """Whether it lets anybody in."""
        for port in self._numbers:
            try:
                socket.create_connection((self._host, port), timeout=3).close()
            except OSError as error:
                raise ExternalError(f"door: {self._host}:{port} is closed: {error}") from error
        return f"{len(self._numbers)} ports are open"

    def furnish(self) -> None:
        """Nothing."""

    @property
    def _host(self) -> str:
        return str(self.site.settings.stack.listen)

    @property
    def _numbers(self) -> tuple[int, ...]:
        return tuple(self.site.ports[OPENED[part]] for part in self.parts)


async def serve(host: str, ports: list[int]) -> None:
    """Pass connections on until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await asyncio.gather(*(_keep(host, port, stop) for port in ports))


async def _keep(host: str, port: int, stop: asyncio.Event) -> None:
    """Listen while there is a server behind: SeaweedFS does not start while anybody listens at its port, on whichever
    address that is."""
    listening: asyncio.Server | None = None
    while not stop.is_set():
        behind = await _answers(port)
        if behind and listening is None:
            listening = await asyncio.start_server(_to(port), host, port, limit=_CHUNK)
        elif not behind and listening is not None:
            listening.close()
            listening = None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _LOOK_S)
    if listening is not None:
        listening.close()


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    return True


def _to(port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner: asyncio.StreamWriter | None = None
        try:
            from_inner, inner = await asyncio.open_connection(LOOPBACK, port, limit=_CHUNK)
            await asyncio.gather(_pass_on(reader, inner), _pass_on(from_inner, writer))
        except OSError:
            pass  # nobody is behind the door yet, or an end went away: the other one is told by the closing
        finally:
            for end in filter(None, (writer, inner)):
                end.close()

    return handle


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Bytes until there are no more, and then the end of them: each direction ends by itself."""
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def main() -> None:
    """Entry point."""
    host, *ports = sys.argv[1:]
    asyncio.run(serve(host, [int(port) for port in ports]))


if __name__ == "__main__":
    main()
