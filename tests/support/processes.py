"""Several Python processes at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(programs: Sequence[str], timeout_s: float = 120) -> list[str]:
    """Run the programs side by side from the project's root; returns what each printed. All must succeed."""
    children = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for code in programs
    ]
    try:
        answers = [child.communicate(timeout=timeout_s)[0].strip() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    assert [child.returncode for child in children] == [0] * len(children), answers
    return answers
