"""Every test starts from the same environment: no settings of the person who runs it, a home of its own."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# The same examples each time: a commit that passed fails by no later luck. HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore", max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A shell starts its background jobs with Ctrl-C ignored, and so would be every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


# Tests of one group run in one worker, one after the other: they share what is started once a session.
_TOGETHER = {
    "tests/e2e/cluster/test_killed.py": "cluster stack",
    "tests/e2e/cluster/test_life.py": "cluster stack",
    "tests/e2e/test_": "local stack",
    "tests/flows/": "prefect",
}


class Groups(LoadScopeScheduling):
    """Deals the tests to `pytest -n`'s workers by group: what needs a stack on a real cluster, a local one, Prefect's
    test server, and everything else by file."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((name for start, name in _TOGETHER.items() if file.startswith(start)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Hook of pytest-xdist."""
    return Groups(config, log)


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Settings are cached a process; a test that changes the environment must not leave its values behind."""
    from configs.settings import settings

    settings.cache_clear()
    yield
    settings.cache_clear()
