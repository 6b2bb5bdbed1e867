"""Every deployment as Prefect will see it, against a snapshot: a changed form is a decision, not an accident.

`python -m tests.flows.test_deployments` writes the snapshot anew.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from configs.base import load_yaml, read_yaml
from configs.settings import PROJECT_ROOT
from configs.training import TrainingConfig
from flows.commands.deploying import PREFECT_FILE, check_entrypoints

SNAPSHOT = Path(__file__).with_name("deployments.json")


def definitions() -> list[dict[str, Any]]:
    """The deployments with the forms that their flows give them."""
    from prefect.utilities.callables import parameter_schema

    found = []
    for deployment in read_yaml(PREFECT_FILE)["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        schema = parameter_schema(flow).model_dump()
        found.append({**deployment, "flow": flow.name, "form": schema["properties"], "required": schema["required"]})
    return found


def test_the_deployments_are_as_recorded() -> None:
    assert json.loads(json.dumps(definitions())) == json.loads(SNAPSHOT.read_text())


@pytest.mark.parametrize("deployment", definitions(), ids=lambda d: str(d["name"]))
def test_every_field_of_a_form_is_described_and_every_default_is_a_field(deployment: dict[str, Any]) -> None:
    undescribed = [name for name, field in deployment["form"].items() if not field.get("description")]
    assert undescribed == []
    # Prefect accepts an unknown parameter name and crashes the run with it.
    assert set(deployment["parameters"]) <= set(deployment["form"])
    assert deployment["required"] == []


def test_a_rollout_never_runs_beside_another() -> None:
    for deployment in definitions():
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_labels_are_looked_at_every_night_and_change_nothing_by_themselves() -> None:
    review = next(d for d in definitions() if d["name"] == "release-review")
    assert review["schedules"] == [{"cron": "0 3 * * *", "timezone": "Asia/Kolkata"}]
    assert review["parameters"] == {"act": False, "dry_run": False}


def test_the_default_configuration_of_a_release_loads() -> None:
    release = next(d for d in definitions() if d["name"] == "release")
    assert load_yaml(TrainingConfig, PROJECT_ROOT / release["parameters"]["config"]).dataset == "leaves"


def test_entrypoints_are_checked_before_anything_is_registered() -> None:
    assert check_entrypoints(PREFECT_FILE) == [
        "release/release",
        "rollback/rollback",
        "release_review/release-review",
    ]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(definitions(), indent=1) + "\n", encoding="utf-8")
