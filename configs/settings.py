"""The settings of one process: profile YAML, then the local stack's file, then the environment.

Precedence, strongest first: `KHET_<AREA>__<FIELD>` variables, `<home>/settings.yaml` (written by `khet up`, mode 0600),
`configs/profiles/<profile>.yaml`, the defaults in `configs.areas`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from configs import areas
from configs.base import explain, read_yaml
from configs.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PROFILES = Path(__file__).resolve().parent / "profiles"
ENV_PREFIX = "KHET_"


def home() -> Path:
    """The one folder everything local lives in: `KHET_HOME`, else `.khet` in the project (or the current folder)."""
    if named := os.environ.get("KHET_HOME"):
        return Path(named).resolve()
    base = PROJECT_ROOT if (PROJECT_ROOT / "pyproject.toml").exists() else Path.cwd()
    return base / ".khet"


def profile_name() -> str:
    """The active profile: `KHET_PROFILE`, else `local`."""
    return os.environ.get("KHET_PROFILE", "local")


class Settings(BaseSettings):
    """All areas. Build it with `settings()`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=True
    )

    object_store: areas.ObjectStoreSettings = Field(default=areas.ObjectStoreSettings())
    database: areas.DatabaseSettings = Field(default=areas.DatabaseSettings())
    orchestrator: areas.OrchestratorSettings = Field(default=areas.OrchestratorSettings())
    serving: areas.ServingSettings = Field(default=areas.ServingSettings())
    registry: areas.RegistrySettings = Field(default=areas.RegistrySettings())
    cluster: areas.ClusterSettings = Field(default=areas.ClusterSettings())
    canary: areas.CanarySettings = Field(default=areas.CanarySettings())
    judge: areas.JudgeSettings = Field(default=areas.JudgeSettings())
    harms: areas.HarmSettings = Field(default=areas.HarmSettings())
    gate: areas.GateSettings = Field(default=areas.GateSettings())
    review: areas.ReviewSettings = Field(default=areas.ReviewSettings())
    replay: areas.ReplaySettings = Field(default=areas.ReplaySettings())
    data: areas.DataSettings = Field(default=areas.DataSettings())
    training: areas.TrainingSettings = Field(default=areas.TrainingSettings())
    tracking: areas.TrackingSettings = Field(default=areas.TrackingSettings())
    stack: areas.StackSettings = Field(default=areas.StackSettings())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  (the signature is pydantic's)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            env_settings,
            _file_source(settings_cls, local_file()),
            _file_source(settings_cls, profile_file()),
        )


def local_file() -> Path:
    """Where the local stack writes the addresses and credentials it chose."""
    return home() / "settings.yaml"


def profile_file() -> Path:
    """The YAML of the active profile.

    Raises:
        ConfigError: no such profile.
    """
    path = PROFILES / f"{profile_name()}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ConfigError(f"KHET_PROFILE={profile_name()}: no such profile (known: {known}). Nothing was started.")
    return path


class _FileSource(PydanticBaseSettingsSource):
    """One YAML file as a source. Its keys are checked on their own, so that an error names this file."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path) -> None:
        super().__init__(settings_cls)
        self._path = path

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        values = read_yaml(self._path) if self._path.exists() else {}
        check_areas(values, str(self._path), self.settings_cls)
        return values


def _file_source(settings_cls: type[BaseSettings], path: Path) -> _FileSource:
    return _FileSource(settings_cls, path)


def check_areas(values: Mapping[str, Any], source: str, settings_cls: type[BaseSettings] = Settings) -> None:
    """Hold the areas of a settings file, read from `source`, against what is known.

    Raises:
        ConfigError: naming the source and the key.
    """
    for name, part in values.items():
        _check_area(settings_cls, name, part, source)


def _check_area(settings_cls: type[BaseSettings], name: str, part: Any, source: str) -> None:
    field = settings_cls.model_fields.get(name)
    if field is None or field.annotation is None:
        raise ConfigError(f"{source}: {name}: unknown key")
    try:
        field.annotation.model_validate(part)
    except ValidationError as error:
        raise ConfigError(explain(error, f"{source}: {name}")) from None


def load_settings() -> Settings:
    """Read the settings anew.

    Raises:
        ConfigError: naming the file or environment variable, and the key.
    """
    _refuse_unknown_variables()
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(explain(error, f"environment ({ENV_PREFIX}...)")) from None


@functools.lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()


# Variables with the prefix that are no settings: they say where settings are, or belong to the tests.
_PLAIN_VARIABLES = {"KHET_HOME", "KHET_PROFILE"}


def _refuse_unknown_variables() -> None:
    """A misspelt variable would otherwise be ignored in silence."""
    known = set(Settings.model_fields)
    for name in os.environ:
        if not name.startswith(ENV_PREFIX) or name in _PLAIN_VARIABLES or name.startswith("KHET_TEST_"):
            continue
        area, _, field = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if area not in known or not field:
            raise ConfigError(f"environment: {name}: unknown key (areas: {', '.join(sorted(known))})")
