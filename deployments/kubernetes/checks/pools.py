"""The Jobs that a work pool's template makes of its defaults, so that they can be checked like any other object."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from configs.errors import ConfigError
from deployments.kubernetes.checks.build import ROOT, Object

TEMPLATES: Final = ROOT / "base" / "work-pools"
_PLACEHOLDER: Final = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_GONE: Final = object()
_NOT_OF_A_POD: Final = ("completions", "parallelism")


def job(template: Path) -> Object:
    """The Job of a flow run that sets no variable of its own.

    Raises:
        ConfigError: the template uses a variable that it does not define.
    """
    pool = json.loads(template.read_text(encoding="utf-8"))
    variables = pool["variables"]["properties"]
    made = _filled(pool["job_configuration"]["job_manifest"], variables, template)
    made["metadata"]["generateName"] = "flow-run-"  # the run's name comes first, in a real one
    return known_to_kubernetes(made)


def known_to_kubernetes(made: Object) -> Object:
    """The Job without the fields that prefect-kubernetes 0.8 demands of a pod and that the API drops with a warning."""
    pod = {name: value for name, value in made["spec"]["template"]["spec"].items() if name not in _NOT_OF_A_POD}
    return {**made, "spec": {**made["spec"], "template": {**made["spec"]["template"], "spec": pod}}}


def _filled(part: Any, variables: dict[str, Any], template: Path) -> Any:
    """As Prefect does it: a value that is only a placeholder becomes the variable, and goes where that is null."""
    if isinstance(part, dict):
        filled = {name: _filled(value, variables, template) for name, value in part.items()}
        return {name: value for name, value in filled.items() if value is not _GONE}
    if isinstance(part, list):
        return [value for value in (_filled(one, variables, template) for one in part) if value is not _GONE]
    if isinstance(part, str) and (whole := _PLACEHOLDER.fullmatch(part)):
        return _default(whole[1], variables, template)
    if isinstance(part, str):
        return _PLACEHOLDER.sub(lambda found: str(_default(found[1], variables, template)), part)
    return part


def _default(name: str, variables: dict[str, Any], template: Path) -> Any:
    if name not in variables:
        raise ConfigError(f"{template}: {name} is used and not defined among the variables.")
    value = variables[name].get("default")
    return _GONE if value is None else value
