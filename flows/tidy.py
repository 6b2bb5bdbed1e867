"""Remove copies that nothing needs any more. Published versions in the object store are never touched."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from configs.settings import home
from ml.checkpoint_store import forget
from ml.objects import ObjectStore
from tasks.rollout import journal
from tasks.rollout.journal import Outcome
from tasks.training.steps import TRAININGS


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


def tidy_trainings(store: ObjectStore, bucket: str, resumable: Collection[Outcome]) -> list[str]:
    """Delete what the object store keeps of trainings whose release has ended for good; returns their ids.

    A training that a person started by itself belongs to no release, and stays until a person deletes it.
    """
    removed = []
    for prefix in store.prefixes(bucket, TRAININGS):
        training_id = prefix.removeprefix(TRAININGS).rstrip("/")
        if not store.exists(bucket, journal.key(training_id)):
            continue
        if journal.read(store, bucket, training_id).outcome not in resumable:
            forget(store, bucket, prefix)
            removed.append(training_id)
    return removed
