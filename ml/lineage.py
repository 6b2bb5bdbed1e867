"""Where a model comes from: the code, the configuration, the data, the packages and the machine that made it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from configs.settings import PROJECT_ROOT
from ml import hardware
from ml.bundle import Lineage
from ml.objects import file_sha256
from ml.version import Version

LOCK = "requirements.lock"
# Written into images (deployments/images), where there is no git: `git describe --always --abbrev=40 --dirty`.
REVISION = "REVISION"
# Those that can change what a model answers, and the project itself.
_PACKAGES = (
    "khet-guard-pipelines",
    "torch",
    "pytorch-lightning",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "prefect",
)
_GIT_TIMEOUT_S = 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


def collect_lineage(
    *,
    config: Mapping[str, Any],
    seed: int,
    dataset: str,
    dataset_hash: str,
    trained_on: Mapping[str, str] | None = None,
    parent: Version | None = None,
    release_id: str | None = None,
    root: Path = PROJECT_ROOT,
) -> Lineage:
    """Gather the lineage of a model made by the code in `root`.

    `config` must be plain JSON values. `trained_on` is `TrainResult.hardware`; None: this machine is described.
    """
    commit, dirty = code_state(root)
    lock = root / LOCK
    return Lineage(
        git_commit=commit,
        git_dirty=dirty,
        config=dict(config),
        seed=seed,
        lock_sha256=file_sha256(lock) if lock.is_file() else None,
        hardware=dict(trained_on) if trained_on is not None else machine(),
        dataset=dataset,
        dataset_hash=dataset_hash,
        parent=parent,
        release_id=release_id,
        packages=packages(),
    )


def code_state(root: Path) -> tuple[str | None, bool | None]:
    """The commit of the code in `root`, and whether files differ from it. An image says so in a file. (None, None)
    where it cannot be known: no git, or a repository that is not this project's (an installed copy inside another)."""
    if (root / REVISION).is_file():
        return _recorded((root / REVISION).read_text(encoding="utf-8").strip())
    if _git(root, "ls-files", "--error-unmatch", "pyproject.toml") is None:
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    return commit, None if changes is None else bool(changes)


def _recorded(revision: str) -> tuple[str | None, bool | None]:
    commit = revision.removesuffix("-dirty")
    if _COMMIT.fullmatch(commit) is None:  # built without --build-arg REVISION
        return None, None
    return commit, commit != revision


def packages() -> dict[str, str]:
    """Installed versions of what can change a model's answers; a package that is not installed is left out."""
    import platform

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, cores, memory and GPU of this machine, without importing torch."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {"cpu": hardware.cpu_name(), "cores": str(hardware.cores()), "memory_gib": f"{pages / 2**30:.1f}"}
    if gpus := _gpus():
        facts["accelerator"] = gpus[0]
        facts["accelerators"] = str(len(gpus))
    return facts


def _gpus(proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Names of the NVIDIA GPUs, as their driver lists them."""
    names = []
    for info in sorted(proc.glob("*/information")):
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None when it is missing, slow or unwilling. It takes no lock: others may be committing."""
    command = ["git", "-C", str(root), *arguments]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("the state of the code is not known: %s", error)
        return None
    return done.stdout.strip()
