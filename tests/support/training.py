"""A tiny dataset and a tiny trained model, made once a test process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import yaml

from configs.areas import DataSettings
from configs.base import validate
from configs.settings import PROJECT_ROOT
from configs.training import TrainingConfig
from ml.dataset import import_folder
from ml.leaves import generate

CONFIGS = PROJECT_ROOT / "configs" / "training"


@functools.lru_cache(maxsize=1)
def workspace() -> Path:
    """A folder that goes away with the process."""
    folder = Path(tempfile.mkdtemp(prefix="khet-training-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache(maxsize=1)
def dataset() -> Path:
    """240 generated leaves in eight classes: 168 to train, 36 to validate, 36 to test or about so."""
    source, root = workspace() / "photos", workspace() / "datasets" / "tiny"
    generate(source, 240, px=64)
    import_folder(source, root, name="tiny", settings=DataSettings())
    return root


def config(**changes: object) -> TrainingConfig:
    """A training of a second or two, without a tracker."""
    values: dict[str, object] = yaml.safe_load((CONFIGS / "smoke.yaml").read_text(encoding="utf-8"))
    values |= {"tracking": False, "accelerator": "cpu", "threads": 1}
    return validate(TrainingConfig, values | changes, source="test")


@functools.lru_cache(maxsize=1)
def trained() -> Path:
    """best.ckpt of a short run: better than chance, far from good."""
    from ml.train import train

    out = workspace() / "outputs"
    train(config(budget={"epochs": 6}), dataset(), out)
    return out / "best.ckpt"


@functools.lru_cache(maxsize=1)
def exported() -> Path:
    """The exported folder of `trained`."""
    from ml.export import export

    out = workspace() / "exported"
    export(trained(), out)
    return out
