"""The addresses of the settings as pods have to write them. Pure."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from configs.errors import ConfigError
from configs.settings import Settings
from tasks.cluster.kubernetes.counting import url_host

_NEXT: Final = "Next: `khet up --listen ADDRESS`, with an address of this machine that pods reach, or set it to one."


def for_pods(settings: Settings) -> Settings:
    """The settings with the loopback addresses of the local stack replaced by the one that pods reach (stack.listen).

    Raises:
        ConfigError: an address is on the loopback, and `stack.listen` is not set.
    """
    store, orchestrator, dsn = settings.object_store, settings.orchestrator, settings.database.dsn
    endpoint = _url(store.endpoint_url, "object_store.endpoint_url", settings)
    api_url = _url(orchestrator.api_url, "orchestrator.api_url", settings)
    database = settings.database.model_copy(update={"dsn": _dsn(dsn, settings) if dsn else None})
    return settings.model_copy(
        update={
            "object_store": store.model_copy(update={"endpoint_url": endpoint}),
            "orchestrator": orchestrator.model_copy(update={"api_url": api_url}),
            "database": database,
        }
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address means the machine that uses it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(dsn: SecretStr) -> tuple[str, int]:
    """Where a database is; nothing else of its connection string.

    Raises:
        ConfigError: it is none.
    """
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        parts = conninfo_to_dict(dsn.get_secret_value())
    except ProgrammingError:
        raise ConfigError("database.dsn is no connection string of PostgreSQL. Nothing was changed.") from None
    return str(parts.get("host") or "localhost"), int(parts.get("port") or 5432)


def _url(url: str | None, key: str, settings: Settings) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    if not is_loopback(parts.hostname or ""):
        return url
    host = url_host(_listen(key, url, settings))
    return parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host).geturl()


def _dsn(dsn: SecretStr, settings: Settings) -> SecretStr:
    from psycopg.conninfo import make_conninfo

    host, port = host_and_port(dsn)
    if not is_loopback(host):
        return dsn
    return SecretStr(make_conninfo(dsn.get_secret_value(), host=_listen("database.dsn", f"{host}:{port}", settings)))


def _listen(key: str, what: str, settings: Settings) -> str:
    if settings.stack.listen is None:
        raise ConfigError(f"{key} is {what}, which no pod reaches. Nothing was changed.\n{_NEXT}")
    return str(settings.stack.listen)
