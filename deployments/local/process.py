"""Processes that outlive the one that started them: start, recognise and signal them, and never a stranger."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deployments.local.files import read_json, write_json

# Set in every process of the stack and inherited by its children: leftovers are found by it, whoever their parent is.
MARKER = "_KHET_STACK"
POLL_S = 0.05
# Variables that come from whoever types `khet up`, or that only matter for one start.
VOLATILE = frozenset(
    {
        "PATH",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "LD_LIBRARY_PATH",
        "PYTHONPATH",
        "PREFECT_API_BLOCKS_REGISTER_ON_START",
    }
)


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, for ever: a pid alone is reused, together with its start (clock ticks since boot) it is not."""

    pid: int
    start: int
    boot: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        return identify(self.pid) == self

    def signal(self, number: signal.Signals) -> bool:
        """Send `number` if this very process still runs."""
        if not self.alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a process. `env` is the whole environment; output goes to the end of `log`."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: Path
    log: Path
    user: int | None = None
    volatile: frozenset[str] = VOLATILE

    @property
    def fingerprint(self) -> str:
        """Equal for two launches that would run the same thing; variables of the caller's terminal do not count."""
        env = sorted((k, v) for k, v in self.env.items() if k not in self.volatile)
        return hashlib.sha256(repr((self.argv, str(self.cwd), env, self.user)).encode()).hexdigest()


def identify(pid: int) -> Identity | None:
    """Who has this pid now; None when nobody, or a zombie that only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Identity(pid, int(fields[19]), _boot())


def remember(path: Path, who: Identity, fingerprint: str = "") -> None:
    """Write down who runs, and what it was started as."""
    write_json(path, {"pid": who.pid, "start": who.start, "boot": who.boot, "fingerprint": fingerprint})


def recall(path: Path) -> Identity | None:
    """The process written down in `path` if it is still the same one and still runs."""
    record = read_json(path)
    if record is None:
        return None
    try:
        who = Identity(int(record["pid"]), int(record["start"]), str(record["boot"]))
    except (KeyError, TypeError, ValueError):
        return None
    return who if who.alive else None


def recalled_fingerprint(path: Path) -> str:
    """What the process written down in `path` was started as."""
    return str((read_json(path) or {}).get("fingerprint", ""))


def spawn(launch: Launch) -> subprocess.Popen[bytes]:
    """Start `launch` in a session of its own: it survives the death of this process and its terminal."""
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    # Appending, not a pipe: the part keeps its log when the supervisor dies, and the file can be cut while it runs.
    with launch.log.open("ab") as log:
        return subprocess.Popen(
            launch.argv,
            env=dict(launch.env),
            cwd=launch.cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=launch.user,
            group=launch.user,
            extra_groups=None if launch.user is None else [],
        )


def marked(home: Path, part: str | None = None) -> list[Identity]:
    """Every running process of the stack in `home` (of one part), children and grandchildren included."""
    wanted = f"{MARKER}={marker(home, part) if part else str(home) + '='}".encode()
    others = (pid for pid in pids() if pid != os.getpid())
    return [who for pid in others if _has(pid, wanted, exact=bool(part)) and (who := identify(pid))]


def pids() -> list[int]:
    """Every process there is."""
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def marker(home: Path, part: str) -> str:
    """The value of `MARKER` in the processes of `part`."""
    return f"{home}={part}"


def wait_gone(processes: Iterable[Identity], timeout_s: float, reap: Callable[[], None] = lambda: None) -> bool:
    """Whether all ended in time. `reap` is called between looks, for those that are children of this process."""
    left, deadline = list(processes), time.monotonic() + timeout_s
    while True:
        reap()
        left = [who for who in left if who.alive]
        if not left or time.monotonic() >= deadline:
            return not left
        time.sleep(POLL_S)


def _has(pid: int, wanted: bytes, *, exact: bool) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return False
    return any(v == wanted if exact else v.startswith(wanted) for v in variables)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
