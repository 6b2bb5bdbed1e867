"""Import a folder of labelled photos as a dataset: every file looked at, nothing taken silently, all or nothing."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.areas import DataSettings
from configs.errors import ConfigError, ExternalError, GateError, IntegrityError
from ml import manifest, pixelcache, splits
from ml.images import ImageRejected
from ml.pixelcache import Progress
from ml.quarantine import Inspected, Quarantined, inspect, write_report
from ml.results import Record
from ml.sources import Source, SourceFile, scan

_GIANT_SHARE = 0.5  # a near-duplicate group with more of a class than this is worth a warning


class ImportReport(Record):
    """What an import did. `near_duplicate_groups` hold more than one image; `mixed_groups` of them several classes.

    `unchanged`: the same content was already there. `warnings` are sentences for people.
    """

    name: str
    root: Path
    source: str
    manifest_hash: str
    files: int
    images: int
    counts: dict[str, dict[str, int]]
    quarantined: tuple[Quarantined, ...]
    near_duplicate_groups: int
    largest_group: int
    mixed_groups: int
    warnings: tuple[str, ...]
    unchanged: bool
    elapsed_s: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class _Photo:
    """An accepted image; its bytes lie at `path` below the staging folder."""

    file: SourceFile
    facts: Inspected
    size_bytes: int

    @property
    def path(self) -> str:
        """Named by content: unique, and safe in every file system and URL."""
        return f"images/{self.file.label}/{self.facts.sha256[:20]}{self.facts.suffix}"


def import_folder(
    source: Path,
    root: Path,
    *,
    name: str,
    settings: DataSettings,
    on_progress: Progress | None = None,
    origin: str | None = None,
) -> ImportReport:
    """Make a dataset at `root` from the class folders in `source`; what `root` held is replaced at the very end.

    The same photos give the same manifest hash. `origin` is noted in dataset.json (default: the folder's path).

    Raises:
        ConfigError: `source` does not have the expected shape.
        GateError: more than `settings.max_bad_share` of the files are bad; a report lies beside `root`.
        ExternalError: the disk is full or not writable.
    """
    started = time.monotonic()
    origin = origin or str(source)
    found = scan(source)
    try:
        with _staging(root) as staging:
            photos, bad = _inspect_all(found, staging, settings, on_progress)
            photos, twins = _without_duplicates(photos)
            quarantined = [*found.refused, *bad, *twins]
            _check_quality(len(photos), quarantined, root, name, settings.max_bad_share)
            rows, groups = _rows(photos, found, settings)
            before = _info_of(root)
            info = _write_dataset(staging, rows, name, settings, origin, quarantined)
            if before is not None and info == before.model_copy(update={"created_at": info.created_at}):
                info = before  # the very same dataset: it keeps its date, so nothing needs to be published
            info.write(staging / manifest.INFO)
            unchanged = before is not None and before.manifest_hash == info.manifest_hash
            report = _report(root, info, found, quarantined, groups, unchanged, time.monotonic() - started)
            report.write(staging / manifest.REPORT)
            swap(staging, root, keep_cache=unchanged)
    except OSError as error:
        raise ExternalError(
            f"Dataset {name} was not imported: {error}. What was there before is unchanged. "
            "Next: free disk space or make the folder writable, then import again.",
            retryable=False,
        ) from error
    return report


def _report(
    root: Path,
    info: manifest.DatasetInfo,
    found: Source,
    quarantined: Sequence[Quarantined],
    groups: _Groups,
    unchanged: bool,
    elapsed_s: float,
) -> ImportReport:
    files = info.images + len(quarantined)
    return ImportReport(
        name=info.name,
        root=root,
        source=info.origin,
        manifest_hash=info.manifest_hash,
        files=files,
        images=info.images,
        counts=info.counts,
        quarantined=tuple(quarantined),
        near_duplicate_groups=sum(size > 1 for size in groups.sizes.values()),
        largest_group=max(groups.sizes.values()),
        mixed_groups=groups.mixed,
        warnings=_warnings(found, info, groups),
        unchanged=unchanged,
        elapsed_s=elapsed_s,
        images_per_s=files / elapsed_s,
    )


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """An empty folder beside `root`, held by one import at a time and gone afterwards."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with pixelcache.exclusive(root.parent / f".{root.name}.lock"):
        recover(root)
        staging = root.parent / f".{root.name}.importing"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def recover(root: Path) -> None:
    """Finish or undo a `swap` that was cut short: the old dataset returns, or what is left of it goes."""
    old = root.parent / f".{root.name}.old"
    if old.exists() and not root.exists():
        old.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def swap(staging: Path, root: Path, *, keep_cache: bool) -> None:
    """Put the finished folder in place of `root`; `keep_cache` takes the decoded pixels along."""
    old = root.parent / f".{root.name}.old"
    if root.exists():
        if keep_cache and (root / manifest.CACHE).is_dir():
            (root / manifest.CACHE).rename(staging / manifest.CACHE)
        root.rename(old)
    staging.rename(root)
    for stale in (old, _rejected(root)):
        shutil.rmtree(stale, ignore_errors=True)


def _rejected(root: Path) -> Path:
    """Where the report of a refused import lies: beside the dataset it did not replace."""
    return root.parent / f"{root.name}.rejected"


def _info_of(root: Path) -> manifest.DatasetInfo | None:
    """What the dataset at `root` says about itself; None where there is none, or a damaged one."""
    try:
        return manifest.DatasetInfo.read(root / manifest.INFO)
    except IntegrityError:
        return None


def _inspect_all(
    found: Source, staging: Path, settings: DataSettings, on_progress: Progress | None
) -> tuple[list[_Photo], list[Quarantined]]:
    for label in {file.label for file in found.files}:
        (staging / "images" / label).mkdir(parents=True)
    photos: list[_Photo] = []
    bad: list[Quarantined] = []
    looked_at = pixelcache.parallel(lambda file: _look_at(file, staging, settings), found.files)
    for done, result in enumerate(looked_at, start=1):
        if isinstance(result, Quarantined):
            bad.append(result)
        else:
            photos.append(result)
        if on_progress is not None and (done % 50 == 0 or done == len(found.files)):
            on_progress(done, len(found.files))
    return photos, bad


def _look_at(file: SourceFile, staging: Path, settings: DataSettings) -> _Photo | Quarantined:
    """Inspect one file and keep the very bytes that were inspected."""
    try:
        data = file.path.read_bytes()
        facts = inspect(data, max_pixels=settings.max_pixels, min_side_px=settings.min_side_px)
    except ImageRejected as error:
        return Quarantined(path=file.name, reason=error.reason, detail=str(error))
    except OSError as error:
        return Quarantined(path=file.name, reason="unreadable", detail=f"The file cannot be read: {error.strerror}.")
    photo = _Photo(file, facts, len(data))
    (staging / photo.path).write_bytes(data)
    return photo


def _without_duplicates(photos: Sequence[_Photo]) -> tuple[list[_Photo], list[Quarantined]]:
    """Keep one of each content; none where the same content has two labels, since one of them must be wrong."""
    by_content: dict[str, list[_Photo]] = defaultdict(list)
    for photo in photos:
        by_content[photo.facts.sha256].append(photo)
    kept: list[_Photo] = []
    dropped: list[Quarantined] = []
    for twins in by_content.values():
        labels = sorted({photo.file.label for photo in twins})
        if len(labels) > 1:
            detail = f"The same image lies under {' and '.join(labels)}: at least one label is wrong."
            dropped += [Quarantined(path=p.file.name, reason="conflicting_labels", detail=detail) for p in twins]
            continue
        kept.append(twins[0])
        detail = f"The same bytes as {twins[0].file.name}."
        dropped += [Quarantined(path=p.file.name, reason="duplicate", detail=detail) for p in twins[1:]]
    return kept, dropped


def _check_quality(good: int, quarantined: Sequence[Quarantined], root: Path, name: str, max_bad_share: float) -> None:
    files = good + len(quarantined)
    share = len(quarantined) / files
    if share <= max_bad_share and good:
        return
    _rejected(root).mkdir(exist_ok=True)
    table = write_report(_rejected(root), quarantined)
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(q.reason for q in quarantined).most_common())
    before = "The dataset of that name is unchanged." if root.exists() else "No dataset was made."
    raise GateError(
        f"{len(quarantined)} of {files} files ({share:.1%}) cannot be used: {reasons}. At most {max_bad_share:.1%} may "
        f"be. {before} Next: read {table}, repair or remove those files, and import {name} again "
        "(or raise data.max_bad_share)."
    )


