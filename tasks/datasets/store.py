"""Datasets in the object store: publish, fetch, list. See the package's docstring for the layout."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from configs.errors import ConfigError, ExternalError, IntegrityError
from ml import manifest
from ml.dataset import Dataset, DatasetInfo
from ml.importing import recover, swap
from ml.objects import ObjectMissing, ObjectStore
from ml.pixelcache import Progress, exclusive, parallel

_ROOT: Final = "training/"
_REPORTS: Final = ("quarantine.csv", "quarantine.json", manifest.REPORT)
_SIDECARS: Final = ("severity.csv", "groups.csv", manifest.INFO)


class DatasetStore:
    """The `training/` folder of one bucket."""

    def __init__(self, objects: ObjectStore, bucket: str, threads: int) -> None:
        self._objects = objects
        self._bucket = bucket
        self._threads = threads

    def publish(self, dataset: Dataset, on_progress: Progress | None = None) -> None:
        """Store a dataset; what is there already is not sent again. `on_progress` counts images.

        Raises:
            ExternalError: the store failed; the dataset it had before is still the one that counts.
        """
        self._objects.ensure_bucket(self._bucket)
        prefix = _prefix(dataset.name)
        there = {found.key: found.size_bytes for found in self._objects.list(self._bucket, prefix)}
        rows = dataset.rows.select(["path", "size_bytes"]).to_pylist()
        # Names hold the content's hash, so the same name with the same size is the same image.
        missing = [row["path"] for row in rows if there.get(prefix + row["path"]) != row["size_bytes"]]
        images = {prefix + path: dataset.root / path for path in missing}
        self._objects.upload(self._bucket, images, _counting(on_progress, len(rows)))
        if missing or _manifest_key(dataset.info) not in there or self._published(dataset.name) != dataset.info:
            self._publish_tables(dataset, prefix)

    def _publish_tables(self, dataset: Dataset, prefix: str) -> None:
        table = dataset.root / manifest.MANIFEST
        tables = {_manifest_key(dataset.info): table, prefix + manifest.MANIFEST: table}
        reports = {prefix + name: dataset.root / name for name in _REPORTS if (dataset.root / name).exists()}
        self._objects.upload(self._bucket, tables | reports)
        self._objects.put_file(self._bucket, prefix + manifest.INFO, dataset.root / manifest.INFO)

    def _published(self, name: str) -> DatasetInfo | None:
        """What the store says about the dataset; a damaged answer counts as none, since it is about to be replaced."""
        try:
            return self.info(name)
        except IntegrityError:
            return None

    def info(self, name: str) -> DatasetInfo | None:
        """dataset.json of a published dataset; None if there is none.

        Raises:
            IntegrityError: it cannot be read.
        """
        key = _prefix(name) + manifest.INFO
        try:
            data = self._objects.get(self._bucket, key)
        except ObjectMissing:
            return None
        try:
            return DatasetInfo.model_validate_json(data)
        except ValueError as error:
            raise IntegrityError(
                f"s3://{self._bucket}/{key} cannot be read: {error}. Nothing was changed. Next: import {name} again."
            ) from error

    def list(self) -> Iterator[DatasetInfo]:
        """Every complete dataset, by name."""
        for prefix in self._objects.prefixes(self._bucket, _ROOT):
            if info := self.info(prefix.removeprefix(_ROOT).rstrip("/")):
                yield info

    def fetch(self, info: DatasetInfo, root: Path, on_progress: Progress | None = None) -> None:
        """Make `root` the published dataset `info`, moving only what is missing or damaged here.

        Raises:
            IntegrityError: the store's copy is incomplete or damaged.
            ExternalError: the store or the disk failed; a fetch that was cut short is completed by the next.
        """
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(root.parent / f".{root.name}.lock"):
                recover(root)
                self._fetch(info, root, on_progress)
        except OSError as error:
            raise ExternalError(
                f"Dataset {info.name} cannot be stored at {root}: {error}. "
                "Next: free disk space or make the folder writable, then run it again.",
                retryable=False,
            ) from error

    def _fetch(self, info: DatasetInfo, root: Path, on_progress: Progress | None) -> None:
        if _is_here(root, info):
            return
        staging = root.parent / f".{root.name}.fetching"  # kept when cut short: the next fetch goes on
        staging.mkdir(exist_ok=True)
        (staging / manifest.INFO).unlink(missing_ok=True)
        table = self._read(_manifest_key(info))
        (staging / manifest.MANIFEST).write_bytes(table)
        rows = manifest.read_manifest(staging, info)
        wanted = dict(zip(*manifest.columns_of(rows, "path", "sha256"), strict=True))
        self._complete(info.name, wanted, staging, root, on_progress)
        self._copy_reports(info.name, staging)
        info.write(staging / manifest.INFO)
        swap(staging, root, keep_cache=_same_pixels(root, info))

    def _complete(
        self, name: str, wanted: Mapping[str, str], staging: Path, root: Path, on_progress: Progress | None
    ) -> None:
        """Put every wanted image into `staging`: kept, linked from the copy at `root`, or downloaded."""
        for folder in {str(PurePosixPath(path).parent) for path in wanted}:
            (staging / folder).mkdir(parents=True, exist_ok=True)
        for stale in [p for p in (staging / "images").rglob("*") if p.is_file()]:
            if stale.relative_to(staging).as_posix() not in wanted:
                stale.unlink()
        here = parallel(lambda item: _has(staging, root, *item), wanted.items())
        missing = [item for item, found in zip(wanted.items(), here, strict=True) if not found]
        downloads = parallel(lambda item: self._download(name, staging, *item), missing, self._threads)
        for done, _ in enumerate(downloads, start=1):
            if on_progress is not None:
                on_progress(done, len(missing))

    def _download(self, name: str, staging: Path, path: str, sha256: str) -> None:
        key = _prefix(name) + path
        data = self._read(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(
                f"s3://{self._bucket}/{key} is not the image in the manifest. The local copy of {name} is unchanged. "
                f"Next: delete that object and import {name} again from its source."
            )
        (staging / path).write_bytes(data)

    def _read(self, key: str) -> bytes:
        try:
            return self._objects.get(self._bucket, key)
        except ObjectMissing as error:
            raise IntegrityError(
                f"s3://{self._bucket}/{key} is missing although its dataset is published. Nothing was changed here. "
                "Next: import the dataset again from its source; only what is missing is sent."
            ) from error

    def _copy_reports(self, name: str, staging: Path) -> None:
        for report in _REPORTS:
            try:
                data = self._objects.get(self._bucket, _prefix(name) + report)
            except ObjectMissing:
                continue
            (staging / report).write_bytes(data)

    def download(self, bucket: str, prefix: str, folder: Path) -> None:
        """Copy class folders and sidecars below a prefix into `folder`.

        Raises:
            ConfigError: nothing is there, or a key would leave the folder.
        """
        prefix = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        keys = {found.key: path_below(folder, found.key, prefix) for found in self._objects.list(bucket, prefix)}
        wanted = {key: path for key, path in keys.items() if path is not None}
        if not wanted:
            raise ConfigError(f"s3://{bucket}/{prefix} holds no photos in class folders. Nothing was imported.")
        for _ in parallel(lambda item: self._objects.get_file(bucket, *item), wanted.items(), self._threads):
            continue


def _prefix(name: str) -> str:
    return f"{_ROOT}{name}/"


def _counting(on_progress: Progress | None, images: int) -> Progress | None:
    """Progress in images for work that counts bytes."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(images * done // max(1, total), images)


def _manifest_key(info: DatasetInfo) -> str:
    return f"{_prefix(info.name)}manifests/{info.manifest_sha256[:20]}.parquet"


def _is_here(root: Path, info: DatasetInfo) -> bool:
    """Whether `root` is this very dataset, whole and undamaged."""
    try:
        dataset = Dataset.open(root)
        if dataset.info != info:
            return False
        dataset.verify()
    except (ConfigError, IntegrityError):
        return False
    return True


def _same_pixels(root: Path, info: DatasetInfo) -> bool:
    """Whether what was decoded for the copy at `root` holds for `info` too."""
    try:
        return Dataset.open(root).manifest_hash == info.manifest_hash
    except (ConfigError, IntegrityError):
        return False


def _has(staging: Path, root: Path, path: str, sha256: str) -> bool:
    """Whether `staging` has this image, after linking it from the copy at `root` where that one is good."""
    if _matches(staging / path, sha256):
        return True
    if not _matches(root / path, sha256):
        return False
    (staging / path).unlink(missing_ok=True)
    os.link(root / path, staging / path)
    return True


def _matches(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def path_below(folder: Path, key: str, prefix: str) -> Path | None:
    """Where an object goes: class folder and file below `folder`. None for what no import reads.

    Raises:
        ConfigError: the key would leave the folder.
    """
    parts = key.removeprefix(prefix).split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts[:-1]) or parts[-1] in (".", ".."):
        raise ConfigError(f"The object key {key!r} is no path inside a folder. Nothing was imported.")
    hidden = any(part.startswith(".") for part in parts)
    if not parts[-1] or hidden or (len(parts) == 1 and parts[0] not in _SIDECARS):
        return None
    return folder.joinpath(*parts)
