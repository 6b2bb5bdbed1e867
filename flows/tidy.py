"""Remove local copies that nothing needs any more. Published versions in the object store are never touched."""

from __future__ import annotations

import shutil
from pathlib import Path

from configs.settings import home


def tidy_work_folders(keep: int) -> list[Path]:
    """Keep the work folders of the newest `keep` releases; returns what was removed."""
    root = home() / "work"
    if not root.is_dir():
        return []
    newest_first = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    removed = newest_first[keep:]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed
