"""The API's own schemas, of several versions at a time.

`kubernetes-validate` brings the schemas and a validator that takes seconds a call, for it reads all 1.6 MB of
definitions every time. Here one validator a kind and version is kept, made of just the definitions that the kind needs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jsonschema

from configs.errors import ConfigError
from deployments.kubernetes.checks.build import ROOT, Object

VERSIONS: Final = tuple(f"1.{minor}" for minor in range(30, 38))
# Kinds of other projects, whose schemas no package bundles: what is written in schemas/ is held against them.
CUSTOM: Final[Mapping[tuple[str, str], Path]] = {
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): ROOT / "schemas" / "httproute-v1.json",
    ("kubeflow.org/v1", "PyTorchJob"): ROOT / "schemas" / "pytorchjob-v1.json",
}
_PREFIX: Final = "/api/_definitions.json#"
_LOCAL: Final = "#/$defs/"


def problems(found: Object, version: str) -> list[str]:
    """Everything that this version's API would not accept: unknown fields, wrong types, missing ones."""
    api_version, kind = str(found.get("apiVersion")), str(found.get("kind"))
    validator = _validator(api_version, kind, version)
    if validator is None:
        return [f"Kubernetes {version} has no {kind} of {api_version}"]
    return [
        f"Kubernetes {version}: {'.'.join(str(part) for part in error.absolute_path) or 'object'}: {_short(error)}"
        for error in sorted(validator.iter_errors(found), key=lambda e: [str(part) for part in e.absolute_path])
    ]


def _short(error: jsonschema.ValidationError) -> str:
    return error.message if len(error.message) <= 200 else f"{error.message[:200]}..."


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.Draft202012Validator | None:
    definitions = _definitions(version)
    custom = CUSTOM.get((api_version, kind))
    if custom is not None:
        schema = json.loads(custom.read_text(encoding="utf-8"))
    elif (name := _names(version).get((api_version, kind))) is not None:
        schema = {"$ref": f"#/$defs/{name}"}
    else:
        return None
    return jsonschema.Draft202012Validator({**schema, "$defs": _needed(schema, definitions)})


def _needed(schema: Any, definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions that a schema refers to, directly or not."""
    needed: dict[str, Any] = {}
    waiting = list(_references(schema))
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = definitions[name]
            waiting.extend(_references(definitions[name]))
    return needed


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith(_LOCAL):
            yield reference.removeprefix(_LOCAL)
        for part in schema.values():
            yield from _references(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _references(part)


@functools.cache
def _definitions(version: str) -> dict[str, Any]:
    text = (_bundle() / f"v{version}.0-local-strict" / "_definitions.json").read_text(encoding="utf-8")
    return dict(json.loads(text.replace(_PREFIX, "#"))["$defs"])


@functools.cache
def _names(version: str) -> dict[tuple[str, str], str]:
    """Which definition is the one of an apiVersion and kind."""
    names = {}
    for name, definition in _definitions(version).items():
        for served in definition.get("x-kubernetes-group-version-kind", ()):
            group = f"{served['group']}/" if served["group"] else ""
            names[f"{group}{served['version']}", served["kind"]] = name
    return names


def _bundle() -> Path:
    """The schemas inside the package. Its code is not imported: that alone takes a second."""
    found = importlib.util.find_spec("kubernetes_validate")
    if found is None or found.origin is None:
        raise ConfigError("kubernetes-validate is not installed. Nothing was checked. Next: pip install -e '.[dev]'.")
    return Path(found.origin).parent / "kubernetes-json-schema"
