"""An S3 client with patience: it repeats calls while the store is unreachable, and raises this project's errors."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, KhetError
from ml.s3_errors import Kind, classify, client_errors, reason

T = TypeVar("T")

PARTS_IN_MEMORY = 8  # of one store, however many files are uploaded at once
_BACKOFF_S = (0.2, 5.0)  # first and longest pause between two tries
_log = logging.getLogger(__name__)


class ObjectMissing(ExternalError):  # noqa: N818  (reads as the state it reports)
    """There is no such object. Asking again does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=False)

    def __reduce__(self) -> tuple[object, ...]:
        return (ObjectMissing, (str(self),))


class ObjectExists(Exception):  # noqa: N818  (a signal between two modules, never seen outside of them)
    """`If-None-Match: *` found an object."""


class PatientClient:
    """boto3's client, made at the first call, and the loop around every call. Thread-safe."""

    def __init__(
        self,
        settings: ObjectStoreSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None

    @property
    def place(self) -> str:
        """Where the store is, for people: the endpoint without user and password."""
        if self.settings.endpoint_url is None:
            return f"AWS S3 ({self.settings.region})"
        parts = urlsplit(self.settings.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def raw(self) -> Any:
        """The boto3 client, made once a process (connections do not survive a fork)."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), _make_client(self.settings))
            return self._made[1]

    def call(self, what: str, send: Callable[[Any], T], *, bucket: str | None = None) -> T:
        """Run `send(client)`, repeating it while the store is unreachable; it must be safe to repeat.

        `what` reads after "while" in a message. `bucket` is made when it is missing, where the settings allow it.
        """
        began = self._clock()
        tries = 0
        while True:
            tries += 1
            try:
                return send(self.raw())
            except client_errors() as error:
                kind = classify(error)
                if kind is Kind.bucket_missing and bucket is not None and self.settings.create_buckets and tries == 1:
                    self.create_bucket(bucket)
                    continue
                if kind is not Kind.retry:
                    raise self._translate(kind, what, error) from error
                self._pause(what, error, tries, began)

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket. Raises ConfigError where `object_store.create_buckets` is off."""
        if not self.settings.create_buckets:
            raise ConfigError(
                f"Bucket {bucket} does not exist at {self.place}, and object_store.create_buckets is off. "
                "Nothing was written.\nNext: create the bucket, or correct object_store.models_bucket and data_bucket."
            )
        extra: dict[str, Any] = {}
        if self.settings.region != "us-east-1":  # the one region that must not be named
            extra["CreateBucketConfiguration"] = {"LocationConstraint": self.settings.region}

        def create(client: Any) -> None:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=bucket, **extra)

        self.call(f"creating bucket {bucket}", create)

    def _pause(self, what: str, error: Exception, tries: int, began: float) -> None:
        waited = self._clock() - began
        left = self.settings.patience_s - waited
        if left <= 0:
            times = "1 try" if tries == 1 else f"{tries} tries"
            raise ExternalError(
                f"{self.place} did not answer for {waited:.0f} s ({times}) while {what}: {reason(error)}.\n"
                "What was stored before is complete; this object may or may not have been changed, repeating is safe.\n"
                "Next: `khet status` shows what runs, `khet up` starts the local stack; then run the same step again."
            ) from error
        if tries == 1:
            _log.warning("%s: %s while %s; trying again for %.0f s", self.place, reason(error), what, left)
        first, longest = _BACKOFF_S
        pause = min(longest, first * 2 ** min(tries - 1, 16)) * random.uniform(0.5, 1.0)
        self._sleep(min(pause, left))

    def _translate(self, kind: Kind, what: str, error: Exception) -> KhetError | ObjectExists:
        if kind is Kind.exists:
            return ObjectExists()
        if kind is Kind.key_missing:
            return ObjectMissing(f"No such object: {what} at {self.place} found nothing. Nothing was changed.")
        if kind is Kind.bucket_missing:
            return ConfigError(
                f"{what} failed: the bucket does not exist at {self.place}. Nothing was changed.\n"
                "Next: create it, or correct object_store.models_bucket and data_bucket."
            )
        if kind is Kind.config:
            return ConfigError(
                f"{what} failed at {self.place}: {reason(error)}. Nothing was changed.\n"
                "Next: correct object_store.* in the settings (`khet up` writes them for the local stack)."
            )
        return ExternalError(f"{self.place} refused {what}: {reason(error)}. Nothing was changed.", retryable=False)


def _make_client(settings: ObjectStoreSettings) -> Any:
    import boto3
    from botocore.config import Config

    secret = settings.secret_access_key
    config = Config(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
        max_pool_connections=settings.upload_threads + PARTS_IN_MEMORY,
        signature_version="s3v4",
        s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
        # Older S3 services refuse the newer checksums; Content-MD5 guards the way, our SHA-256 the object.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # A proxy of the environment is for the internet; on this machine it would only be in the way.
        proxies={} if _is_loopback(settings.endpoint_url) else None,
    )
    session = boto3.session.Session(
        aws_access_key_id=settings.access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        region_name=settings.region,
    )
    return session.client("s3", endpoint_url=settings.endpoint_url, config=config)


def _is_loopback(endpoint_url: str | None) -> bool:
    host = urlsplit(endpoint_url or "").hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")
