"""What all settings share: frozen models that refuse unknown keys, and YAML that names its file in every error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import ConfigError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Area(BaseModel):
    """One area of settings. Frozen; an unknown key is an error; defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="constants")


AreaT = TypeVar("AreaT", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in `path`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file. Nothing was started.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}. Nothing was started.") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds a {type(loaded).__name__}, expected a mapping of keys to values.")
    return loaded


def load_yaml(model: type[AreaT], path: Path, **overrides: Any) -> AreaT:
    """Read `path` and validate it as `model`; `overrides` replace top-level keys.

    Raises:
        ConfigError: naming the file and every offending key.
    """
    return validate(model, read_yaml(path) | overrides, source=str(path))


def validate(model: type[AreaT], values: dict[str, Any], *, source: str) -> AreaT:
    """Validate `values` as `model`, turning pydantic's report into one that names `source` and the keys."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, source)) from None


def explain(error: ValidationError, source: str) -> str:
    """One line a problem, `source: key: what is wrong`. Input values are left out: they may be secrets."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        message = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{source}: {key}: {message}")
    return "\n".join(lines)
