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
        if deployment["name"] == "train":  # changes nothing that is served
            assert "concurrency_limit" not in deployment
            continue
        # `blue-green --back` runs beside the deployment that it ends; the rollout's lease refuses a second one.
        limit = 2 if deployment["name"] == "blue-green" else 1
        assert deployment["concurrency_limit"] == {"limit": limit, "collision_strategy": "CANCEL_NEW"}


def test_the_watchdog_looks_every_minute_where_the_backend_does_not_guard_itself() -> None:
    watchdog = next(d for d in definitions() if d["name"] == "rollout-watchdog")
    active = "{{ $KHET_WATCHDOG_ACTIVE }}"
    assert watchdog["schedules"] == [{"cron": "* * * * *", "timezone": "UTC", "active": active}]


def test_labels_are_looked_at_every_night_and_change_nothing_by_themselves() -> None:
    review = next(d for d in definitions() if d["name"] == "release-review")
    assert review["schedules"] == [{"cron": "0 3 * * *", "timezone": "Asia/Kolkata"}]
    assert review["parameters"] == {"act": False, "dry_run": False}


@pytest.mark.parametrize("name", ["release", "train"])
def test_the_default_configuration_loads(name: str) -> None:
    found = next(d for d in definitions() if d["name"] == name)
    assert load_yaml(TrainingConfig, PROJECT_ROOT / found["parameters"]["config"]).dataset == "leaves"


def test_training_goes_to_a_pool_of_its_own() -> None:
    pools = {d["name"]: d["work_pool"]["name"] for d in definitions()}
    assert pools.pop("train") == "{{ $KHET_TRAIN_POOL }}"
    assert set(pools.values()) == {"{{ $KHET_WORK_POOL }}"}


def test_entrypoints_are_checked_before_anything_is_registered() -> None:
    assert check_entrypoints(PREFECT_FILE) == [
        "release/release",
        "train/train",
        "rollback/rollback",
        "release_review/release-review",
        "rolling_update/rolling-update",
        "blue_green/blue-green",
        "ab_test/ab-test",
        "scale/scale",
        "restart/restart",
        "rollout_watchdog/rollout-watchdog",
    ]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(definitions(), indent=1) + "\n", encoding="utf-8")
