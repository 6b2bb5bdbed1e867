"""A version's files with the signed manifest that vouches for them: what a replica loads and a flow deploys.

In the bucket a version is a folder, `v1.3.0/model.onnx` and so on, with `manifest.json` (size and SHA-256 of every
file, lineage, metrics) and `manifest.json.sig` (Ed25519 over its exact bytes). Nothing is used before both are checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BeforeValidator, Field, NonNegativeInt, PlainSerializer, ValidationError
from pydantic import field_validator as validates

from configs.errors import ConfigError, ExternalError, IntegrityError
from ml import signing
from ml.objects import ObjectMissing, ObjectStore, file_sha256
from ml.results import Record
from ml.version import Version, is_version

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
MODEL = "model.onnx"
METADATA = "metadata.json"
_PARTIAL = ".fetched"
_LEFTOVER_AGE_S = 3600  # no chunk of a living download is that old
FORMAT: Literal["khet-model/1"] = "khet-model/1"


def _to_version(value: object) -> object:
    if isinstance(value, str):
        if not is_version(value):
            raise ValueError(f"{value!r} is not a version")
        return Version.parse(value)
    return value


VersionField = Annotated[Version, BeforeValidator(_to_version), PlainSerializer(str, return_type=str)]
"""A `Version` that is written as `v1.3.0` in JSON."""


class VersionMissing(ConfigError):  # noqa: N818  (reads as the state it reports)
    """No such version was published (or its upload was never completed)."""


class FileEntry(Record):
    """What a file must be."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: NonNegativeInt


class Lineage(Record):
    """Where a version comes from. None: it could not be found out, or there is none (the first has no parent)."""

    git_commit: str | None
    git_dirty: bool | None
    config: dict[str, Any]
    seed: int
    lock_sha256: str | None
    hardware: dict[str, str]
    dataset: str
    dataset_hash: str
    parent: VersionField | None = None
    release_id: str | None = None
    packages: dict[str, str] = Field(default={}, description="Version of Python and of the packages that matter.")


