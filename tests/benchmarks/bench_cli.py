"""How long the terminal takes to answer: `khet --help` and, with the local stack up, `khet status`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.settings import PROJECT_ROOT
from tests.support.local_stack import LocalStack, start_local_stack

HELP_LIMIT_S, STATUS_LIMIT_S = 0.5, 1.5
RUNS = 7


def khet() -> str:
    """The installed console script, as a person calls it."""
    return str(Path(sys.executable).with_name("khet"))


def median_s(arguments: list[str], environment: dict[str, str] | None = None) -> float:
    """Median wall time of a command, after one run that warms the disk cache."""
    times = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True, env=environment, cwd=PROJECT_ROOT)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> dict[str, float]:
    """Measure and print; returns seconds by command."""
    with tempfile.TemporaryDirectory(prefix="khet-bench-") as folder:
        stack: LocalStack = start_local_stack(Path(folder) / "khet")
        try:
            measured = {
                "khet --help": median_s([khet(), "--help"]),
                "python -c pass": median_s([sys.executable, "-c", "pass"]),
                "khet status": median_s([khet(), "status"], stack.environment),
            }
        finally:
            stack.khet("down", code=None)
    table = Table(title=f"Terminal, median of {RUNS}")
    for column in ("command", "seconds", "limit"):
        table.add_column(column)
    limits = {"khet --help": HELP_LIMIT_S, "khet status": STATUS_LIMIT_S}
    for name, seconds in measured.items():
        table.add_row(name, f"{seconds:.3f}", str(limits.get(name, "")))
    Console().print(table)
    return measured


if __name__ == "__main__":
    main()
