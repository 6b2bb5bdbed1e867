"""The object store: any S3 service, spoken to through boto3. It lives in `ml` because replicas load models from it.

Outages are ridden out: every call is repeated, with exponential backoff and jitter, for `patience_s`. So a store that
restarts in the middle of an upload costs time and nothing else. Every call here is safe to repeat.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, IntegrityError
from ml.s3_client import PARTS_IN_MEMORY, ObjectExists, ObjectMissing, PatientClient
from ml.s3_errors import client_errors, reason
from ml.uploads import Progress, Tally, follow, raise_first, size_of

__all__ = ["ObjectInfo", "ObjectMissing", "ObjectStore", "Progress", "file_sha256"]

_log = logging.getLogger(__name__)
_MIB = 1 << 20
_PART_BYTES = 16 * _MIB  # S3 wants parts of at least 5 MiB; 16 keeps 10,000 parts good for 156 GiB
_MAX_PARTS = 10_000
_DELETE_BATCH = 1000  # the protocol's limit of one DeleteObjects
_SHA, _NONCE = "khet-sha256", "khet-nonce"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object. `modified_at` is an aware UTC datetime; `etag` is unquoted and opaque."""

    key: str
    size_bytes: int
    modified_at: datetime
    etag: str


class ObjectStore:
    """A client of one S3 service. Thread-safe. boto3 is imported, and connects, at the first call.

    Every method raises `ConfigError` (credentials, bucket or address are wrong), `ExternalError` (no answer for
    `patience_s`, or a refusal), and nothing of boto3's.
    """

    def __init__(
        self,
        settings: ObjectStoreSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._sleep = sleep
        self._s3 = PatientClient(settings, clock=clock, sleep=sleep)
        self._threads = settings.upload_threads
        self._parts = threading.BoundedSemaphore(PARTS_IN_MEMORY)

    def __repr__(self) -> str:
        return f"ObjectStore({self.place})"

    @property
    def place(self) -> str:
        """Where the store is, for people: the endpoint without user and password."""
        return self._s3.place

    def client(self) -> Any:
        """The boto3 client below, for what this class does not offer; its errors are then the caller's to translate."""
        return self._s3.raw()

    def with_patience(self, patience_s: float) -> ObjectStore:
        """The same store for calls that must not take longer than about `patience_s`, a status or a renewal."""
        quick = {
            "patience_s": patience_s,
            "max_attempts": 1,
            "connect_timeout_s": max(0.1, min(self._settings.connect_timeout_s, patience_s)),
            "read_timeout_s": max(0.1, min(self._settings.read_timeout_s, patience_s)),
        }
        return ObjectStore(self._settings.model_copy(update=quick), clock=self._clock, sleep=self._sleep)

    # Objects ------------------------------------------------------------------------------------------------------

    def put(
        self, bucket: str, key: str, data: bytes, *, if_absent: bool = False, content_type: str | None = None
    ) -> bool:
        """Store `data` under `key`; with `if_absent` only where nothing is (`If-None-Match: *`).

        Returns:
            False when `if_absent` and someone else's object is there. A nonce in the metadata tells our own write,
            applied before its answer was lost, from another's.
        """
        nonce = uuid.uuid4().hex
        extra: dict[str, Any] = {"ContentType": content_type or "application/octet-stream"}
        if if_absent:
            extra["IfNoneMatch"] = "*"
        meta = {_SHA: hashlib.sha256(data).hexdigest(), _NONCE: nonce}

        def send(client: Any) -> bool:
            client.put_object(Bucket=bucket, Key=key, Body=data, ContentMD5=_md5(data), Metadata=meta, **extra)
            return True

        try:
            return self._s3.call(f"storing s3://{bucket}/{key}", send, bucket=bucket)
        except ObjectExists:
            return self._holds(bucket, key, nonce)

    def put_file(self, bucket: str, key: str, path: Path) -> None:
        """Store a file, in parts above 16 MiB; its SHA-256 goes into the object's metadata.

        Raises:
            ConfigError: the file cannot be read.
            IntegrityError: the file changed while it was read.
        """
        self._put_file(bucket, key, path, lambda _: None)

    def get(self, bucket: str, key: str) -> bytes:
        """Read a whole object.

        Raises:
            ObjectMissing: there is none.
            IntegrityError: its bytes differ from the SHA-256 stored with them.
        """

        def receive(client: Any) -> tuple[bytes, str | None]:
            answer = client.get_object(Bucket=bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                return body.read(), answer["Metadata"].get(_SHA)

        data, expected = self._s3.call(f"reading s3://{bucket}/{key}", receive, bucket=bucket)
        _check_sha(bucket, key, hashlib.sha256(data).hexdigest(), expected)
        return data

    def get_file(self, bucket: str, key: str, path: Path) -> str:
        """Read an object into `path`: readers see the old file or the whole new one. Returns its SHA-256 (hex).

        Raises:
            ObjectMissing: there is none.
            IntegrityError: its bytes differ from the SHA-256 stored with them; `path` is as it was.
            ExternalError: also when the disk does not take it.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
            os.close(handle)
            partial = Path(name)
            try:
                digest = self._receive_file(bucket, key, partial)
                partial.replace(path)
                return digest
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            message = f"{path} cannot be written: {error.strerror or error}. s3://{bucket}/{key} is untouched."
            raise ExternalError(message, retryable=False) from error

    def digest(self, bucket: str, key: str) -> tuple[str, int]:
        """SHA-256 (hex) and size of what is really stored, read as a stream; the stored SHA-256 plays no part.

        Raises:
            ObjectMissing: there is none.
        """
        found, size, _ = self._stream(bucket, key, lambda _: None)
        return found, size

    def recorded_sha256(self, bucket: str, key: str) -> str | None:
        """The SHA-256 (hex) that was stored with an object; None when there is no such object, or it has none."""
        try:
            return self._metadata(bucket, key).get(_SHA)
        except ObjectMissing:
            return None

    def exists(self, bucket: str, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self._metadata(bucket, key)
        except ObjectMissing:
            return False
        return True

    def list(self, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order."""
        for page in self._pages(bucket, prefix, {}):
            for item in page.get("Contents", ()):
                modified = item["LastModified"].astimezone(UTC)
                yield ObjectInfo(item["Key"], int(item["Size"]), modified, item["ETag"].strip('"'))

    def prefixes(self, bucket: str, prefix: str = "") -> Iterator[str]:
        """The "folders" directly below `prefix`, each ending in a slash."""
        for page in self._pages(bucket, prefix, {"Delimiter": "/"}):
            yield from (item["Prefix"] for item in page.get("CommonPrefixes", ()))

    def delete(self, bucket: str, keys: Iterable[str]) -> int:
        """Delete objects, a thousand a request; one that is missing already counts as deleted. Returns how many."""
        wanted = list(dict.fromkeys(keys))
        done = 0
        for start in range(0, len(wanted), _DELETE_BATCH):
            done += self._delete_batch(bucket, wanted[start : start + _DELETE_BATCH])
        return done

    def presigned_get(self, bucket: str, key: str, expires_s: int) -> str:
        """An address that anyone may read this object from for `expires_s` seconds."""
        params = {"Bucket": bucket, "Key": key}
        return str(
            self._s3.call(
                f"signing an address of s3://{bucket}/{key}",
                lambda client: client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s),
            )
        )

    # Buckets and folders ------------------------------------------------------------------------------------------

    def ensure_bucket(self, bucket: str) -> None:
        """Return when the bucket exists; it is made only where `object_store.create_buckets` allows it.

        Raises:
            ConfigError: it is missing and may not be made.
        """
        try:
            self._s3.call(f"looking for bucket {bucket}", lambda client: client.head_bucket(Bucket=bucket))
        except ObjectMissing:
            self._s3.create_bucket(bucket)

    def upload(self, bucket: str, items: Mapping[str, Path | bytes], on_progress: Progress | None = None) -> None:
        """Store many objects, `upload_threads` at a time.

        Raises:
            ExternalError: saying which objects were stored and which were not. Those stored stay; repeat the call.
        """
        tally = Tally(size_of(item) for item in items.values())
        with ThreadPoolExecutor(self._threads, thread_name_prefix="upload") as pool:
            jobs = {pool.submit(self._put_item, bucket, key, item, tally.add): key for key, item in items.items()}
            follow(jobs, tally, on_progress)
        raise_first(jobs, f"s3://{bucket}")

    # Inside -------------------------------------------------------------------------------------------------------

    def _put_item(self, bucket: str, key: str, item: Path | bytes, add: Callable[[int], None]) -> None:
        if isinstance(item, Path):
            self._put_file(bucket, key, item, add)
        else:
            self.put(bucket, key, item, content_type=_content_type(key))
            add(len(item))

    def _put_file(self, bucket: str, key: str, path: Path, add: Callable[[int], None]) -> None:
        try:
            size = path.stat().st_size
            if size <= _PART_BYTES:
                data = path.read_bytes()
                self.put(bucket, key, data, content_type=_content_type(key))
                add(len(data))
            else:
                self._put_parts(bucket, key, path, add)
        except OSError as error:
            message = f"{path} cannot be read: {error.strerror or error}. s3://{bucket}/{key} was not written."
            raise ConfigError(message) from error

    def _put_parts(self, bucket: str, key: str, path: Path, add: Callable[[int], None]) -> None:
        before = path.stat()
        digest = file_sha256(path)
        meta = {_SHA: digest, _NONCE: uuid.uuid4().hex}
        what = f"storing s3://{bucket}/{key}"
        upload_id = self._s3.call(
            what,
            lambda client: client.create_multipart_upload(
                Bucket=bucket, Key=key, ContentType=_content_type(key), Metadata=meta
            )["UploadId"],
            bucket=bucket,
        )
        try:
            parts = self._send_parts(bucket, key, path, upload_id, add)
            _unchanged(path, before)
            self._complete(bucket, key, upload_id, parts, meta[_NONCE])
        except BaseException:
            self._abort(bucket, key, upload_id)
            raise

    def _send_parts(
        self, bucket: str, key: str, path: Path, upload_id: str, add: Callable[[int], None]
    ) -> Sequence[dict[str, Any]]:
        size = path.stat().st_size
        step = max(_PART_BYTES, -(-size // _MAX_PARTS))

        def send(number: int) -> dict[str, Any]:
            with self._parts:
                with path.open("rb") as file:
                    file.seek((number - 1) * step)
                    data = file.read(step)
                answer = self._s3.call(
                    f"storing part {number} of s3://{bucket}/{key}",
                    lambda client: client.upload_part(
                        Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data, ContentMD5=_md5(data)
                    ),
                )
            add(len(data))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(min(4, self._threads), thread_name_prefix="part") as pool:
            jobs = {pool.submit(send, number): f"part {number}" for number in range(1, -(-size // step) + 1)}
            follow(jobs, None, None)
        raise_first(jobs, f"s3://{bucket}/{key}")
        return [job.result() for job in jobs]

    def _complete(self, bucket: str, key: str, upload_id: str, parts: Sequence[dict[str, Any]], nonce: str) -> None:
        try:
            self._s3.call(
                f"completing s3://{bucket}/{key}",
                lambda client: client.complete_multipart_upload(
                    Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": [*parts]}
                ),
            )
        except ObjectMissing:
            # An earlier try was applied and only its answer was lost: then the object carries our nonce.
            if not self._holds(bucket, key, nonce):
                raise

    def _abort(self, bucket: str, key: str, upload_id: str) -> None:
        """Best effort: the first failure is the one to report; the service's own rules clean up after us."""
        try:
            self._s3.raw().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        except client_errors() as error:
            _log.warning("parts of s3://%s/%s are left behind: %s", bucket, key, reason(error))

    def _receive_file(self, bucket: str, key: str, partial: Path) -> str:
        with partial.open("wb") as file:

            def begin() -> None:
                file.seek(0)
                file.truncate()

            found, _, expected = self._stream(bucket, key, file.write, begin)
            file.flush()
            os.fsync(file.fileno())
        _check_sha(bucket, key, found, expected)
        return found

    def _stream(
        self, bucket: str, key: str, take: Callable[[bytes], object], begin: Callable[[], None] = lambda: None
    ) -> tuple[str, int, str | None]:
        """Feed the object to `take` in chunks; `begin` is called before every try. (SHA-256, size, recorded SHA-256)"""

        def receive(client: Any) -> tuple[str, int, str | None]:
            begin()
            digest, size = hashlib.sha256(), 0
            answer = client.get_object(Bucket=bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(_MIB):
                    digest.update(chunk)
                    size += len(chunk)
                    take(chunk)
            return digest.hexdigest(), size, answer["Metadata"].get(_SHA)

        return self._s3.call(f"reading s3://{bucket}/{key}", receive, bucket=bucket)

    def _holds(self, bucket: str, key: str, nonce: str) -> bool:
        """Whether the object there is the one that we wrote with `nonce`."""
        try:
            return self._metadata(bucket, key).get(_NONCE) == nonce
        except ObjectMissing:
            return False

    def _metadata(self, bucket: str, key: str) -> dict[str, str]:
        what = f"looking for s3://{bucket}/{key}"
        return dict(self._s3.call(what, lambda client: client.head_object(Bucket=bucket, Key=key))["Metadata"])

    def _pages(self, bucket: str, prefix: str, extra: dict[str, str]) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._s3.call(
                f"listing s3://{bucket}/{prefix}",
                lambda client: client.list_objects_v2(Bucket=bucket, Prefix=prefix, **extra, **token),  # noqa: B023
                bucket=bucket,
            )
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _delete_batch(self, bucket: str, keys: Sequence[str]) -> int:
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        what = f"deleting {len(keys)} objects of s3://{bucket}"
        answer = self._s3.call(what, lambda client: client.delete_objects(Bucket=bucket, Delete=request), bucket=bucket)
        if errors := answer.get("Errors"):
            first = f"{errors[0].get('Key')}: {errors[0].get('Code')} {errors[0].get('Message', '')}".strip()
            raise ExternalError(f"{self.place} kept {len(errors)} objects of s3://{bucket} ({first}).", retryable=False)
        return len(keys)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unchanged(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise IntegrityError(f"{path} changed while it was uploaded. The object was not written; upload it again.")


def _check_sha(bucket: str, key: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise IntegrityError(
            f"s3://{bucket}/{key} does not match the SHA-256 stored with it ({found[:12]}… expected {expected[:12]}…)."
            " What was read was thrown away."
        )


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


_TYPES = {".json": "application/json", ".md": "text/markdown", ".html": "text/html", ".png": "image/png"}


def _content_type(key: str) -> str:
    return _TYPES.get(Path(key).suffix, "application/octet-stream")
