"""The orchestrator: Prefect's server, and one worker that runs flows as processes."""

from __future__ import annotations

import importlib.metadata
import signal
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import ExternalError
from configs.settings import PROJECT_ROOT, Settings
from deployments.local.files import Layout, private_folder
from deployments.local.ports import LOOPBACK
from deployments.local.postgres import recreate_database
from deployments.local.prefect_api import PrefectApi, ensure_automations, ensure_pool
from deployments.local.process import Launch
from deployments.local.site import PREFECT_DATABASE, Site

WORKER_NAME = "khet-local"
_WORKER_HEARTBEAT_S = 10


def flow_environment(settings: Settings, root: Path) -> dict[str, str]:
    """Variables of every process that runs flows of this stack, the terminal's own included; set before `prefect`."""
    environment = {
        "PREFECT_HOME": str(Layout(root).prefect),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(max(30, settings.orchestrator.heartbeat_s)),
        # A restarting server is waited for: the default 5 retries give up after about a minute.
        "PREFECT_CLIENT_MAX_RETRIES": "8",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    if settings.orchestrator.api_url:
        environment["PREFECT_API_URL"] = settings.orchestrator.api_url
    if settings.orchestrator.auth_string:
        environment["PREFECT_API_AUTH_STRING"] = settings.orchestrator.auth_string.get_secret_value()
    return environment


def api_of(site: Site) -> PrefectApi:
    """The stack's own API."""
    return PrefectApi(site.api_url, site.prefect_auth)


@dataclass(frozen=True, slots=True)
class PrefectServer:
    """API, UI and the background services in one process."""

    site: Site
    name: str = "prefect-server"
    ports: tuple[str, ...] = ("prefect",)
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """The UI."""
        return self.site.url("prefect")

    @property
    def needs(self) -> tuple[str, ...]:
        """The database, where it is PostgreSQL."""
        return ("postgres",) if self.site.prefect_on_postgres else ()

    @property
    def _sqlite(self) -> Path:
        return self.site.layout.prefect / "prefect.db"

    @property
    def _database_url(self) -> str:
        if self.site.prefect_on_postgres:
            return self.site.dsn(PREFECT_DATABASE, PREFECT_DATABASE).replace("postgresql:", "postgresql+asyncpg:", 1)
        return f"sqlite+aiosqlite:///{self._sqlite}"

    @property
    def _kind(self) -> str:
        return f".initialised-{'postgres' if self.site.prefect_on_postgres else 'sqlite'}"

    @property
    def _initialised(self) -> Path:
        """Touched when this database first answered under this version of Prefect."""
        return self.site.layout.prefect / f"{self._kind}-{importlib.metadata.version('prefect')}"

    def prepare(self) -> None:
        """Its folder; a database that was killed during its very first migration is begun anew."""
        private_folder(self.site.layout.prefect)
        if any(self.site.layout.prefect.glob(f"{self._kind}-*")):
            return
        if self.site.prefect_on_postgres:
            recreate_database(self.site, PREFECT_DATABASE)
        else:
            for suffix in ("", "-wal", "-shm"):
                self._sqlite.with_name(self._sqlite.name + suffix).unlink(missing_ok=True)

    def launch(self) -> Launch:
        """uvicorn with Prefect's own application: without Prefect's command line it is ready seconds earlier."""
        port, prefect = str(self.site.ports["prefect"]), "prefect.server.api.server:create_app"
        argv = (sys.executable, "-m", "uvicorn", "--factory", prefect, "--host", LOOPBACK, "--port", port)
        quick = ("--timeout-keep-alive", "5", "--timeout-graceful-shutdown", "2", "--log-level", "warning")
        env = self.site.python_environment(self.name, **self._environment())
        return Launch((*argv, *quick), env, self.site.layout.prefect, self.site.layout.log(self.name))

    def check(self) -> str:
        """The API and its database."""
        api_of(self.site).call("GET", "/ready")
        return "ready"

    def furnish(self) -> None:
        """The worker's pool and the automations that end dead runs."""
        api = api_of(self.site)
        ensure_pool(api, self.site.settings.orchestrator.work_pool)
        ensure_automations(api, self.site.settings.orchestrator.heartbeat_s)
        self._initialised.touch()

    def _environment(self) -> dict[str, str]:
        environment = flow_environment(self.site.settings, self.site.layout.root) | {
            "PREFECT_API_URL": self.site.api_url,
            "PREFECT__SERVER_FINAL": "1",
            "PREFECT_SERVER_API_HOST": LOOPBACK,
            "PREFECT_SERVER_API_PORT": str(self.site.ports["prefect"]),
            "PREFECT_SERVER_UI_API_URL": self.site.api_url,
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            # Else it unpacks them beside its own code, which may be read-only and belongs to every stack.
            "PREFECT_UI_STATIC_DIRECTORY": str(self.site.layout.prefect / "ui"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self._database_url,
            # In memory (the default) a server restart would crash a healthy run at its first lease renewal.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            # Events alone is the default; flow runs would be kept for ever.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            "PREFECT_SERVER_ENCRYPTION_KEY": self.site.secrets.prefect_encryption_key,
            # Once a Prefect version has registered its block types in this database it need not do so at every start.
            "PREFECT_API_BLOCKS_REGISTER_ON_START": "false" if self._initialised.exists() else "true",
        }
        if self.site.prefect_auth:
            environment["PREFECT_SERVER_API_AUTH_STRING"] = self.site.prefect_auth
            environment["PREFECT_API_AUTH_STRING"] = self.site.prefect_auth
        return environment


@dataclass(frozen=True, slots=True)
class PrefectWorker:
    """Runs what is started from the UI, by schedule, or by an event."""

    site: Site
    name: str = "prefect-worker"
    ports: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """The pool it serves."""
        return f"work pool {self.site.settings.orchestrator.work_pool}"

    @property
    def needs(self) -> tuple[str, ...]:
        """What its server needs: it waits for the server by itself, and imports Prefect side by side with it."""
        return ("postgres",) if self.site.prefect_on_postgres else ()

    def prepare(self) -> None:
        """Nothing: its pool is made by the server part."""

    def launch(self) -> Launch:
        """The process worker; flow runs inherit this environment and import this project."""
        argv = (
            sys.executable,
            "-m",
            "deployments.local.worker",
            self.site.settings.orchestrator.work_pool,
            WORKER_NAME,
        )
        environment = flow_environment(self.site.settings, self.site.layout.root) | {
            "PREFECT_API_URL": self.site.api_url,
            "PREFECT_WORKER_QUERY_SECONDS": f"{self.site.settings.stack.worker_poll_s:g}",
            "PREFECT_WORKER_HEARTBEAT_SECONDS": str(_WORKER_HEARTBEAT_S),
        }
        if self.site.prefect_auth:
            environment["PREFECT_API_AUTH_STRING"] = self.site.prefect_auth
        env = self.site.python_environment(self.name, **environment)
        return Launch(argv, env, PROJECT_ROOT, self.site.layout.log(self.name))

    def check(self) -> str:
        """Its heartbeat as the server saw it, since this process was started."""
        seen = last_heartbeat(api_of(self.site), self.site.settings.orchestrator.work_pool)
        started = datetime.fromtimestamp(self.site.layout.pid(self.name).stat().st_mtime, UTC)
        if seen is None or seen < started:
            raise ExternalError("prefect-worker: has not reported to the server yet")
        age_s = (datetime.now(UTC) - seen).total_seconds()
        if age_s > 6 * _WORKER_HEARTBEAT_S:
            raise ExternalError(f"prefect-worker: last heartbeat {age_s:.0f} s ago")
        return f"heartbeat {max(age_s, 0.0):.0f} s ago"

    def furnish(self) -> None:
        """Nothing."""


def last_heartbeat(api: PrefectApi, pool: str) -> datetime | None:
    """When the stack's worker last reported; None when it never did."""
    workers = api.call("POST", f"/work_pools/{pool}/workers/filter", {}, missing_ok=True) or []
    times = [w["last_heartbeat_time"] for w in workers if w.get("name") == WORKER_NAME and w.get("last_heartbeat_time")]
    return max(map(datetime.fromisoformat, times)) if times else None
