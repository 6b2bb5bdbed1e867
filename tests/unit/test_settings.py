"""Settings: layers, unknown keys, secrets. Every shipped YAML is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.settings import PROFILES, load_settings


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KHET_HOME", str(tmp_path))
    monkeypatch.delenv("KHET_PROFILE", raising=False)
    return tmp_path


@pytest.mark.parametrize("profile", sorted(p.stem for p in PROFILES.glob("*.yaml")))
def test_every_profile_loads(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHET_PROFILE", profile)
    assert load_settings().canary.steps[-1] <= 1


def test_the_local_file_overrides_the_profile_and_the_environment_overrides_both(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_home / "settings.yaml").write_text("canary: {lease_s: 11, deadline_s: 77}\n")
    assert load_settings().canary.lease_s == 11
    monkeypatch.setenv("KHET_CANARY__LEASE_S", "12")
    assert load_settings().canary.lease_s == 12
    assert load_settings().canary.deadline_s == 77


def test_an_unknown_key_names_the_file_and_the_key(own_home: Path) -> None:
    (own_home / "settings.yaml").write_text("canary: {leese_s: 11}\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml: canary: leese_s: unknown key"):
        load_settings()


def test_an_unknown_area_names_the_file(own_home: Path) -> None:
    (own_home / "settings.yaml").write_text("canery: {}\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml: canery: unknown key"):
        load_settings()


def test_a_misspelt_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHET_CANRY__LEASE_S", "12")
    with pytest.raises(ConfigError, match="KHET_CANRY__LEASE_S: unknown key"):
        load_settings()


def test_a_bad_value_names_the_key_and_hides_the_value(own_home: Path) -> None:
    (own_home / "settings.yaml").write_text("database: {dsn: [secret-thing]}\n")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "database: dsn" in str(caught.value)
    assert "secret-thing" not in str(caught.value)


def test_secrets_do_not_show(own_home: Path) -> None:
    (own_home / "settings.yaml").write_text("object_store: {access_key_id: a, secret_access_key: hidden-value}\n")
    settings = load_settings()
    assert "hidden-value" not in repr(settings)
    assert "hidden-value" not in settings.model_dump_json()
    assert settings.object_store.secret_access_key is not None
    assert settings.object_store.secret_access_key.get_secret_value() == "hidden-value"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings().canary.lease_s = 3  # type: ignore[misc]


def test_an_unknown_profile_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHET_PROFILE", "staging-2")
    with pytest.raises(ConfigError, match="local, production"):
        load_settings()


@pytest.mark.parametrize("content", ["- a\n- b\n", "canary: [", "\xff\xfe"], ids=["a list", "cut yaml", "not utf-8"])
def test_a_broken_file_is_named(own_home: Path, content: str) -> None:
    (own_home / "settings.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        load_settings()


def test_canary_steps_must_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KHET_CANARY__STEPS", "[0.5, 0.1]")
    with pytest.raises(ConfigError, match="ascending"):
        load_settings()