class Manifest(Record):
    """What a version consists of. `files` maps paths below the version's folder; `created_by` is a person or flow."""

    format: Literal["khet-model/1"] = FORMAT
    version: VersionField
    created_at: AwareDatetime
    created_by: str
    files: dict[str, FileEntry]
    lineage: Lineage
    metrics: dict[str, float]

    @validates("files")
    @classmethod
    def _plain_paths(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            check_name(name)
        return dict(sorted(files.items()))


@dataclass(frozen=True, slots=True)
class Bundle:
    """Verified files in `folder`. `signed_by` is the fingerprint of the key that signed the manifest."""

    folder: Path
    manifest: Manifest
    signed_by: str

    @property
    def version(self) -> Version:
        return self.manifest.version

    def path(self, name: str) -> Path:
        """Where a file of the version lies here."""
        return self.folder / name


def check_name(name: str) -> None:
    """Refuse a name that could leave the version's folder or stand for the manifest itself (ValueError)."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and "\\" not in name and name.isprintable()
    # The folder itself, ".", has no parts.
    if not plain or not path.parts or any(part.startswith(".") for part in path.parts):
        raise ValueError(f"{name!r} is not a plain relative path")
    if name in (MANIFEST, SIGNATURE):
        raise ValueError(f"{name!r} may not list itself")


def read_manifest(data: bytes, signature: bytes, version: Version, trusted: Sequence[Path]) -> tuple[Manifest, str]:
    """Check the signature, then read the manifest; returns it with the signing key's fingerprint.

    Raises:
        IntegrityError: the signature, the format, or the version inside is not what it should be.
    """
    try:
        signed_by = signing.verify(data, signature, trusted)
    except IntegrityError as error:
        raise IntegrityError(f"{MANIFEST} of {version}: {error}.\n{_next(version)}") from error
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"{MANIFEST} of {version} is not a manifest: {error}.\n{_next(version)}") from error
    if manifest.version != version:
        raise IntegrityError(f"The manifest stored under {version} belongs to {manifest.version}.\n{_next(version)}")
    return manifest, signed_by


def check_file(version: Version, name: str, entry: FileEntry, path: Path) -> None:
    """Raise IntegrityError when `path` is not the file the manifest promises."""
    try:
        size, found = path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise IntegrityError(
            f"{name} of {version} cannot be read at {path}: {error.strerror or error}.\n{_next(version)}"
        ) from error
    if size != entry.size_bytes:
        raise IntegrityError(
            f"{name} of {version} does not match its manifest ({size} bytes, expected {entry.size_bytes}).\n"
            f"{_next(version)}"
        )
    if found != entry.sha256:
        raise IntegrityError(
            f"{name} of {version} does not match its manifest (sha256 {found[:12]}… expected {entry.sha256[:12]}…).\n"
            f"{_next(version)}"
        )


def verify_bundle(
    folder: Path, version: Version, trusted_keys: Sequence[Path], *, only: Collection[str] | None = None
) -> Bundle:
    """Check a local copy: the manifest's signature, then size and SHA-256 of every file (or of `only` these).

    Raises:
        IntegrityError: something is missing or differs.
    """
    try:
        data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    except OSError as error:
        raise IntegrityError(f"{folder} holds no signed manifest: {error.strerror or error}.") from error
    manifest, signed_by = read_manifest(data, signature, version, trusted_keys)
    for name in _wanted(manifest, only):
        check_file(version, name, manifest.files[name], folder / name)
    return Bundle(folder, manifest, signed_by)


def fetch_bundle(
    store: ObjectStore,
    bucket: str,
    version: Version,
    folder: Path,
    trusted_keys: Sequence[Path],
    *,
    only: Collection[str] | None = None,
) -> Bundle:
    """Bring a version (or `only` these of its files) into `folder`, verified.

    A local copy that verifies is used without asking the store: versions are immutable, so a replica also starts while
    the store is down. A file that is missing or damaged here is fetched again. Several processes may share a folder:
    a file appears under its name only once it has been verified.

    Raises:
        VersionMissing: no such version is published.
        IntegrityError: the store holds something else than what was signed; nothing of it was put into `folder`.
        ExternalError: the store did not answer.
    """
    if (folder / MANIFEST).exists():
        try:
            return verify_bundle(folder, version, trusted_keys, only=only)
        except IntegrityError as error:
            # Incomplete, damaged, or signed by a key no longer trusted: the store decides.
            _log.info("the local copy of %s is fetched again: %s", version, str(error).partition("\n")[0])
    return _fetch(store, bucket, version, folder, trusted_keys, only)


def _fetch(
    store: ObjectStore,
    bucket: str,
    version: Version,
    folder: Path,
    trusted_keys: Sequence[Path],
    only: Collection[str] | None,
) -> Bundle:
    data, signature = fetch_manifest(store, bucket, version)
    manifest, signed_by = read_manifest(data, signature, version, trusted_keys)
    _sweep(folder)
    for name in _wanted(manifest, only):
        _fetch_file(store, bucket, version, name, manifest.files[name], folder)
    _write(folder / SIGNATURE, signature)
    _write(folder / MANIFEST, data)
    return Bundle(folder, manifest, signed_by)


def fetch_manifest(store: ObjectStore, bucket: str, version: Version) -> tuple[bytes, bytes]:
    """The stored manifest and its signature, not yet checked.

    Raises:
        VersionMissing: there is no manifest, so the version was never completed.
        IntegrityError: the manifest is there without its signature.
    """
    try:
        data = store.get(bucket, f"{version}/{MANIFEST}")
    except ObjectMissing as error:
        raise VersionMissing(
            f"{version} is not published in s3://{bucket} (no {version}/{MANIFEST}). Nothing was changed.\n"
            "Next: `khet versions` lists those that are."
        ) from error
    try:
        return data, store.get(bucket, f"{version}/{SIGNATURE}")
    except ObjectMissing as error:
        raise IntegrityError(f"{MANIFEST} of {version} has no signature beside it.\n{_next(version)}") from error


def _fetch_file(store: ObjectStore, bucket: str, version: Version, name: str, entry: FileEntry, folder: Path) -> None:
    final = folder / name
    if final.exists() and final.stat().st_size == entry.size_bytes and file_sha256(final) == entry.sha256:
        return
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        store.get_file(bucket, f"{version}/{name}", partial)
        check_file(version, name, entry, partial)
        partial.replace(final)
    except ObjectMissing as error:
        raise IntegrityError(f"{name} of {version} is missing from the store.\n{_next(version)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what downloads that were killed left behind; younger files may belong to another process."""
    for left in folder.rglob(f".*{_PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - left.stat().st_mtime > _LEFTOVER_AGE_S:
                left.unlink()


def _wanted(manifest: Manifest, only: Collection[str] | None) -> Sequence[str]:
    if only is None:
        return list(manifest.files)
    if missing := sorted(set(only) - set(manifest.files)):
        raise IntegrityError(
            f"{manifest.version} has no {', '.join(missing)} (its files: {', '.join(manifest.files)}).\n"
            f"{_next(manifest.version)}"
        )
    return [name for name in manifest.files if name in set(only)]


def _write(path: Path, data: bytes) -> None:
    """Atomic: a reader in another process sees nothing or all of it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ExternalError(f"{path} cannot be written: {error.strerror or error}.", retryable=False) from error
    finally:
        partial.unlink(missing_ok=True)


def _next(version: Version) -> str:
    return (
        "Nothing was loaded or deployed; what serves now goes on serving.\n"
        f"Next: `khet verify {version}` shows every file; release again under a new version, "
        "or restore this one from a backup."
    )
