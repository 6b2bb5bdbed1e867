"""One local stack as it was decided: its folders, settings, ports and secrets; and the settings file made of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.base import read_yaml
from configs.settings import PROJECT_ROOT, Settings
from deployments.local import ports as port_choice
from deployments.local.credentials import Credentials, load_or_create, signing_keys
from deployments.local.files import Layout, private_folder, write_private
from deployments.local.ports import LOOPBACK
from deployments.local.process import MARKER, marker

DATABASE = "khetguard"
PREFECT_DATABASE = "prefect"
PREFECT_USER = "khet"
# Passed on to parts from the caller's environment; everything else a part gets is stated where the part is described.
_INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True, slots=True)
class Site:
    """Everything a part needs to know about its stack."""

    layout: Layout
    settings: Settings
    ports: Mapping[str, int]
    secrets: Credentials

    @classmethod
    def prepare(cls, settings: Settings, root: Path, in_use: Iterable[str] = ()) -> Site:
        """Create the folders, secrets and ports of the stack in `root`, and write its settings file.

        Raises:
            ConfigError: the folder cannot be written, or a fixed port is taken.
            IntegrityError: the stored credentials are damaged.
        """
        layout = Layout(root)
        layout.make()
        chosen = port_choice.choose(layout.ports, _fixed(settings), in_use)
        site = cls(layout, settings, chosen, load_or_create(layout.credentials))
        site.write_settings()
        return site

    def url(self, port: str) -> str:
        """`http://127.0.0.1:<port>` of a named port."""
        return f"http://{LOOPBACK}:{self.ports[port]}"

    @property
    def api_url(self) -> str:
        """Address of Prefect's API."""
        return f"{self.url('prefect')}/api"

    @property
    def prefect_auth(self) -> str | None:
        """user:password of Prefect's API, or None where it asks for none: never where others than this machine reach
        it, for whoever may start flow runs may run programs."""
        stack = self.settings.stack
        guarded = stack.prefect_auth or stack.listen is not None
        return f"{PREFECT_USER}:{self.secrets.prefect_password}" if guarded else None

    def dsn(self, user: str = DATABASE, database: str = DATABASE) -> str:
        """Connection string of the embedded PostgreSQL."""
        return f"postgresql://{user}:{self.password(user)}@{LOOPBACK}:{self.ports['postgres']}/{database}"

    def password(self, user: str) -> str:
        """The password of a role of the embedded PostgreSQL."""
        secrets = self.secrets
        return {
            "postgres": secrets.postgres_password,
            DATABASE: secrets.khetguard_password,
            PREFECT_DATABASE: secrets.prefect_database_password,
        }[user]

    @property
    def prefect_on_postgres(self) -> bool:
        """Whether the Prefect server keeps its records in the embedded PostgreSQL."""
        stack = self.settings.stack
        return stack.prefect_database == "postgres" and stack.database == "embedded"

    def written_settings(self) -> dict[str, dict[str, Any]]:
        """What other processes must know, in the shape of `configs.settings.Settings`."""
        private, public = signing_keys(self.layout.keys)
        written: dict[str, dict[str, Any]] = {
            "registry": {"signing_key": str(private), "trusted_keys": [str(public)]},
        }
        if self.settings.cluster.backend == "local-node":
            written["cluster"] = {
                "node_url": self.url("node"),
                "node_token": self.secrets.node_token,
                "gateway_url": self.url("gateway"),
            }
        if self.settings.stack.orchestrator == "embedded":
            auth = {"auth_string": self.prefect_auth} if self.prefect_auth else {}
            written["orchestrator"] = {"api_url": self.api_url, **auth}
        if self.settings.stack.object_store == "embedded":
            written["object_store"] = {
                "endpoint_url": self.url("s3"),
                "access_key_id": self.secrets.s3_access_key,
                "secret_access_key": self.secrets.s3_secret_key,
            }
        if self.settings.stack.database == "embedded":
            written["database"] = {"dsn": self.dsn()}
        return written

    def write_settings(self) -> None:
        """Merge `written_settings` into the settings file: what a person added there stays."""
        path = self.layout.settings
        merged = _areas(path)
        if self.settings.stack.orchestrator == "embedded" and not self.prefect_auth:
            merged.get("orchestrator", {}).pop("auth_string", None)
        if self.settings.cluster.backend != "local-node" and merged.get("cluster", {}).pop("node_url", None):
            # Of the node that replicas ran on before; its gateway is not where they answer now.
            for name in ("node_token", "gateway_url"):
                merged["cluster"].pop(name, None)
        _write(path, merged, self.written_settings())

    def environment(self, part: str, **extra: str) -> dict[str, str]:
        """The environment of a part: little is inherited, and its HOME and TMPDIR are below the home folder."""
        temp = private_folder(self.layout.temp(part))
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        return inherited | {"HOME": str(temp), "TMPDIR": str(temp), MARKER: marker(self.layout.root, part)} | extra

    def python_environment(self, part: str, **extra: str) -> dict[str, str]:
        """The environment of a part that is one of this project's own Python processes."""
        own = {n: v for n, v in os.environ.items() if n.startswith("KHET_")}
        python = {
            "KHET_HOME": str(self.layout.root),
            "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "DO_NOT_TRACK": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        return self.environment(part, **(own | python | extra))


def remember(layout: Layout, chosen: Mapping[str, Mapping[str, Any]]) -> bool:
    """Add what a person chose to the settings file, as if they had written it there; whether that changed anything."""
    layout.make()
    before = _areas(layout.settings)
    _write(layout.settings, _areas(layout.settings), chosen)
    return before != _areas(layout.settings)


def _areas(path: Path) -> dict[str, dict[str, Any]]:
    return {area: dict(values or {}) for area, values in (read_yaml(path) if path.exists() else {}).items()}


def _write(path: Path, merged: dict[str, dict[str, Any]], changes: Mapping[str, Mapping[str, Any]]) -> None:
    for area, values in changes.items():
        merged.setdefault(area, {}).update(values)
    header = "# Written by `khet up`: addresses and credentials of the local stack. Your own additions are kept.\n"
    text = header + yaml.safe_dump(merged, sort_keys=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_private(path, text)


def _fixed(settings: Settings) -> dict[str, int]:
    stack = settings.stack
    return {
        "prefect": stack.prefect_port,
        "s3": stack.s3_port,
        "postgres": stack.postgres_port,
        "gateway": stack.gateway_port,
    }
