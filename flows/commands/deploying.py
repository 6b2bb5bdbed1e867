"""`khet deploy`: register the flows of deployments/prefect.yaml with the Prefect server."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from configs.base import read_yaml
from configs.errors import ConfigError, ExternalError
from configs.settings import PROJECT_ROOT, settings
from flows.orchestrator import PrefectApi, connect

PREFECT_FILE = PROJECT_ROOT / "deployments" / "prefect.yaml"
_TIMEOUT_S = 300


def deploy() -> list[str]:
    """Register every deployment; returns their names.

    Raises:
        ConfigError: an entrypoint cannot be imported, or there is no such work pool; nothing was registered.
        ExternalError: the server refused.
    """
    connect(settings(), quiet=True)
    pools = settings().orchestrator
    # Read by deployments/prefect.yaml: where runs go, and where only the watchdog guards users from an unjudged canary,
    # that it runs.
    variables = {
        "KHET_WORK_POOL": pools.work_pool,
        "KHET_TRAIN_POOL": pools.train_pool or pools.work_pool,
        "KHET_WATCHDOG_ACTIVE": str(settings().cluster.backend == "kubernetes").lower(),
    }
    names = check_entrypoints(PREFECT_FILE)
    refuse_missing_pools({variables["KHET_WORK_POOL"], variables["KHET_TRAIN_POOL"]})
    # One argument list, no shell. --no-prompt: it must not wait for an answer nobody gives.
    arguments = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(
        arguments,
        cwd=PROJECT_ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ExternalError(f"`prefect deploy` failed:\n{said}\nNext: `khet doctor`.", retryable=False)
    return names


def refuse_missing_pools(wanted: set[str]) -> None:
    """Raise ConfigError when the server lacks a pool: `prefect deploy` would stop there, with some flows registered."""
    found = PrefectApi(settings()).post("/work_pools/filter", {"work_pools": {"name": {"any_": sorted(wanted)}}})
    if missing := sorted(wanted - {pool["name"] for pool in found}):
        raise ConfigError(
            f"The Prefect server has no work pool {' and '.join(missing)}. Nothing was registered.\n"
            "Next: start a worker of the pool, which makes it, or correct orchestrator.work_pool and train_pool."
        )


def check_entrypoints(file: Path) -> list[str]:
    """Import every entrypoint first: `prefect deploy` stops at the first bad one with the earlier ones deployed."""
    names = []
    for deployment in read_yaml(file).get("deployments", []):
        _import_flow(deployment, file)
        names.append(f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}")
    return names


def _import_flow(deployment: dict[str, Any], file: Path) -> None:
    module, _, name = deployment["entrypoint"].rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{file}: {deployment.get('name')}: entrypoint {deployment['entrypoint']} cannot be imported: {error}. "
            "Nothing was registered."
        ) from error
