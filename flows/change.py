"""How the deployment procedures show what they would do, and what they did."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger

from tasks.prefect_support import show_markdown, show_table
from tasks.progress import report
from tasks.rollout.journal import ReleaseRecord, utc_now


def show_dry_run(record: ReleaseRecord, sentences: Sequence[str], diff: str, *, dry_run: bool = True) -> ReleaseRecord:
    """What would be done, in sentences and as a difference; nothing was changed. Without `dry_run`: there was nothing
    to do."""
    for sentence in sentences if diff else ("nothing: the cluster is as asked for",):
        get_run_logger().info("would: %s", sentence)
        report("plan", "note", f"would: {sentence}")
    numbered = [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)]
    lines = ["# What it would do", "", *numbered, "", "```diff", diff or "no difference", "```"]
    show_markdown(f"plan-{record.release_id}", "\n".join(lines), "Dry run" if dry_run else "Nothing to do")
    outcome = "dry_run" if dry_run else "done"
    reasons = tuple(sentences) if dry_run else ("nothing to do: the cluster is as asked for",)
    return record.model_copy(update={"outcome": outcome, "finished_at": utc_now(), "diff": diff, "reasons": reasons})


def show_change(record: ReleaseRecord) -> None:
    """The stages and the difference they made, as a table and a card."""
    stages = [
        {"stage": stage.name, "result": stage.state, "seconds": stage.duration_s, "note": stage.note}
        for stage in record.stages
    ]
    show_table(f"stages-{record.release_id}", stages, "; ".join(record.reasons))
    lines = [f"# {record.kind.replace('_', ' ').capitalize()}: {'; '.join(record.reasons)}", "", "```diff"]
    show_markdown(f"change-{record.release_id}", "\n".join([*lines, record.diff, "```"]), record.outcome)
