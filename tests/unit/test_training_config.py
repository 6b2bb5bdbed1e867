"""Training configurations: every shipped file loads, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.base import load_yaml
from configs.errors import ConfigError
from configs.training import TrainingConfig
from ml.train import load_config, resolve_dataset
from tests.support.training import CONFIGS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert load_yaml(TrainingConfig, path).budget is not None


def test_the_runbooks_configuration_is_shipped() -> None:
    config = load_yaml(TrainingConfig, CONFIGS / "plant_disease.yaml")
    assert (config.dataset, config.net, config.px) == ("leaves", "convnet", 64)


@pytest.mark.parametrize("budget", ["{}", "{epochs: 2, seconds: 3}", "{epochs: 0}", "{seconds: -1}"])
def test_a_budget_is_epochs_or_seconds(tmp_path: Path, budget: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"budget: {budget}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: budget"):
        load_config(file)


def test_an_unknown_key_is_named_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("budget: {epochs: 1}\noptimizer: {learning_rate: 1}\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: optimizer\.learning_rate: unknown key"):
        load_config(file)


def test_values_can_be_set_one_by_one() -> None:
    overrides = ["budget={seconds: 7}", "optimizer.lr=0.5", "net=resnet18", "early_stopping=null"]
    config = load_config(CONFIGS / "smoke.yaml", overrides)
    assert (config.budget.seconds, config.budget.epochs) == (7.0, None)
    assert (config.optimizer.lr, config.net, config.early_stopping) == (0.5, "resnet18", None)


@pytest.mark.parametrize("text", ["lr", "=3", "optimizer.lr=[", "optimizer.speed=3", "net=vgg"])
def test_a_wrong_override_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(CONFIGS / "smoke.yaml", [text])


def test_weights_from_an_object_store_must_be_pinned() -> None:
    with pytest.raises(ConfigError, match="init_weights_sha256"):
        load_config(CONFIGS / "smoke.yaml", ["init_weights=s3://bucket/best.ckpt"])


def test_a_missing_dataset_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHET_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="khet data sample --name leaves"):
        resolve_dataset("leaves")


def test_a_dataset_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHET_HOME", str(tmp_path))
    root = tmp_path / "datasets" / "leaves"
    root.mkdir(parents=True)
    (root / "dataset.json").write_text("{}")
    assert resolve_dataset("leaves") == root
    assert resolve_dataset(str(root)) == root
