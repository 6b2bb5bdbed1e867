"""Every test starts from the same environment: no settings of the person who runs it, a home of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The same examples each time: a commit that passed fails by no later luck. HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore", max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Before anything imports prefect: tests never talk to a person's server, and never phone home.
for _name in [n for n in os.environ if n.startswith(("KHET_", "PREFECT_")) and not n.startswith("KHET_TEST_")]:
    del os.environ[_name]
_home = Path(tempfile.mkdtemp(prefix="khet-tests-"))
os.environ.update(
    KHET_HOME=str(_home / "khet"),
    PREFECT_HOME=str(_home / "prefect"),
    PREFECT_LOGGING_TO_API_ENABLED="false",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    OMP_WAIT_POLICY="PASSIVE",
)


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Settings are cached a process; a test that changes the environment must not leave its values behind."""
    from configs.settings import settings

    settings.cache_clear()
    yield
    settings.cache_clear()
