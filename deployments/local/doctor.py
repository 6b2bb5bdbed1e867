"""`khet doctor`: does every part answer in its own protocol, and is the ground it stands on sound."""

from __future__ import annotations

import concurrent.futures
import shutil
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from configs.errors import ConfigError, ExternalError, KhetError
from configs.settings import Settings, home, load_settings
from deployments.local import stack
from deployments.local.files import Layout
from deployments.local.lifecycle import status
from deployments.local.node import is_installed
from deployments.local.ports import is_free, remembered
from deployments.local.postgres import check_database
from deployments.local.prefect_api import PrefectApi, automations
from deployments.local.prefect_parts import last_heartbeat
from deployments.local.seaweedfs import round_trip, s3_client
from deployments.local.state import Check, Phase

LOW_DISK_BYTES = 2_000_000_000
# S3 refuses signatures of clocks that are 15 minutes apart; leases and schedules suffer long before.
CLOCK_SKEW_S = 5.0
_STALE_WORKER_S = 60.0
_RESTART = "`khet up` starts what is missing; `khet status` shows its state and logs/<part>.log says why it ended."

Question = Callable[[Settings], str]


def doctor() -> list[Check]:
    """Ask everything, side by side. A question without an answer is a check that is not ok, never an exception."""
    try:
        settings = load_settings()
    except ConfigError as error:
        return [Check(name="settings", ok=False, detail=str(error), fix="Correct the named key.")]
    questions = {name: asked for name, asked in QUESTIONS.items() if _applies(name, settings)}
    with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
        asked = [pool.submit(_ask, name, question, fix, settings) for name, (question, fix) in questions.items()]
        return [Check(name="settings", ok=True, detail="valid"), *(answer.result() for answer in asked)]


def _applies(name: str, settings: Settings) -> bool:
    """Where replicas are pods, the cluster is asked about them (tasks.cluster.kubernetes.inspection). Where all servers
    run elsewhere too, there is no stack here."""
    stack, on_node = settings.stack, settings.cluster.backend == "local-node"
    runs_here = on_node or "embedded" in (stack.object_store, stack.database, stack.orchestrator)
    return (on_node or name not in _OF_THE_NODE) and (runs_here or name not in _OF_THE_STACK)


def _ask(name: str, question: Question, fix: str, settings: Settings) -> Check:
    try:
        return Check(name=name, ok=True, detail=question(settings))
    except (KhetError, OSError) as error:
        return Check(name=name, ok=False, detail=str(error), fix=fix)


def _supervisor(_settings: Settings) -> str:
    state = status()
    if state.supervisor is None:
        running = [p.name for p in state.parts if p.state is Phase.running]
        raise ExternalError(f"nobody supervises the stack (running without: {', '.join(running) or 'nothing'})")
    restarts = [f"{p.name} {p.restarts}x" for p in state.parts if p.restarts]
    failed = [f"{p.name}: {p.detail}" for p in state.parts if p.state is Phase.failed]
    if failed:
        raise ExternalError("; ".join(failed))
    return f"pid {state.supervisor.pid}; restarts: {', '.join(restarts) or 'none'}"


def _object_store(settings: Settings) -> str:
    store = settings.object_store
    started = time.monotonic()
    client = s3_client(store)
    for bucket in (store.models_bucket, store.data_bucket):
        round_trip(client, bucket)
    return f"{store.endpoint_url or 'AWS'}: put, get, delete in both buckets ({_ms(started)})"


def _database(settings: Settings) -> str:
    if settings.database.dsn is None:
        raise ConfigError("database.dsn is not set: the audit log goes to its spool file only")
    started = time.monotonic()
    version = check_database(settings.database.dsn.get_secret_value(), settings.database.connect_timeout_s)
    return f"{version}: SELECT 1 ({_ms(started)})"


def _prefect(settings: Settings) -> str:
    started = time.monotonic()
    api = _api(settings)
    api.call("GET", "/ready")
    return f"{api.url}: ready ({_ms(started)})"


def _worker(settings: Settings) -> str:
    if settings.stack.orchestrator == "external":
        return "runs elsewhere, as the orchestrator does"
    pool = settings.orchestrator.work_pool
    seen = last_heartbeat(_api(settings), pool)
    if seen is None:
        raise ExternalError(f"no worker of this stack has ever reported to the work pool {pool}")
    age_s = (datetime.now(UTC) - seen).total_seconds()
    if age_s > _STALE_WORKER_S:
        raise ExternalError(f"the worker of the work pool {pool} was last heard of {age_s:.0f} s ago")
    return f"online in the work pool {pool}, heartbeat {max(age_s, 0):.0f} s ago"


def _automations(settings: Settings) -> str:
    wanted = [a["name"] for a in automations(settings.orchestrator.heartbeat_s)]
    query = {"automations": {"name": {"any_": wanted}}}
    found = {a["name"] for a in _api(settings).call("POST", "/automations/filter", query) if a.get("enabled")}
    if missing := [name for name in wanted if name not in found]:
        raise ExternalError(f"missing or switched off: {', '.join(missing)}. Dead runs would stay Running for ever")
    return f"{len(wanted)} enabled"


def _node(settings: Settings) -> str:
    if not is_installed():
        return "this version has no local node"
    return _get(settings.cluster.node_url, "cluster.node_url", "/healthz")


def _gateway(settings: Settings) -> str:
    """Any HTTP answer shows that the gateway listens: without a deployed version its 503 is right."""
    url = settings.cluster.gateway_url
    if not is_installed():
        return "this version has no local node"
    try:
        return _get(url, "cluster.gateway_url", "/healthz")
    except urllib.error.HTTPError as error:
        return f"{url}: listens (HTTP {error.code})"


def _clock(settings: Settings) -> str:
    """Compare with the Date of an answer: the embedded servers share this clock, external ones do not."""
    url = settings.object_store.endpoint_url
    if settings.stack.object_store == "embedded" or url is None:
        return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC; every embedded part uses this clock"
    try:
        answer = urllib.request.urlopen(url, timeout=5)  # noqa: S310  (the operator's own address)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        theirs = parsedate_to_datetime(answer.headers["Date"])
    skew_s = abs((datetime.now(UTC) - theirs).total_seconds())
    if skew_s > CLOCK_SKEW_S:
        raise ExternalError(f"this clock and that of {url} are {skew_s:.0f} s apart")
    return f"within {skew_s:.1f} s of {url}"


def _disk(_settings: Settings) -> str:
    free = shutil.disk_usage(home()).free
    if free < LOW_DISK_BYTES:
        raise ExternalError(f"{home()}: only {free / 1e9:.1f} GB free")
    return f"{home()}: {free / 1e9:.0f} GB free"


def _ports(_settings: Settings) -> str:
    """A port of a part that does not run must not be held by somebody else."""
    layout = Layout(home())
    ours = stack.ports_in_use(layout)
    numbers = remembered(layout.ports)
    wanted = {p.name for p in status().parts}
    idle = {port for part, names in stack.PART_PORTS.items() if part in wanted for port in names} - ours
    if taken := sorted(f"{name} {numbers[name]}" for name in idle if name in numbers and not is_free(numbers[name])):
        raise ExternalError(f"taken by another program: {', '.join(taken)}")
    return f"{len(ours)} in use by this stack, none taken by others"


def _modes(_settings: Settings) -> str:
    layout = Layout(home())
    secret = [layout.credentials, layout.settings, *layout.keys.glob("*.pem")]
    folders = [layout.root, layout.run, layout.logs, layout.keys, layout.prefect]
    open_to_others = [str(p) for p in (*secret, *folders) if p.exists() and _mode(p) & 0o077]
    if open_to_others:
        raise ExternalError(f"readable by others: {', '.join(open_to_others)}")
    if not layout.credentials.exists():
        raise ExternalError(f"{layout.credentials} does not exist: the stack was never started here")
    return f"{len(secret)} files and {len(folders)} folders are private"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _api(settings: Settings) -> PrefectApi:
    orchestrator = settings.orchestrator
    if orchestrator.api_url is None:
        raise ConfigError("orchestrator.api_url is not set")
    auth = orchestrator.auth_string
    return PrefectApi(orchestrator.api_url, auth.get_secret_value() if auth else None)


def _get(url: str | None, key: str, path: str) -> str:
    if url is None:
        raise ConfigError(f"{key} is not set")
    started = time.monotonic()
    with urllib.request.urlopen(f"{url}{path}", timeout=5) as answer:  # noqa: S310  (the stack's own address)
        return f"{url}: HTTP {answer.status} ({_ms(started)})"


def _ms(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:.0f} ms"


_OF_THE_NODE = ("node", "gateway")
_OF_THE_STACK = ("supervisor", "worker", "automations", "ports", "file modes")
QUESTIONS: dict[str, tuple[Question, str]] = {
    "supervisor": (_supervisor, _RESTART),
    "object store": (_object_store, _RESTART),
    "database": (_database, _RESTART),
    "prefect": (_prefect, _RESTART),
    "worker": (_worker, _RESTART),
    "automations": (_automations, "Switch them on in the Prefect UI; `khet up` creates what is missing."),
    "node": (_node, _RESTART),
    "gateway": (_gateway, _RESTART),
    "clock": (_clock, "Let this machine's clock be set by NTP."),
    "disk": (_disk, "Make room, or move the folder and set KHET_HOME."),
    "ports": (_ports, "`khet down`, then `khet up`: another port is chosen and the settings are rewritten."),
    "file modes": (_modes, "`khet up` makes them; chmod go-rwx what is open to others."),
}
