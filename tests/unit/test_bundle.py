"""Manifests and local bundles: what is accepted, and what is refused before anything is loaded."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.errors import ConfigError, IntegrityError
from ml.bundle import MANIFEST, SIGNATURE, FileEntry, Manifest, check_name, read_manifest, verify_bundle
from ml.objects import file_sha256
from ml.signing import Signer, generate_keypair
from ml.version import Version
from tests.support.records import HASH, a_lineage

V = Version(1, 3, 0)
ENTRY = FileEntry(sha256=HASH, size_bytes=3)


def a_manifest(**changes: object) -> Manifest:
    values = {
        "version": V,
        "created_at": datetime(2026, 5, 4, tzinfo=UTC),
        "created_by": "asha@laptop",
        "files": {"model.onnx": ENTRY},
        "lineage": a_lineage(),
        "metrics": {"accuracy": 0.94},
    }
    return Manifest.model_validate(values | changes)


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, list[Path], Signer]:
    """A signed folder, the trusted keys, and the signer."""
    generate_keypair(tmp_path / "k", tmp_path / "k.pub")
    folder, signer = tmp_path / "v1.3.0", Signer(tmp_path / "k")
    (folder / "mistakes").mkdir(parents=True)
    files = {}
    for name, content in {"model.onnx": b"weights", "mistakes/00.png": b"png"}.items():
        (folder / name).write_bytes(content)
        files[name] = FileEntry(sha256=file_sha256(folder / name), size_bytes=len(content))
    data = a_manifest(files=files).model_dump_json().encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / SIGNATURE).write_bytes(signer.sign(data))
    return folder, [tmp_path / "k.pub"], signer


def test_a_manifest_reads_back_as_it_was_written() -> None:
    manifest = a_manifest()
    again = Manifest.model_validate_json(manifest.model_dump_json())
    assert again == manifest
    assert again.version == V
    assert again.lineage.parent == Version(1, 2, 0)
    assert '"version":"v1.3.0"' in manifest.model_dump_json()


def test_equal_manifests_have_equal_bytes() -> None:
    one = a_manifest(files={"b": ENTRY, "a": ENTRY})
    other = a_manifest(files={"a": ENTRY, "b": ENTRY})
    assert one.model_dump_json() == other.model_dump_json()


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1.3.0"},
        {"version": "v1.3"},
        {"version": 7},
        {"created_at": datetime(2026, 5, 4)},
        {"format": "khet-model/2"},
        {"files": {"model.onnx": {"sha256": "9F" * 32, "size_bytes": 3}}},
        {"files": {"model.onnx": {"sha256": HASH, "size_bytes": -1}}},
        {"surprise": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_manifest_that_is_not_one_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        a_manifest(**change)


def test_other_timezones_mean_the_same_moment() -> None:
    india = timezone(timedelta(hours=5, minutes=30))
    manifest = a_manifest(created_at=datetime(2026, 5, 4, 5, 30, tzinfo=india))
    assert Manifest.model_validate_json(manifest.model_dump_json()).created_at == datetime(2026, 5, 4, tzinfo=UTC)


@pytest.mark.parametrize(
    "name",
    ["", ".", "/etc/passwd", "../up", "a/../../b", "a//b", "./a", ".hidden", "a/.reserved", "a\\b", "a\nb", "a/",
     MANIFEST, SIGNATURE],
)  # fmt: skip
def test_a_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"plain relative path|may not list itself"):
        check_name(name)
    with pytest.raises(ValidationError):
        a_manifest(files={name: ENTRY})


@settings(deadline=None)
@given(st.text(max_size=40))
def test_an_accepted_name_stays_inside(name: str) -> None:
    try:
        check_name(name)
    except ValueError:
        return
    root = "/srv/models/v1.0.0"
    assert os.path.normpath(f"{root}/{name}").startswith(f"{root}/")


def test_an_untouched_copy_verifies(bundle: tuple[Path, list[Path], Signer]) -> None:
    folder, keys, signer = bundle
    found = verify_bundle(folder, V, keys)
    assert (found.version, found.signed_by) == (V, signer.fingerprint)
    assert found.path("model.onnx").read_bytes() == b"weights"


def test_only_the_files_asked_for_are_checked(bundle: tuple[Path, list[Path], Signer]) -> None:
    folder, keys, _ = bundle
    (folder / "mistakes" / "00.png").unlink()
    verify_bundle(folder, V, keys, only=["model.onnx"])
    with pytest.raises(IntegrityError, match=r"mistakes/00\.png of v1\.3\.0 cannot be read"):
        verify_bundle(folder, V, keys)


def test_a_changed_file_is_named_with_both_hashes(bundle: tuple[Path, list[Path], Signer]) -> None:
    folder, keys, _ = bundle
    (folder / "model.onnx").write_bytes(b"weightz")
    with pytest.raises(IntegrityError) as caught:
        verify_bundle(folder, V, keys)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("model.onnx of v1.3.0 does not match its manifest (sha256 ")
    assert "… expected " in lines[0]
    assert lines[1].startswith("Nothing was loaded or deployed")
    assert lines[2].startswith("Next: `khet verify v1.3.0`")


def test_every_single_changed_byte_of_manifest_or_signature_is_noticed(
    bundle: tuple[Path, list[Path], Signer],
) -> None:
    folder, keys, _ = bundle
    data, signature = (folder / MANIFEST).read_bytes(), (folder / SIGNATURE).read_bytes()
    for at in range(0, len(data), 37):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(IntegrityError):
            read_manifest(changed, signature, V, keys)
    for at in range(len(signature)):
        changed = signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :]
        with pytest.raises(IntegrityError):
            read_manifest(data, changed, V, keys)


def test_a_signed_file_that_is_no_manifest_is_refused(bundle: tuple[Path, list[Path], Signer]) -> None:
    _, keys, signer = bundle
    with pytest.raises(IntegrityError, match="is not a manifest"):
        read_manifest(b"{}", signer.sign(b"{}"), V, keys)


def test_a_manifest_of_another_version_is_refused(bundle: tuple[Path, list[Path], Signer]) -> None:
    folder, keys, _ = bundle
    with pytest.raises(IntegrityError, match=r"stored under v1\.4\.0 belongs to v1\.3\.0"):
        verify_bundle(folder, Version(1, 4, 0), keys)


def test_a_folder_without_a_manifest_is_refused(bundle: tuple[Path, list[Path], Signer], tmp_path: Path) -> None:
    _, keys, _ = bundle
    with pytest.raises(IntegrityError, match="holds no signed manifest"):
        verify_bundle(tmp_path / "none", V, keys)
    with pytest.raises(ConfigError, match="trusted_keys is empty"):
        verify_bundle(bundle[0], V, [])