@dataclass(frozen=True, slots=True)
class _Groups:
    """Sizes of the near-duplicate groups by name, and how many of them hold more than one class."""

    sizes: Mapping[str, int]
    mixed: int


def _rows(photos: list[_Photo], found: Source, settings: DataSettings) -> tuple[pa.Table, _Groups]:
    """The manifest, sorted by label and content, with its groups and splits."""
    photos.sort(key=lambda p: (p.file.label, p.facts.sha256))
    hashes = np.array([p.facts.phash for p in photos], dtype=np.uint64)
    explicit = [found.group.get(p.file.name) for p in photos]
    numbers = splits.group_images(hashes, explicit, settings.duplicate_hamming)
    names: dict[int, str] = {}
    for number, photo in zip(numbers.tolist(), photos, strict=True):
        names[number] = min(photo.facts.sha256[:16], names.get(number, "~"))
    groups = [names[number] for number in numbers.tolist()]
    labels = [p.file.label for p in photos]
    chosen = splits.assign(groups, labels, _shares(settings), settings.split_seed)
    table = _table(photos, found.severity, groups, chosen)
    mixed = sum(len(its) > 1 for its in _labels_by(groups, labels).values())
    return table, _Groups(Counter(groups), mixed)


def _shares(settings: DataSettings) -> dict[splits.SplitName, float]:
    held_out = settings.validation_share + settings.test_share
    if held_out >= 1:
        raise ConfigError(f"data.validation_share + data.test_share = {held_out:.2f} leave nothing to train on.")
    return {"train": 1 - held_out, "validation": settings.validation_share, "test": settings.test_share}


