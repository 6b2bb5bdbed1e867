"""Run programs in a root filesystem as a container engine would: own process and mount namespaces, root read-only, the
image's own user and environment, a network of its own unless it must reach the test's servers. Needs root."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from deployments.images.dockerfile import ImageConfig
from tests.support.replica import wait_until


@dataclass(frozen=True)
class Jail:
    """A root filesystem, what its image says, folders of the host that are readable in it, and what is writable."""

    root: Path
    config: ImageConfig
    writable: Sequence[str]
    readable: Mapping[Path, str]
    hosts_network: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self, command: Sequence[str], log: Path) -> Iterator[Process]:
        """`command` as process 1, until the end of the block."""
        script = "\n".join([*self._mounts(), f"exec {self._enter(command)}"])
        apart = ["--mount", "--pid", "--ipc", *([] if self.hosts_network else ["--net"])]
        with log.open("wb") as output:
            outer = subprocess.Popen(
                ["unshare", *apart, "--fork", "--kill-child", "/bin/sh", "-ec", script],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Process(self, outer, log)
        finally:
            outer.kill()  # --kill-child takes process 1 along
            outer.wait(10)

    def _mounts(self) -> list[str]:
        at = shlex.quote(str(self.root))
        lines = ["mount --make-rprivate /", f"mount --bind {at} {at}"]
        lines += [] if self.hosts_network else ["ip link set lo up"]
        lines += [f"mount --bind -o ro {shlex.quote(str(host))} {at}{place}" for host, place in self.readable.items()]
        lines += [f"mount -t tmpfs -o uid=10001,gid=10001,mode=0700 none {at}{place}" for place in self.writable]
        lines += [f"mount -t proc proc {at}/proc", f"mount --rbind -o ro /dev {at}/dev"]
        return [*lines, f"mount -o remount,bind,ro {at}"]

    def _enter(self, command: Sequence[str]) -> str:
        environment = [f"{name}={value}" for name, value in (self.config.environment | self.environment).items()]
        inside = ["env", "-i", *environment, "sh", "-c", f'cd {self.config.workdir} && exec "$@"', "sh", *command]
        return shlex.join(["chroot", f"--userspec={self.config.user}", "--groups=", str(self.root), *inside])

    def enter(self, pid: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run `command` beside the process `pid`, as `docker exec` does."""
        into = ["nsenter", "--target", str(pid), "--mount", "--net", "--pid", "--ipc", "/bin/sh", "-ec"]
        return subprocess.run([*into, self._enter(command)], capture_output=True, text=True, timeout=60, check=False)


@dataclass(frozen=True)
class Process:
    """A program that was started in a jail."""

    jail: Jail
    outer: subprocess.Popen[bytes]
    log: Path

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Beside it."""
        [inner] = wait_until(lambda: psutil.Process(self.outer.pid).children(), 10, "process 1")
        return self.jail.enter(inner.pid, command)

    def terminate(self) -> int:
        """SIGTERM to process 1, as the kubelet sends it; its exit status."""
        [inner] = psutil.Process(self.outer.pid).children()
        inner.send_signal(signal.SIGTERM)
        return self.outer.wait(20)

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")
