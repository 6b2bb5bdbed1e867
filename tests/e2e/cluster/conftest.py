"""One stack on a real cluster a session, with a promoted version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import QUICK
from tests.support.cluster_stack import ClusterStack, running_cluster_stack


@pytest.fixture(scope="session")
def cluster_stack(tmp_path_factory: pytest.TempPathFactory, good: Path) -> Iterator[ClusterStack]:
    """The first release has deployed its version into an empty namespace."""
    with running_cluster_stack(tmp_path_factory.mktemp("cluster") / "stack", **QUICK) as stack:
        stack.khet("data", "sample", "--name", "leaves", "--count", "1200")
        stack.khet("release", "--config", str(good))
        yield stack
