"""What this machine reaches of all that a replica and a flow need; in a pod: `kubectl exec POD -- python -m ml.reach`.

Prints one JSON object, a question and its answer each: {"object store": {"ok": true, "detail": "..."}}. The exit code
is 0, or ExternalError's where something is not reached. `khet doctor` runs it in a short-lived pod.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from configs.areas import ObjectStoreSettings
from configs.errors import ExternalError, KhetError
from configs.settings import Settings, load_settings
from ml.version import Version

Answer = dict[str, bool | str]
_PATIENCE_S = 4.0
# The first message of a PostgreSQL client that would like TLS; a server answers with one letter, S or N.
# https://www.postgresql.org/docs/current/protocol-message-formats.html (SSLRequest)
_SSL_REQUEST = struct.pack("!II", 8, 80_877_103)
_PROBE = "inference/.khet-doctor"


def look(
    settings: Settings, version: Version | None = None, database: tuple[str, int] | None = None
) -> dict[str, Answer]:
    """Ask the object store as a replica does, and the database (host, port) whether it is one.

    With a `version`, its manifest has to be there and signed by a trusted key; with `serving.log_predictions` the data
    bucket has to take an object. An answer tells no secret, and a question without an answer is no exception.
    """
    store = settings.object_store
    questions: dict[str, Callable[[], str]] = {
        "object store": lambda: _read(settings, version),
        **({"inference log": lambda: _write(store)} if settings.serving.log_predictions else {}),
        **({"database": lambda: _database(*database)} if database else {}),
    }
    return {name: _ask(question) for name, question in questions.items()}


def _ask(question: Callable[[], str]) -> Answer:
    started = time.monotonic()
    try:
        return {"ok": True, "detail": f"{question()} ({1e3 * (time.monotonic() - started):.0f} ms)"}
    except KhetError as error:
        return {"ok": False, "detail": str(error)}


def _read(settings: Settings, version: Version | None) -> str:
    from ml.bundle import fetch_manifest, read_manifest
    from ml.objects import ObjectStore
    from ml.s3_client import ObjectMissing

    _knock(settings.object_store)
    store = ObjectStore(settings.object_store).with_patience(_PATIENCE_S)
    bucket = settings.object_store.models_bucket
    if version is None:
        try:
            store.get(bucket, "aliases/production.json")
        except ObjectMissing:
            return f"{store.place}: s3://{bucket} answers; no version is in production"
        return f"{store.place}: s3://{bucket} answers"
    data, signature = fetch_manifest(store, bucket, version)
    _, signed_by = read_manifest(data, signature, version, settings.registry.trusted_keys)
    return f"{store.place}: {version} is there, signed by a key that is trusted here ({signed_by})"


def _write(settings: ObjectStoreSettings) -> str:
    from ml.objects import ObjectStore

    store = ObjectStore(settings).with_patience(_PATIENCE_S)
    store.put(settings.data_bucket, _PROBE, b"khet")
    return f"s3://{settings.data_bucket} takes what replicas log"


def _knock(settings: ObjectStoreSettings) -> None:
    """Tell a name that is not known from a port where nobody listens, which the store's client does not."""
    if settings.endpoint_url is not None:
        parts = urlsplit(settings.endpoint_url)
        _connect(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)).close()


def _database(host: str, port: int) -> str:
    address = f"{host}:{port}"
    with _connect(host, port) as connection:
        try:
            connection.sendall(_SSL_REQUEST)
            letter = connection.recv(1)
        except OSError as error:
            raise ExternalError(f"{address} accepts connections and then does not answer: {error}") from error
    if letter not in (b"S", b"N"):
        raise ExternalError(f"{address} is no PostgreSQL: it answered {letter!r} to a client's first message")
    return f"{address}: PostgreSQL answers{' and offers TLS' if letter == b'S' else ', without TLS'}"


def _connect(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=_PATIENCE_S)
    except socket.gaierror as error:
        raise ExternalError(f"the name {host} is not known here: {error.strerror}. Next: look at the DNS.") from error
    except ConnectionRefusedError as error:
        raise ExternalError(f"{host}:{port} refuses connections: nobody listens at that address.") from error
    except TimeoutError as error:
        raise ExternalError(
            f"{host}:{port} did not answer for {_PATIENCE_S:g} s: a firewall or a NetworkPolicy may drop the packets."
        ) from error
    except OSError as error:
        raise ExternalError(f"{host}:{port} is not reached: {error.strerror or error}.") from error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0, or the KhetError's."""
    parser = argparse.ArgumentParser(prog="python -m ml.reach", description="What is reached from here, as JSON.")
    parser.add_argument("--version", help="look for this version, and for a signature that is trusted here")
    parser.add_argument("--database", type=_address, metavar="HOST:PORT", help="is a PostgreSQL there? Nobody logs in")
    parser.add_argument("--result", type=Path, metavar="FILE", help="write the answers here as well")
    given = parser.parse_args(argv)
    try:
        named = given.version or os.environ.get("MODEL_VERSION")
        answers = look(load_settings(), Version.parse(named) if named else None, given.database)
    except KhetError as error:
        answers = {"settings": {"ok": False, "detail": str(error)}}
    text = json.dumps(answers)
    sys.stdout.write(text + "\n")
    if given.result is not None:
        given.result.write_text(text, encoding="utf-8")
    return 0 if all(answer["ok"] for answer in answers.values()) else ExternalError.exit_code


if __name__ == "__main__":
    sys.exit(main())
