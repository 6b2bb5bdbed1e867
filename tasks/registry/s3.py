"""The model registry on an S3 bucket. Layout: `<version>/<file>`, `aliases/`, `reservations/`.

A version is immutable and complete or absent: `<version>/.reserved` claims the number with `If-None-Match: *`, every
file is stored, then `manifest.json.sig`, and `manifest.json` last. Only a version with a manifest exists for readers.
Publishing is repeatable after a kill at any point: the manifest's bytes follow from the files and the reservation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from configs.errors import ConfigError, ExternalError, IntegrityError, SafetyError
from configs.settings import Settings
from ml import bundle, signing
from ml.bundle import MANIFEST, MODEL, SIGNATURE, Bundle, FileEntry, Lineage, Manifest, VersionMissing
from ml.objects import ObjectInfo, ObjectMissing, ObjectStore, Progress, file_sha256
from ml.signing import Signer
from ml.version import Bump, Version, is_version
from tasks.registry.aliases import Aliases
from tasks.registry.policy import displaced, next_version
from tasks.registry.records import (
    ALIASES,
    AliasMove,
    AliasName,
    AliasState,
    Claim,
    FileCheck,
    Reservation,
    VerifyReport,
    VersionInfo,
)

RESERVED = ".reserved"
_TRIES = 50


def utc_now() -> datetime:
    """The clock of production."""
    return datetime.now(UTC)


class Registry:
    """Versions and aliases. Every method may be repeated; errors are `KhetError`s."""

    def __init__(
        self,
        store: ObjectStore,
        bucket: str,
        *,
        signing_key: Path | None = None,
        trusted_keys: Sequence[Path] = (),
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._signing_key = signing_key
        self._trusted = tuple(trusted_keys)
        self._now = now
        self._aliases = Aliases(store, bucket, now)

    @classmethod
    def from_settings(cls, settings: Settings) -> Registry:
        """The registry that the settings describe. Nothing is contacted yet."""
        return cls(
            ObjectStore(settings.object_store),
            settings.object_store.models_bucket,
            signing_key=settings.registry.signing_key,
            trusted_keys=settings.registry.trusted_keys,
        )

    def with_patience(self, patience_s: float) -> Registry:
        """The same registry for calls that must not take longer than about `patience_s`; see `ObjectStore`."""
        store = self._store.with_patience(patience_s)
        return Registry(store, self._bucket, signing_key=self._signing_key, trusted_keys=self._trusted, now=self._now)

    # Versions -----------------------------------------------------------------------------------------------------

    def reserve(self, bump: Bump | None = None, *, owner: str) -> Version:
        """Take the next version number; nobody else gets it. The same owner gets the same number again.

        `bump` None means minor. A number is never given out twice, even when what it was for is discarded.
        """
        if (mine := self._reserved_by(owner)) is not None:
            return mine
        for _ in range(_TRIES):
            version = next_version(self._listing().keys(), bump or "minor")
            reservation = Reservation(version=version, owner=owner, at=self._now())
            if self._put_reservation(reservation):
                return self._remember(owner, version)
        raise ExternalError(f"Others took the next version number {_TRIES} times in a row. Nothing was reserved.")

    def publish(
        self,
        version: Version,
        folder: Path,
        *,
        lineage: Lineage,
        metrics: Mapping[str, float],
        created_by: str,
        on_progress: Progress | None = None,
    ) -> Manifest:
        """Store every file of `folder` under `version` and write its manifest last.

        Hidden files, and a manifest and signature left by `fetch`, are not part of it. Publishing the same files again
        returns the manifest that is there.

        Raises:
            IntegrityError: the version is published with other files.
            SafetyError: the number belongs to another release, or was discarded.
            ConfigError: no signing key, or `folder` holds no model.
        """
        signer = self._signer()
        files = _entries(folder)
        if (published := self._published(version)) is not None:
            return _same(published, files)
        reservation = self._claimed(version, lineage.release_id or created_by)
        manifest = Manifest(
            version=version,
            created_at=reservation.at,
            created_by=created_by,
            files=files,
            lineage=lineage,
            metrics=dict(metrics),
        )
        self._store_files(version, folder, files, on_progress)
        self._claimed(version, reservation.owner)  # it may have been discarded meanwhile
        return self._seal(manifest, signer)

    def next_version(self, bump: Bump | None = None) -> Version:
        """The number that `reserve` would give out now; nothing is taken."""
        return next_version(self._listing().keys(), bump or "minor")

    def versions(self) -> list[VersionInfo]:
        """Published versions, lowest first."""
        infos = []
        for version, objects in sorted(self._listing().items()):
            if (manifest := objects.get(MANIFEST)) is not None:
                size = sum(info.size_bytes for info in objects.values())
                infos.append(VersionInfo(version, manifest.modified_at, size, len(objects) - (RESERVED in objects)))
        return infos

    def abandoned(self) -> list[Reservation]:
        """Numbers that were taken and are neither published nor discarded: in work, or left by a killed release."""
        incomplete = [v for v, objects in sorted(self._listing().items()) if MANIFEST not in objects]
        found = (self._reservation(version) for version in incomplete)
        return [reservation for reservation in found if reservation and not reservation.discarded_at]

    def discard(self, version: Version) -> None:
        """Remove what was uploaded of an incomplete version. Its number stays taken.

        Raises:
            SafetyError: the version is published; those are never removed here.
        """
        if self._store.exists(self._bucket, f"{version}/{MANIFEST}"):
            raise SafetyError(f"{version} is published, and published versions are not discarded. Nothing was changed.")
        reservation = self._reservation(version)
        if reservation is None:
            raise VersionMissing(f"{version} was never reserved in s3://{self._bucket}. Nothing was changed.")
        closed = reservation.model_copy(update={"discarded_at": reservation.discarded_at or self._now()})
        self._store.put(self._bucket, f"{version}/{RESERVED}", _json(closed), content_type="application/json")
        names = [f"{version}/{name}" for name in self._listing(version).get(version, {}) if name != RESERVED]
        self._store.delete(self._bucket, names)

    def manifest(self, version: Version) -> Manifest:
        """The manifest, its signature verified.

        Raises:
            VersionMissing: the version is not published.
            IntegrityError: the signature does not verify.
        """
        data, signature = bundle.fetch_manifest(self._store, self._bucket, version)
        return bundle.read_manifest(data, signature, version, self._trusted)[0]

    def verify(self, version: Version) -> VerifyReport:
        """Read every stored byte of a version and compare it with the signed manifest.

        Raises:
            VersionMissing: the version is not published.
        """
        try:
            data, signature = bundle.fetch_manifest(self._store, self._bucket, version)
            manifest, signed_by = bundle.read_manifest(data, signature, version, self._trusted)
        except IntegrityError as error:
            return VerifyReport(version, None, (), (str(error).partition("\n")[0],), ())
        checks = tuple(self._check(version, name, entry) for name, entry in manifest.files.items())
        stored = self._listing(version).get(version, {})
        unlisted = tuple(sorted(set(stored) - set(manifest.files) - {MANIFEST, SIGNATURE, RESERVED}))
        problems = tuple(f"{check.name}: {check.problem}" for check in checks if check.problem)
        return VerifyReport(version, signed_by, checks, problems, unlisted)

    def fetch(self, version: Version, folder: Path, only: Collection[str] | None = None) -> Bundle:
        """Bring a version into `folder`, verified; see `ml.bundle.fetch_bundle`."""
        return bundle.fetch_bundle(self._store, self._bucket, version, folder, self._trusted, only=only)

    # Aliases ------------------------------------------------------------------------------------------------------

    def alias(self, name: AliasName) -> AliasState | None:
        """Where an alias points; None: nowhere."""
        return self._aliases.get(name)

    def aliases(self) -> dict[AliasName, AliasState]:
        """All aliases that point somewhere."""
        states = {name: self._aliases.get(name) for name in ALIASES}
        return {name: state for name, state in states.items() if state is not None}

    def alias_history(self, name: AliasName) -> Sequence[AliasMove]:
        """Every move of an alias, oldest first."""
        return self._aliases.history(name)

    def move_alias(self, name: AliasName, version: Version, *, by: str, reason: str) -> AliasState:
        """Point an alias at a published version that verifies. Moving `production` makes `previous` the old one.

        `previous` moves first: killed between the two, `previous` already names what is to be returned to, and the
        same call again completes the move.

        Raises:
            VersionMissing: the version is not published.
            IntegrityError: it does not verify; no alias was moved.
        """
        self._refuse_unverified(version, name)
        current = self._aliases.get(name)
        if (old := displaced(name, current.version if current else None, version)) is not None:
            self._aliases.move("previous", old, by=by, reason=f"production moves to {version}: {reason}")
        self._aliases.move(name, version, by=by, reason=reason)
        state = self._aliases.get(name)
        if state is None or state.version != version:
            raise SafetyError(f"Alias {name} was moved by someone else at the same time; it is not at {version}.")
        return state

    def clear_alias(self, name: AliasName, *, by: str, reason: str) -> None:
        """Let an alias point nowhere (a candidate that was promoted or refused). Its history stays.

        Raises:
            SafetyError: production always points somewhere once it did.
        """
        if name == "production":
            raise SafetyError("Alias production is never cleared; move it to another version. Nothing was changed.")
        self._aliases.move(name, None, by=by, reason=reason)

    # Inside -------------------------------------------------------------------------------------------------------

    def _signer(self) -> Signer:
        if self._signing_key is None:
            raise ConfigError(
                "registry.signing_key is not set, so this process cannot publish. Nothing was written.\n"
                "Next: `khet up` makes a key for the local stack; elsewhere set KHET_REGISTRY__SIGNING_KEY."
            )
        signer = Signer(self._signing_key)
        try:
            signing.verify(b"", signer.sign(b""), self._trusted)
        except IntegrityError as error:
            raise ConfigError(
                f"registry.signing_key {self._signing_key} is none of registry.trusted_keys, so nobody would load what "
                "it signs. Nothing was written.\nNext: add its public key to registry.trusted_keys everywhere."
            ) from error
        return signer

    def _listing(self, version: Version | None = None) -> dict[Version, dict[str, ObjectInfo]]:
        """What is stored per version: file name to listing entry."""
        found: dict[Version, dict[str, ObjectInfo]] = {}
        for info in self._store.list(self._bucket, f"{version}/" if version else "v"):
            top, _, name = info.key.partition("/")
            if name and is_version(top):
                found.setdefault(Version.parse(top), {})[name] = info
        return found

    def _published(self, version: Version) -> Manifest | None:
        try:
            return self.manifest(version)
        except VersionMissing:
            return None

    def _reservation(self, version: Version) -> Reservation | None:
        key = f"{version}/{RESERVED}"
        try:
            return Reservation.model_validate_json(self._store.get(self._bucket, key))
        except ObjectMissing:
            return None
        except ValidationError as error:
            raise IntegrityError(f"s3://{self._bucket}/{key} is not a reservation: {error}.") from error

    def _put_reservation(self, reservation: Reservation) -> bool:
        key = f"{reservation.version}/{RESERVED}"
        return self._store.put(self._bucket, key, _json(reservation), if_absent=True, content_type="application/json")

    def _reserved_by(self, owner: str) -> Version | None:
        """The version that `owner` holds: by its claim, or, if it was killed before that was written, by search."""
        if (claimed := self._claim(owner)) is not None:
            reservation = self._reservation(claimed)
            if reservation is not None and reservation.owner == owner and not reservation.discarded_at:
                return claimed
        mine = [reservation.version for reservation in self.abandoned() if reservation.owner == owner]
        return self._remember(owner, mine[0]) if mine else None

    def _claim(self, owner: str) -> Version | None:
        try:
            return Claim.model_validate_json(self._store.get(self._bucket, _claim_key(owner))).version
        except ObjectMissing:
            return None
        except ValidationError as error:
            raise IntegrityError(f"s3://{self._bucket}/{_claim_key(owner)} is not a claim: {error}.") from error

    def _remember(self, owner: str, version: Version) -> Version:
        claim = Claim(owner=owner, version=version)
        self._store.put(self._bucket, _claim_key(owner), _json(claim), content_type="application/json")
        return version

    def _claimed(self, version: Version, owner: str) -> Reservation:
        """The reservation of `version`, made now if there is none; refused when it is another's or was discarded."""
        self._put_reservation(Reservation(version=version, owner=owner, at=self._now()))
        found = self._reservation(version)
        if found is None or found.discarded_at is not None:
            raise SafetyError(f"{version} was discarded, its number is not used again. Next: reserve another version.")
        if found.owner != owner:
            raise SafetyError(
                f"{version} is reserved by {found.owner} since {found.at:%Y-%m-%d %H:%M:%S} UTC, not by {owner}. "
                "Nothing was written.\nNext: release under a version of its own."
            )
        return found

    def _store_files(
        self, version: Version, folder: Path, files: Mapping[str, FileEntry], on_progress: Progress | None
    ) -> None:
        stored = self._listing(version).get(version, {})
        keep = {n for n, e in files.items() if n in stored and self._is_there(version, n, e, stored[n].size_bytes)}
        strays = set(stored) - set(files) - {RESERVED, MANIFEST, SIGNATURE}
        self._store.delete(self._bucket, [f"{version}/{name}" for name in strays])
        missing = {f"{version}/{name}": folder / name for name in files if name not in keep}
        self._store.upload(self._bucket, missing, on_progress)

    def _is_there(self, version: Version, name: str, entry: FileEntry, size_bytes: int) -> bool:
        """Whether an earlier, killed publish stored this file: its bytes are read again, nothing is taken on trust."""
        return size_bytes == entry.size_bytes and self._check(version, name, entry).problem is None

    def _seal(self, manifest: Manifest, signer: Signer) -> Manifest:
        data = _json(manifest)
        version = manifest.version
        self._store.put(self._bucket, f"{version}/{SIGNATURE}", signer.sign(data))
        key = f"{version}/{MANIFEST}"
        if not self._store.put(self._bucket, key, data, if_absent=True, content_type="application/json"):
            return _same(self.manifest(version), manifest.files)
        return self.manifest(version)

    def _check(self, version: Version, name: str, entry: FileEntry) -> FileCheck:
        try:
            found, size = self._store.digest(self._bucket, f"{version}/{name}")
        except ObjectMissing:
            return FileCheck(name, 0, "missing")
        if size != entry.size_bytes:
            return FileCheck(name, size, f"{size} bytes, expected {entry.size_bytes}")
        if found != entry.sha256:
            return FileCheck(name, size, f"sha256 {found[:12]}… expected {entry.sha256[:12]}…")
        return FileCheck(name, size, None)

    def _refuse_unverified(self, version: Version, alias: AliasName) -> None:
        report = self.verify(version)
        if report.ok:
            return
        state = self._aliases.get(alias)
        raise IntegrityError(
            f"{version} does not verify ({'; '.join(report.problems)}).\n"
            f"No alias was moved; {alias} still points at {state.version if state else 'nothing'}.\n"
            f"Next: `khet verify {version}` shows every file; release again, or restore {version}/ from a backup."
        )


def _entries(folder: Path) -> dict[str, FileEntry]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Nothing was written.")
    files: dict[str, FileEntry] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts):
            continue
        if name not in (MANIFEST, SIGNATURE):
            files[_plain(name, folder)] = FileEntry(sha256=file_sha256(path), size_bytes=path.stat().st_size)
    if MODEL not in files:
        raise ConfigError(f"{folder} holds no {MODEL}, so there is nothing to publish. Nothing was written.")
    return files


def _plain(name: str, folder: Path) -> str:
    try:
        bundle.check_name(name)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}, so it cannot be published. Nothing was written.") from error
    return name


def _same(published: Manifest, files: Mapping[str, FileEntry]) -> Manifest:
    if published.files == files:
        return published
    changed = sorted(n for n in {*published.files, *files} if published.files.get(n) != files.get(n))
    raise IntegrityError(
        f"{published.version} is published already, with other content ({', '.join(changed[:5])}). "
        "Nothing was changed: a version is immutable.\nNext: publish under a new version."
    )


def _claim_key(owner: str) -> str:
    """Owners are free text; a digest keeps the key plain."""
    return f"reservations/{hashlib.sha256(owner.encode()).hexdigest()[:32]}.json"


def _json(record: Reservation | Claim | Manifest) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()
