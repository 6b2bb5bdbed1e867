"""One local stack a session, with a small dataset and quick settings; real processes on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.local_stack import LocalStack, start_local_stack

# Quick, and lenient where a model trained for seconds cannot be good; the rules are the shipped ones.
QUICK = {
    "KHET_GATE__MIN_ACCURACY": "0.6",
    "KHET_GATE__MIN_RECALL": "0.0",
    "KHET_GATE__MIN_SLICE_ACCURACY": "0.0",
    "KHET_GATE__MAX_ECE": "0.5",
    "KHET_GATE__ACCURACY_MARGIN": "0.15",
    "KHET_GATE__SIGNIFICANCE": "0",
    "KHET_GATE__MISSED_DISEASE_MARGIN": "0.3",
    "KHET_JUDGE__DISAGREEMENT__MARGIN": "0.5",
    "KHET_JUDGE__CLASS_DISAGREEMENT__MARGIN": "0.9",
    "KHET_JUDGE__CLASS_MIX__MARGIN": "0.4",
    "KHET_JUDGE__ACCURACY__MARGIN": "0.2",
    "KHET_JUDGE__SLOW__MARGIN": "0.3",
    "KHET_JUDGE__TAIL__FACTOR": "4",
    "KHET_CANARY__LEASE_S": "8",
    "KHET_CANARY__SHADOW_REQUESTS": "80",
    "KHET_CANARY__MIN_SAMPLES": "25",
    "KHET_CANARY__DEADLINE_S": "90",
    "KHET_REPLAY__RATE_PER_S": "100",
    "KHET_TRACKING__MODE": "disabled",
    "KHET_ORCHESTRATOR__APPROVAL_TIMEOUT_S": "120",
}
GOOD = "dataset: leaves\nbudget: {epochs: 40}\npx: 32\nbatch_size: 32\noptimizer: {lr: 0.004}\nvalidate_every: 10\n"
BAD = "dataset: leaves\nbudget: {epochs: 1}\npx: 32\nbatch_size: 256\noptimizer: {lr: 1.0e-9}\nema_decay: null\n"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A running stack with the dataset `leaves`."""
    started = start_local_stack(tmp_path_factory.mktemp("e2e") / "khet", **QUICK)
    try:
        started.khet("data", "sample", "--name", "leaves", "--count", "1200")
        yield started
    finally:
        started.khet("down", code=None)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training configuration that passes the lenient gate in seconds."""
    return _write(tmp_path_factory, "good", GOOD)


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that learns nothing."""
    return _write(tmp_path_factory, "bad", BAD)


def _write(factory: pytest.TempPathFactory, name: str, text: str) -> Path:
    file = factory.mktemp("configs") / f"{name}.yaml"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def served(stack: LocalStack, good: Path) -> LocalStack:
    """The stack with a promoted version."""
    if stack.production() is None:
        stack.khet("release", "--config", str(good))
    return stack
