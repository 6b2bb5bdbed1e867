"""`khet up`, `khet down` and `khet status`: they talk to the supervisor by lock, signal and state file."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pydantic import ValidationError

from configs import settings as configured
from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from configs.settings import PROJECT_ROOT, Settings, check_areas, home, load_settings
from deployments.local import process, stack
from deployments.local.files import Layout
from deployments.local.process import Identity, Launch
from deployments.local.site import Site, remember
from deployments.local.state import PartEvent, PartState, Phase, StackState
from deployments.local.stopping import stop_everything

OnEvent = Callable[[PartEvent], None]
_POLL_S = 0.05
# Longer than the supervisor takes to stop everything: `khet down` promises less than 10 s.
_DOWN_S = 9.4
_spawned: list[subprocess.Popen[bytes]] = []


def _ignore(event: PartEvent) -> None:
    """Nobody listens."""


def up(settings: Settings, *, on_event: OnEvent = _ignore, wait_for: Collection[str] | None = None) -> StackState:
    """Start the stack, or what is missing of it, and return when it is healthy.

    `wait_for` names the parts to wait for (None: all, nothing: none); the others go on starting in the background.
    A named part that is external has nothing to wait for.
    Ports, credentials and the settings file are complete before the first event.

    Raises:
        SafetyError: another `khet up` is at it right now, or the stack was stopped meanwhile.
        ConfigError: the home folder, a setting or a missing program prevents the start.
        ExternalError: a part did not become healthy; the message names it and ends with its last log lines.
    """
    if unknown := sorted(set(wait_for or ()) - stack.NAMES):
        raise ConfigError(f"wait_for: {', '.join(unknown)}: no such part (known: {', '.join(sorted(stack.NAMES))})")
    layout = Layout(home())
    layout.make()
    with _only_one_up(layout):
        started = time.monotonic()
        supervisor = _running_supervisor(layout)
        if supervisor is None:
            supervisor = _start_supervisor(settings, layout)
        return _follow(layout, supervisor, wait_for, settings.stack.start_timeout_s + 10, on_event, started)


def choose(*, listen: str | None = None, backend: str | None = None) -> None:
    """Keep two choices in the settings file, before `up`: the address that pods reach this stack at (`loopback`: none),
    and what replicas are, processes of a local node or pods of Kubernetes. None leaves a choice as it is.

    Raises:
        ConfigError: no such address or backend. Nothing was changed.
        SafetyError: the stack runs as it was chosen before. Nothing was changed.
    """
    address = None if listen == "loopback" else listen
    chosen: dict[str, dict[str, str | None]] = {
        **({"stack": {"listen": address}} if listen is not None else {}),
        **({"cluster": {"backend": backend}} if backend is not None else {}),
    }
    check_areas(chosen, "khet up")
    current, layout = load_settings(), Layout(home())
    same = (
        listen is None or address == (str(current.stack.listen) if current.stack.listen else None),
        backend in (None, current.cluster.backend),
    )
    if all(same):
        return
    if process.recall(layout.supervisor) is not None:
        raise SafetyError(
            "The stack runs as it was chosen before; nothing was changed. Next: `khet down`, then the same again."
        )
    remember(layout, chosen)


def down(*, on_event: OnEvent = _ignore) -> None:
    """Stop everything of the stack in under 10 s, supervised or not. Stopping a stopped stack is fine."""
    layout = Layout(home())
    if not layout.run.exists():
        return
    started = time.monotonic()
    before = status()
    left = {part.name for part in before.parts if part.state is not Phase.stopped}
    supervisor = _supervisor_soon(layout)
    if supervisor is not None:
        supervisor.signal(signal.SIGTERM)
        _watch_stop(layout, supervisor, left, on_event, started)
        supervisor.signal(signal.SIGKILL)
    if stack.leftovers(layout.root):
        stop_everything(layout, 4.0)
    for name in sorted(left):
        _tell(on_event, name, Phase.stopped, "stopped", started)
    layout.supervisor.unlink(missing_ok=True)
    layout.state.unlink(missing_ok=True)


def status() -> StackState:
    """What runs where, from the supervisor's file and the process table; it asks no server and is fast."""
    layout = Layout(home())
    published = _read_state(layout)
    if published is None:
        return StackState(home=str(layout.root))
    supervised = process.recall(layout.supervisor) is not None
    running = stack.running(layout)
    parts = tuple(_corrected(part, running.get(part.name), supervised) for part in published.parts)
    return published.model_copy(update={"parts": parts} | ({} if supervised else {"supervisor": None}))


def _corrected(part: PartState, who: Identity | None, supervised: bool) -> PartState:
    if who is None and part.state is Phase.running:
        state = Phase.starting if supervised else Phase.stopped
        return part.model_copy(update={"state": state, "pid": None, "since": None, "detail": "its process has ended"})
    if who is None and not supervised:
        return part.model_copy(update={"state": Phase.stopped, "pid": None, "since": None})
    if not supervised:
        return part.model_copy(update={"detail": "runs without a supervisor; `khet up` takes it over"})
    return part


