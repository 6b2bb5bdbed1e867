"""What the orchestration adds to a release: Prefect, registry, records and waiting, against the release's own work.

Own work is what any way of releasing has to do: training, export, evaluation, starting replicas, and the time a canary
is watched. Everything else between the command's first and last moment is orchestration.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support.local_stack import LocalStack, start_local_stack

LIMIT = 0.10
OWN_WORK = ("train", "export", "evaluate", "evaluate champion", "first deploy", "smoke test", "deploy canary", "canary",
            "promote")  # fmt: skip


def release_once(stack: LocalStack, config: str) -> tuple[float, dict[str, float]]:
    """Wall seconds of the command, and seconds by stage."""
    began = time.perf_counter()
    record = stack.json("release", "--config", config)
    wall = time.perf_counter() - began
    return wall, {stage["name"]: stage["duration_s"] for stage in record["stages"]}


def is_own_work(stage: str) -> bool:
    """Whether a stage is work that remains without any orchestration."""
    return stage.startswith(OWN_WORK)


def main(config: str = "configs/training/plant_disease.yaml", count: int = 4000) -> dict[str, float]:
    """Two releases on a fresh stack; prints a table, returns the share of the second."""
    with tempfile.TemporaryDirectory(prefix="khet-bench-") as folder:
        stack = start_local_stack(Path(folder) / "khet")
        try:
            stack.khet("data", "sample", "--name", "leaves", "--count", str(count))
            runs = [release_once(stack, config) for _ in range(2)]
        finally:
            stack.khet("down", code=None)
    table = Table(title=f"Orchestration of a release, limit {LIMIT:.0%}")
    for column in ("release", "wall s", "own work s", "orchestration s", "share"):
        table.add_column(column)
    shares = []
    for name, (wall, stages) in zip(("first", "second"), runs, strict=True):
        work = sum(seconds for stage, seconds in stages.items() if is_own_work(stage))
        shares.append((wall - work) / work)
        table.add_row(name, f"{wall:.1f}", f"{work:.1f}", f"{wall - work:.1f}", f"{shares[-1]:.1%}")
    Console().print(table)
    return {"first": shares[0], "second": shares[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/training/plant_disease.yaml")
    parser.add_argument("--count", type=int, default=4000)
    arguments = parser.parse_args()
    main(arguments.config, arguments.count)