def _labels_by(groups: Sequence[str], labels: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for group, label in zip(groups, labels, strict=True):
        found[group].add(label)
    return found


def _table(
    photos: Sequence[_Photo], severity: Mapping[str, float], groups: Sequence[str], chosen: Sequence[splits.SplitName]
) -> pa.Table:
    rows = [
        {
            "path": photo.path,
            "label": photo.file.label,
            "split": split,
            "sha256": photo.facts.sha256,
            "size_bytes": photo.size_bytes,
            "width": photo.facts.width,
            "height": photo.facts.height,
            "brightness": photo.facts.brightness,
            "sharpness": photo.facts.sharpness,
            "phash": photo.facts.phash,
            "group": group,
            "severity": severity.get(photo.file.name),
            "source": photo.file.name,
        }
        for photo, group, split in zip(photos, groups, chosen, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=manifest.SCHEMA)


def _write_dataset(
    staging: Path,
    rows: pa.Table,
    name: str,
    settings: DataSettings,
    origin: str,
    quarantined: Sequence[Quarantined],
) -> manifest.DatasetInfo:
    """Make `staging` exactly the dataset, but for dataset.json: its images, the tables, the quarantine report."""
    wanted = set(rows["path"].to_pylist())
    for path in (staging / "images").glob("*/*"):
        if path.relative_to(staging).as_posix() not in wanted:
            path.unlink()
    classes = tuple(sorted(set(rows["label"].to_pylist())))
    if len(classes) < 2:
        raise ConfigError(
            f"Only the class {classes[0]!r} has usable images; a classifier needs two. Nothing was imported."
        )
    pq.write_table(rows, staging / manifest.MANIFEST, compression="zstd")
    write_report(staging, quarantined)
    return manifest.DatasetInfo(
        name=name,
        classes=classes,
        healthy_classes=manifest.healthy(classes),
        manifest_hash=manifest.manifest_hash(rows),
        manifest_sha256=hashlib.sha256((staging / manifest.MANIFEST).read_bytes()).hexdigest(),
        images=rows.num_rows,
        counts=manifest.count(rows),
        rules=settings.model_dump(),
        origin=origin,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _warnings(found: Source, info: manifest.DatasetInfo, groups: _Groups) -> tuple[str, ...]:
    warnings = [f"The class folder {label!r} holds no files and was left out." for label in found.empty_classes]
    lost = sorted({file.label for file in found.files} - set(info.classes))
    warnings += [f"No file of the class {label!r} could be used; the class was left out." for label in lost]
    for label, counts in info.counts.items():
        if missing := [split for split in splits.SPLITS if not counts[split]]:
            warnings.append(f"{label} has no image for {' and '.join(missing)}: too few, or all near-duplicates.")
        if max(groups.sizes.values()) > _GIANT_SHARE * sum(counts.values()):
            warnings.append(
                f"A group of {max(groups.sizes.values())} near-duplicates is more than half the size of {label}: "
                "are these photos of few scenes, or on one background?"
            )
    if groups.mixed:
        warnings.append(f"{groups.mixed} groups of near-duplicates hold more than one class; look at their labels.")
    if not info.healthy_classes:
        warnings.append('No class has "healthy" in its name: the missed-disease rate cannot be told.')
    if unknown := (set(found.severity) | set(found.group)) - {file.name for file in found.files}:
        warnings.append(f"{len(unknown)} rows of severity.csv or groups.csv name files that are not there.")
    return tuple(warnings)
