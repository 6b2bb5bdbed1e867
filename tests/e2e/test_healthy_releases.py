"""The other side of a strict judge: what is healthy gets through, again and again, by the shipped rules."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.local_stack import LocalStack
from tests.support.variants import disturb_weights, publish_variant

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RELEASES = 20
QUICK = {"KHET_REPLAY__RATE_PER_S": "150"}


def test_twenty_healthy_releases_in_a_row_promote(
    served: LocalStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second one beside a baseline of the champion. The judge's settings are the shipped ones."""
    shipped = {name: value for name, value in served.environment.items() if not name.startswith("KHET_JUDGE__")}
    for number, baseline in zip(range(RELEASES), itertools.cycle(("off", "on")), strict=False):
        folder = tmp_path / str(number)
        folder.mkdir()
        version = publish_variant(served, monkeypatch, folder, disturb_weights(number))
        environment = {**shipped, **QUICK, "KHET_CANARY__BASELINE": baseline}
        released = LocalStack(served.home, environment, served.faults).json(
            "release", "--version", version, "--data", "leaves"
        )
        assert (released["outcome"], released["version"]) == ("promoted", version), released["reasons"]
        assert served.traffic() == {version: 1.0}
