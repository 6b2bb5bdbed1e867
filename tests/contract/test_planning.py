"""The planner beside a running node: its traffic is measured where nobody says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.planning import measured_rate
from ml.version import Version
from tasks.cluster import Track
from tests.support.node import Traffic, running_node


def test_the_plan_takes_the_traffic_of_the_running_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_node(tmp_path, areas={"replay": {"enabled": False}}) as node:
        node.client.deploy(Track.stable, Version.parse("v1.0.0"), 1)
        node.client.wait_ready(Track.stable, 20.0)
        node.client.set_weights({Track.stable: 1.0})
        monkeypatch.setenv("KHET_HOME", str(node.home))
        monkeypatch.setattr("flows.commands.canary.MEASURE_S", 1.0)
        with Traffic(node.gateway_url, rate_per_s=40.0) as users:
            users.wait_for(20)
            assert measured_rate(node.client, 1.0) == pytest.approx(40.0, rel=0.25)
            planned = CliRunner().invoke(app, ["canary", "plan", "--json"])
        nobody = CliRunner().invoke(app, ["canary", "plan"])
    found = json.loads(planned.output)
    assert found["traffic"]["requests_per_s"] == pytest.approx(40.0, rel=0.25)
    assert found["traffic"]["labelled_per_s"] == 0.0
    assert "No requests arrive at the gateway" in str(nobody.exception)
