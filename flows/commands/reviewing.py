"""`khet review` and `khet feedback add`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.settings import settings
from flows.commands.running import run_flow, view
from flows.orchestrator import connect
from flows.systems import requester
from flows.terminal import out, print_json
from ml.version import Version


def review(parameters: dict[str, Any], *, as_json: bool) -> None:
    """Run the review flow here."""
    connect(settings(), quiet=True)
    with view(as_json):
        from flows.review import release_review as flow

        found = run_flow(flow, parameters)
    if as_json:
        print_json(found)
        return
    out.print(found.sentence, markup=False)
    for gate in found.verdict.get("gates", ()):
        out.print(f"  {gate['name']}: {gate['sentence']}", markup=False)


def add(file: Path, *, correct: bool, as_json: bool) -> None:
    """Import a file of labels."""
    from ml.objects import ObjectStore
    from tasks.audit import audit
    from tasks.feedback.importing import import_labels
    from tasks.feedback.predictions import PredictionLog
    from tasks.feedback.store import FeedbackStore

    current = settings()
    added = import_labels(
        file,
        FeedbackStore(current.database),
        PredictionLog(ObjectStore(current.object_store), current.object_store.data_bucket),
        _classes_of,
        now=datetime.now(UTC),
        lookup_days=current.review.lookup_days,
        correct=correct,
    )
    audit(current).record(requester(), "feedback", file.name, dataclasses.asdict(added), "done")
    if as_json:
        print_json(added)
        return
    corrected = f", {added.corrected} corrected" if added.corrected else ""
    out.print(f"{added.new} labels stored{corrected}; {added.known} were known.")


@functools.cache
def _classes_of(version: str) -> Collection[str]:
    from tasks.registry import Registry
    from tasks.registry.metadata import model_metadata

    return model_metadata(Registry.from_settings(settings()), Version.parse(version)).classes
