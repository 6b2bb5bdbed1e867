"""A training in the object store: states to go on from while it runs, its files when it is done. No torch here.

Below a prefix that the caller chooses, each training has a folder named after its configuration and data:

    <fingerprint>/files/<sha256>-<name>       contents, written once
    <fingerprint>/checkpoints/<step>.json     a state to go on from; it names its files and is written after them
    <fingerprint>/result.json                 the finished training, likewise

So a reader sees a state whole or not at all, whatever dies in between, and two processes that train the same (one of
them on a node that was given up) cannot spoil each other's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from pydantic import AwareDatetime, NonNegativeInt, ValidationError

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, IntegrityError
from configs.training import TrainingConfig
from ml.bundle import FileEntry, Lineage
from ml.objects import ObjectMissing, ObjectStore, file_sha256
from ml.results import Record, TrainResult

LAST, BEST = "last.ckpt", "best.ckpt"
RESULT, LINEAGE = "train.json", "lineage.json"
_KEPT = 2  # states: the newest, and one more should that be damaged
_log = logging.getLogger(__name__)
RecordT = TypeVar("RecordT", bound=Record)


class Checkpoint(Record):
    """A state to go on from: last.ckpt, and best.ckpt where one was validated already."""

    fingerprint: str
    step: NonNegativeInt
    epoch: NonNegativeInt
    written_at: AwareDatetime
    files: dict[str, FileEntry]


class Finished(Record):
    """A training that is done: `result.checkpoint` and the others are names in `files`."""

    fingerprint: str
    result: TrainResult
    lineage: Lineage
    finished_at: AwareDatetime
    files: dict[str, FileEntry]


def fingerprint(config: TrainingConfig, dataset_hash: str) -> str:
    """What tells one training from another: 20 hex digits of its configuration and its data's manifest hash."""
    text = json.dumps([json.loads(config.model_dump_json()), dataset_hash], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def split_address(address: str) -> tuple[str, str]:
    """Bucket and prefix of s3://bucket/prefix.

    Raises:
        ConfigError: it is no such address.
    """
    parts = urlsplit(address)
    prefix = parts.path.strip("/")
    if parts.scheme != "s3" or not parts.netloc or not prefix:
        raise ConfigError(f"{address!r} is not an address like s3://bucket/prefix. Nothing was started.")
    return parts.netloc, prefix


class TrainingStore:
    """One training's folder in the object store.

    Every method raises `ConfigError` and `ExternalError` as `ObjectStore` does.
    """

    def __init__(self, objects: ObjectStore, bucket: str, prefix: str, run: str) -> None:
        self._objects = objects
        self._bucket = bucket
        self._folder = f"{prefix.strip('/')}/{run}/"
        self._run = run

    @classmethod
    def at(cls, address: str, run: str, settings: ObjectStoreSettings) -> TrainingStore:
        """The folder of the training with fingerprint `run` below s3://bucket/prefix."""
        return cls(ObjectStore(settings), *split_address(address), run)

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return f"s3://{self._bucket}/{self._folder}"

    @property
    def run_id(self) -> str:
        """Twelve hex digits that name this training at the experiment tracker, the same wherever it goes on."""
        return hashlib.sha256(self.address.encode()).hexdigest()[:12]

    def patient(self, patience_s: float) -> TrainingStore:
        """The same folder, for calls that give up after about `patience_s` seconds without an answer."""
        prefix = self._folder.removesuffix(f"/{self._run}/")
        return TrainingStore(self._objects.with_patience(patience_s), self._bucket, prefix, self._run)

    # States to go on from -----------------------------------------------------------------------------------------

    def newest(self) -> Checkpoint | None:
        """The newest state that can be read and is of this training; its files are checked when they are brought."""
        return next(self.checkpoints(), None)

    def checkpoints(self) -> Iterator[Checkpoint]:
        """Every such state, newest first; one that is not is reported and passed over."""
        for key in reversed(self._pointers()):
            if (found := self._read(key, Checkpoint)) is not None and found.fingerprint == self._run:
                yield found
            elif found is not None:
                _log.warning("s3://%s/%s belongs to another training and is not used.", self._bucket, key)

    def bring_newest(self, folder: Path) -> Checkpoint | None:
        """Put the files of the newest whole state into `folder`; a damaged one is reported, and the one before taken.

        Returns:
            None where there is none; `folder` is then as it was.
        """
        for found in self.checkpoints():
            try:
                self._bring(found.files, folder, last=LAST)
            except (IntegrityError, ObjectMissing) as error:
                _log.warning("The checkpoint of step %d is damaged; taking the one before. %s", found.step, error)
            else:
                return found
        return None

    def keep(self, step: int, epoch: int, files: Mapping[str, Path]) -> Checkpoint:
        """Store a state to go on from: contents first, then what names them; then older states go."""
        entries = self._put_files(files)
        made = Checkpoint(fingerprint=self._run, step=step, epoch=epoch, written_at=datetime.now(UTC), files=entries)
        self._put(f"checkpoints/{step:012d}.json", made)
        self._prune(self._pointers()[:-_KEPT])
        return made

    # The result ---------------------------------------------------------------------------------------------------

    def finished(self) -> Finished | None:
        """The finished training; None while it is not, or where what is stored of it cannot be used."""
        found = self._read(self._folder + "result.json", Finished)
        if found is not None and found.fingerprint != self._run:
            _log.warning("The result in %s belongs to another training and is not used.", self.address)
            return None
        return found

    def bring_result(self, found: Finished, folder: Path) -> TrainResult:
        """Put the result's files into `folder`, with lineage.json: what made it; train.json last.

        Raises:
            IntegrityError: a file is missing or not what it was; `folder` is as it was.
        """
        try:
            self._bring(found.files, folder, last=BEST)
        except ObjectMissing as error:
            raise IntegrityError(f"The result in {self.address} is not whole. {error}") from error
        result = found.result.model_copy(update={"checkpoint": folder / found.result.checkpoint})
        found.lineage.write(folder / LINEAGE)
        result.write(folder / RESULT)
        return result

    def finish(self, result: TrainResult, lineage: Lineage, files: Mapping[str, Path]) -> Finished:
        """Store the result, what names its files last; the states to go on from are not needed any more then."""
        made = Finished(
            fingerprint=self._run,
            result=result.model_copy(update={"checkpoint": Path(result.checkpoint.name)}),
            lineage=lineage,
            finished_at=datetime.now(UTC),
            files=self._put_files(files),
        )
        self._put("result.json", made)
        self._prune(self._pointers())
        return made

    def withdraw(self) -> None:
        """Take the result back, which turned out not to be whole: the next to finish stores it anew."""
        self._objects.delete(self._bucket, [self._folder + "result.json"])

    def forget(self) -> int:
        """Delete all of this training; returns how many objects."""
        return forget(self._objects, self._bucket, self._folder)

    # Inside -------------------------------------------------------------------------------------------------------

    def _pointers(self) -> Sequence[str]:
        return [found.key for found in self._objects.list(self._bucket, self._folder + "checkpoints/")]

    def _read(self, key: str, kind: type[RecordT]) -> RecordT | None:
        """What lies under `key`; None, with a warning, where it cannot be read."""
        try:
            return kind.model_validate_json(self._objects.get(self._bucket, key))
        except ObjectMissing:
            return None
        except (IntegrityError, ValidationError) as error:
            _log.warning("s3://%s/%s cannot be read and is passed over: %s", self._bucket, key, error)
            return None

    def _put(self, name: str, record: Record) -> None:
        data = (record.model_dump_json(indent=1) + "\n").encode()
        self._objects.put(self._bucket, self._folder + name, data, content_type="application/json")

    def _put_files(self, files: Mapping[str, Path]) -> dict[str, FileEntry]:
        entries = {
            name: FileEntry(sha256=file_sha256(path), size_bytes=path.stat().st_size) for name, path in files.items()
        }
        for name, entry in entries.items():
            # best.ckpt outlives many states: what is there is not sent again.
            if self._objects.recorded_sha256(self._bucket, self._key(name, entry)) != entry.sha256:
                self._objects.put_file(self._bucket, self._key(name, entry), files[name])
        return entries

    def _key(self, name: str, entry: FileEntry) -> str:
        return f"{self._folder}files/{entry.sha256}-{name}"

    def _bring(self, files: Mapping[str, FileEntry], folder: Path, last: str) -> None:
        """All files or none: they are moved into place when each is what it should be, `last` after the others."""
        staging = folder / ".bringing"  # one name, so that what a kill leaves there goes the next time
        try:
            wanted = {name: entry for name, entry in files.items() if not _is(folder / name, entry)}
            for name, entry in wanted.items():
                self._get_file(name, entry, staging / name)
            for name in sorted(wanted, key=lambda name: name == last):
                (staging / name).replace(folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _get_file(self, name: str, entry: FileEntry, path: Path) -> None:
        key = self._key(name, entry)
        found = self._objects.get_file(self._bucket, key, path)
        if found != entry.sha256:
            raise IntegrityError(
                f"s3://{self._bucket}/{key} is not what was stored (sha256 {found[:12]}…, "
                f"{path.stat().st_size} of {entry.size_bytes} bytes). It was not used."
            )

    def _prune(self, pointers: Sequence[str]) -> None:
        """Delete states, and of their files those that nothing else names. What stays for an outage goes next time."""
        with contextlib.suppress(ExternalError):
            gone = [found for key in pointers if (found := self._read(key, Checkpoint)) is not None]
            rest = [key for key in self._pointers() if key not in pointers]
            kept: list[Checkpoint | Finished] = [found for key in rest if (found := self._read(key, Checkpoint))]
            if (result := self.finished()) is not None:
                kept.append(result)
            self._objects.delete(self._bucket, [*pointers, *(self._keys(gone) - self._keys(kept))])

    def _keys(self, records: Sequence[Checkpoint | Finished]) -> set[str]:
        return {self._key(name, entry) for record in records for name, entry in record.files.items()}


def _is(path: Path, entry: FileEntry) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size == entry.size_bytes and file_sha256(path) == entry.sha256
    return False


def forget(objects: ObjectStore, bucket: str, prefix: str) -> int:
    """Delete everything below `prefix`; returns how many objects."""
    return objects.delete(bucket, [found.key for found in objects.list(bucket, f"{prefix.strip('/')}/")])