def _start_supervisor(settings: Settings, layout: Layout) -> Identity:
    try:
        site = Site.prepare(settings, layout.root, stack.ports_in_use(layout))
        configured.settings.cache_clear()
        layout.state.unlink(missing_ok=True)
        env = site.python_environment("supervisor")
        log = layout.log("supervisor")
        argv = (sys.executable, "-m", "deployments.local.supervisor")
        child = process.spawn(Launch(argv, env, PROJECT_ROOT, log))
        # Kept, so that a long-lived caller can reap it; the supervisor itself does not care who its parent is.
        _spawned.append(child)
        who = process.identify(child.pid)
        if who is None:
            raise ExternalError(f"The supervisor ended at once.\n{tail(log)}")
        process.remember(layout.supervisor, who)
    except OSError as error:
        raise ExternalError(
            f"{layout.root}: {error}. Nothing was started. Next: make room or mend the folder, then `khet up`."
        ) from error
    return who


def _follow(
    layout: Layout, supervisor: Identity, wait_for: Collection[str] | None, timeout_s: float, on_event: OnEvent,
    started: float,
) -> StackState:  # fmt: skip
    shown: dict[str, tuple[Phase, str]] = {}
    while True:
        alive = _alive(supervisor)
        state = _read_state(layout)
        if state is not None:
            _show_changes(state, shown, on_event, started)
            _refuse_hopeless(layout, state, wait_for)
            if state.supervisor is not None and state.supervisor.stopping:
                raise SafetyError("The stack was stopped while it was starting. Next: `khet up` starts it again.")
            if _is_there(state, wait_for):
                return status()
        if not alive:
            raise _why_it_ended(layout)
        if time.monotonic() - started > timeout_s:
            raise ExternalError(f"The stack was not healthy after {timeout_s:.0f} s. Next: `khet status`.")
        time.sleep(_POLL_S)


def _is_there(state: StackState, wait_for: Collection[str] | None) -> bool:
    wanted = [p for p in state.parts if wait_for is None or p.name in wait_for]
    return bool(state.parts) and all(p.state is Phase.running for p in wanted)


def _refuse_hopeless(layout: Layout, state: StackState, wait_for: Collection[str] | None) -> None:
    for part in state.parts:
        if part.state is Phase.failed and (wait_for is None or part.name in wait_for):
            if part.error == ConfigError.__name__:
                raise ConfigError(part.detail)
            raise ExternalError(
                f"{part.name} does not start: {part.detail}. The other parts keep running; it is tried again now and "
                f"then. Next: `khet status`, `khet doctor`, or `khet down`.\nLast lines of {layout.log(part.name)}:\n"
                f"{tail(layout.log(part.name))}"
            )


def _show_changes(state: StackState, shown: dict[str, tuple[Phase, str]], on_event: OnEvent, started: float) -> None:
    for part in state.parts:
        now = (part.state, part.detail if part.state is not Phase.running else "")
        if shown.get(part.name) != now:
            shown[part.name] = now
            _tell(on_event, part.name, part.state, part.detail, started)


def _tell(on_event: OnEvent, part: str, state: Phase, detail: str, started: float) -> None:
    on_event(PartEvent(part=part, state=state, detail=detail, elapsed_s=round(time.monotonic() - started, 2)))


def _watch_stop(layout: Layout, who: Identity, left: set[str], on_event: OnEvent, started: float) -> None:
    """Tell which of `left` have ended, and take them off, until the supervisor itself has."""
    while _alive(who) and time.monotonic() - started < _DOWN_S:
        running = stack.running(layout)
        for name in sorted(left - running.keys()):
            _tell(on_event, name, Phase.stopped, "stopped", started)
            left.discard(name)
        time.sleep(_POLL_S)


def _running_supervisor(layout: Layout) -> Identity | None:
    """The supervisor, unless it is on its way out: then its end is waited for."""
    who = process.recall(layout.supervisor)
    state = _read_state(layout)
    if who and state and state.supervisor and state.supervisor.pid == who.pid and state.supervisor.stopping:
        process.wait_gone([who], _DOWN_S)
        return process.recall(layout.supervisor)
    return who


def _supervisor_soon(layout: Layout) -> Identity | None:
    """The supervisor; one that an `up` is just about to start is waited for a moment."""
    deadline = time.monotonic() + 2.0
    while (who := process.recall(layout.supervisor)) is None and time.monotonic() < deadline:
        try:
            with _only_one_up(layout):
                return process.recall(layout.supervisor)
        except SafetyError:
            time.sleep(_POLL_S)
    return who


@contextlib.contextmanager
def _only_one_up(layout: Layout) -> Iterator[None]:
    path = layout.run / "up.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SafetyError(
                f"Another `khet up` is starting the stack in {layout.root} right now. Nothing was changed. "
                "Next: wait for it, or look with `khet status`."
            ) from error
        yield
    finally:
        os.close(handle)


def _alive(who: Identity) -> bool:
    for child in _spawned:
        child.poll()
    return who.alive


def _why_it_ended(layout: Layout) -> KhetError:
    text = tail(layout.log("supervisor"))
    return ExternalError(f"The supervisor ended while the stack was starting.\n{text}", retryable=False)


def _read_state(layout: Layout) -> StackState | None:
    try:
        return StackState.model_validate_json(layout.state.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def tail(path: Path, lines: int = 15, max_bytes: int = 20_000) -> str:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            kept = collections.deque(file.read().decode(errors="replace").splitlines(), maxlen=lines)
    except OSError as error:
        return f"({path}: {error.strerror})"
    return "\n".join(kept)
