"""Datasets: imported on this machine, kept in the object store, fetched where they are needed.

    s3://<data bucket>/training/<name>/images/<label>/<content hash>.jpg
                                       manifests/<hash>.parquet      every manifest this name ever had
                                       manifest.parquet              the current one, for people and tools
                                       dataset.json                  written last: names the manifest that counts

Images and manifests are named by content and never overwritten, and dataset.json is one object, so a reader sees the
old dataset or the new one, whenever a writer dies.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from configs.errors import ConfigError, ExternalError
from configs.settings import Settings, home
from ml import leaves
from ml.dataset import Dataset, DatasetInfo, ImportReport, import_folder
from ml.manifest import REPORT
from ml.objects import ObjectStore
from ml.pixelcache import Progress
from tasks.datasets.store import DatasetStore

__all__ = [
    "SAMPLE_COUNT",
    "dataset_info",
    "fetch_dataset",
    "import_dataset",
    "list_datasets",
    "local_root",
    "sample_dataset",
]

SAMPLE_COUNT: Final = 4000
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def local_root(name: str) -> Path:
    """Where this machine keeps its copy.

    Raises:
        ConfigError: not a name that folders and object keys can carry.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name a dataset: use up to 63 small letters, digits, dots, dashes and underscores."
        )
    return home() / "datasets" / name


def import_dataset(
    source: str | Path, name: str, settings: Settings, *, on_progress: Progress | None = None
) -> ImportReport:
    """Import a folder or an `s3://bucket/prefix` of the same shape, then publish it under `name`.

    Raises:
        ConfigError: the source does not have the expected shape, or the name is unusable.
        GateError: too many bad files.
        ExternalError: the store or the disk failed. Publishing goes on where it stopped when this is called again.
    """
    root, store = local_root(name), _store(settings)
    origin = str(source)
    with _local_folder(origin, store) as folder:
        report = import_folder(
            folder,
            root,
            name=name,
            settings=settings.data,
            on_progress=_phase(on_progress, 0, 2),
            origin=origin if origin.startswith("s3://") else str(folder.resolve()),
        )
    store.publish(Dataset.open(root), _phase(on_progress, 1, 2))
    return report


def sample_dataset(
    name: str,
    settings: Settings,
    *,
    count: int = SAMPLE_COUNT,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> ImportReport:
    """Generate leaf photos, import and publish them. What is there already is not made again.

    Raises:
        ConfigError: the name or the count is unusable.
        ExternalError: the store or the disk failed; call again to go on.
    """
    root, store = local_root(name), _store(settings)
    recipe = leaves.recipe(count, seed=seed)
    report = _imported_before(root, recipe, settings)
    if report is None:
        folder = home() / "work" / f"sample-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
        leaves.generate(folder, count, seed=seed, on_progress=_phase(on_progress, 0, 3))
        inspected = _phase(on_progress, 1, 3)
        report = import_folder(folder, root, name=name, settings=settings.data, on_progress=inspected, origin=recipe)
        shutil.rmtree(folder, ignore_errors=True)
    store.publish(Dataset.open(root), _phase(on_progress, 2, 3))
    return report


def fetch_dataset(name: str, settings: Settings, *, on_progress: Progress | None = None) -> Dataset:
    """The dataset as the store has it, on this machine: downloaded, completed or repaired, every byte checked.

    Raises:
        ConfigError: the store has no such dataset; the message lists those it has.
        IntegrityError: the store's copy is damaged.
        ExternalError: the store or the disk failed.
    """
    root, info = local_root(name), dataset_info(name, settings)
    _store(settings).fetch(info, root, on_progress)
    return Dataset.open(root)


def dataset_info(name: str, settings: Settings) -> DatasetInfo:
    """What the store says about a dataset, without its images.

    Raises:
        ConfigError: the store has no such dataset; the message lists those it has.
    """
    store = _store(settings)
    info = store.info(name)
    if info is None:
        known = ", ".join(found.name for found in store.list()) or "none yet"
        raise ConfigError(
            f"The object store has no dataset {name!r} (it has: {known}). "
            f"Next: `khet data import FOLDER --name {name}` or `khet data sample --name {name}`."
        )
    return info


def list_datasets(settings: Settings) -> list[DatasetInfo]:
    """Every complete dataset in the store, by name."""
    return list(_store(settings).list())


def _store(settings: Settings) -> DatasetStore:
    objects = settings.object_store
    return DatasetStore(ObjectStore(objects), objects.data_bucket, objects.upload_threads)


def _imported_before(root: Path, recipe: str, settings: Settings) -> ImportReport | None:
    """The report of an earlier import of the same photos by the same rules, if this machine still has it."""
    if not (root / REPORT).exists():
        return None
    dataset = Dataset.open(root)
    if dataset.info.origin != recipe or dataset.info.rules != settings.data.model_dump():
        return None
    return ImportReport.read(root / REPORT).model_copy(update={"unchanged": True, "root": root})


@contextmanager
def _local_folder(source: str, store: DatasetStore) -> Iterator[Path]:
    """The folder to import; a prefix in a store is downloaded for as long as it is needed."""
    if not source.startswith("s3://"):
        yield Path(source).expanduser()
        return
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    staging = home() / "work" / f"download-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    try:
        store.download(bucket, prefix, staging)
        yield staging
    except OSError as error:
        raise ExternalError(f"{source} cannot be downloaded to {staging}: {error}.", retryable=False) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _phase(on_progress: Progress | None, number: int, phases: int) -> Progress | None:
    """Progress of phase `number` of several, each counted as long as the other."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(number * total + done, phases * total)
