"""How the terminal shows things: progress of a release, tables, errors. JSON where a program reads."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from configs.errors import KhetError
from ml.version import Version
from tasks.progress import Progress as Report
from tasks.progress import listen

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_MARKS = {"done": "[green]✓[/]", "cached": "[cyan]✓[/]", "failed": "[red]✗[/]", "skipped": "[dim]–[/]"}


def to_json(value: Any) -> Any:
    """Plain JSON types for dataclasses, pydantic models, enums, dates and paths."""
    if isinstance(value, Version):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, enum.Enum):
        return value.value
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(to_json(value), indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*["–" if cell is None else str(cell) for cell in row])
    out.print(table)


def print_error(error: KhetError, *, as_json: bool) -> None:
    """What went wrong, on standard error (and as JSON on standard output where a program listens)."""
    if as_json:
        print_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
    err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    err.print(str(error), markup=False)


class ReleaseView:
    """Live progress of a release: a line a stage, a bar where the end is known."""

    def __init__(self) -> None:
        self._live = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        self._rows: dict[str, TaskID] = {}
        self._forget: Callable[[], None] | None = None

    def __enter__(self) -> ReleaseView:
        self._live.start()
        self._forget = listen(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        if self._forget is not None:
            self._forget()
        self._live.stop()

    def _see(self, report: Report) -> None:
        if report.state == "note":
            self._live.console.print(f"  {report.text}", markup=False)
        elif report.state == "running":
            self._running(report)
        else:
            self._ended(report)

    def _running(self, report: Report) -> None:
        if report.stage not in self._rows:
            self._rows[report.stage] = self._live.add_task(report.stage, total=None, note="")
        row = self._rows[report.stage]
        self._live.update(
            row, note=report.text[:100] or self._live.tasks[self._live.task_ids.index(row)].fields["note"]
        )
        if report.fraction is not None:
            self._live.update(row, total=1.0, completed=report.fraction)

    def _ended(self, report: Report) -> None:
        if (row := self._rows.pop(report.stage, None)) is not None:
            self._live.remove_task(row)
        self._live.console.print(f"{_MARKS[report.state]} {report.stage:<18} ", end="")
        self._live.console.print(report.text, markup=False)


def human_bytes(size: float) -> str:
    """Bytes in the unit a person reads."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def shown_path(path: Path) -> str:
    """A path, from here where it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
