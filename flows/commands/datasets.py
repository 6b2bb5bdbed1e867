"""`khet data ...`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from configs.settings import load_settings
from flows.terminal import err, out, print_json, print_table, shown_path

if TYPE_CHECKING:
    from ml.dataset import ImportReport

_SHOWN_REASONS = 8


def import_source(source: str, name: str, *, as_json: bool) -> None:
    """Import a folder or an S3 prefix."""
    from tasks.datasets import import_dataset

    with _bar(f"importing {name}", quiet=as_json) as on_progress:
        report = import_dataset(source, name, load_settings(), on_progress=on_progress)
    _show(report, as_json=as_json)


def sample(name: str, count: int | None, seed: int, *, as_json: bool) -> None:
    """Generate and import leaf photos."""
    from tasks.datasets import SAMPLE_COUNT, sample_dataset

    with _bar(f"sampling {name}", quiet=as_json) as on_progress:
        report = sample_dataset(name, load_settings(), count=count or SAMPLE_COUNT, seed=seed, on_progress=on_progress)
    _show(report, as_json=as_json)


def fetch(name: str, *, as_json: bool) -> None:
    """Bring a dataset here."""
    from tasks.datasets import fetch_dataset

    with _bar(f"fetching {name}", quiet=as_json) as on_progress:
        dataset = fetch_dataset(name, load_settings(), on_progress=on_progress)
    if as_json:
        print_json({"root": dataset.root, **dataset.info.model_dump(mode="json")})
        return
    what = f"{dataset.info.images} images, manifest {dataset.manifest_hash[:12]}"
    out.print(f"{name}: {what}, in {shown_path(dataset.root)}", markup=False)


def show_list(*, as_json: bool) -> None:
    """Every dataset in the store."""
    from tasks.datasets import list_datasets

    found = list_datasets(load_settings())
    if as_json:
        print_json(found)
        return
    rows = [[info.name, info.images, len(info.classes), info.manifest_hash[:12], info.created_at] for info in found]
    print_table("Datasets", ["name", "images", "classes", "manifest", "imported"], rows)


@contextlib.contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=quiet, transient=True) as progress:
        row = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(row, completed=done, total=total)


def _show(report: ImportReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    splits = sorted({split for counts in report.counts.values() for split in counts})
    rows = [[name, *(counts.get(split, 0) for split in splits)] for name, counts in sorted(report.counts.items())]
    print_table(f"{report.name}: {report.images} images", ["", *splits], rows)
    for warning in report.warnings:
        out.print(f"note: {warning}", markup=False)
    if report.quarantined:
        out.print(f"{len(report.quarantined)} of {report.files} files were put aside, for example:")
        for bad in report.quarantined[:_SHOWN_REASONS]:
            out.print(f"  {bad.path}: {bad.reason} ({bad.detail})", markup=False)
        out.print(f"All of them: {shown_path(report.root / 'quarantine.csv')}", markup=False)
    if report.unchanged:
        out.print("The same content was there already; nothing was changed.")
