"""The registry against a real S3 server (SeaweedFS)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, IntegrityError, SafetyError
from ml.bundle import VersionMissing, verify_bundle
from ml.objects import ObjectStore
from ml.signing import generate_keypair
from ml.version import Version
from tasks.registry import Registry
from tests.support.records import a_lineage
from tests.support.registry import Shelf
from tests.support.s3 import unique
from tests.support.stack import object_store

V1, V1_1, V1_2 = Version(1, 0, 0), Version(1, 1, 0), Version(1, 2, 0)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="module")
def store(settings: ObjectStoreSettings) -> ObjectStore:
    return ObjectStore(settings)


@pytest.fixture
def shelf(store: ObjectStore, tmp_path: Path) -> Shelf:
    return Shelf.make(store, unique("models"), tmp_path)


# Numbers --------------------------------------------------------------------------------------------------------------


def test_versions_count_up_from_one(shelf: Shelf) -> None:
    assert shelf.registry.reserve(owner="a") == V1
    assert shelf.registry.reserve(owner="b") == V1_1
    assert shelf.registry.reserve("patch", owner="c") == Version(1, 1, 1)
    assert shelf.registry.reserve("major", owner="d") == Version(2, 0, 0)


def test_the_same_owner_gets_the_same_version_again(shelf: Shelf) -> None:
    first = shelf.registry.reserve(owner="release-1")
    shelf.registry.reserve(owner="release-2")
    assert shelf.registry.reserve(owner="release-1") == first
    shelf.publish("release-1")
    assert shelf.registry.reserve(owner="release-1") == first


def test_an_owner_killed_before_its_claim_was_written_is_recognised(shelf: Shelf) -> None:
    version = shelf.registry.reserve(owner="release-1")
    shelf.store.delete(shelf.bucket, [info.key for info in shelf.store.list(shelf.bucket, "reservations/")])
    assert shelf.registry.reserve(owner="release-1") == version


def test_no_two_of_many_get_the_same_version(shelf: Shelf) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda n: shelf.registry.reserve(owner=f"release-{n}"), range(8)))
    assert sorted(versions) == [Version(1, minor, 0) for minor in range(8)]


def test_a_discarded_number_is_not_used_again(shelf: Shelf) -> None:
    version = shelf.registry.reserve(owner="release-1")
    shelf.store.put(shelf.bucket, f"{version}/model.onnx", b"half")
    assert [r.version for r in shelf.registry.abandoned()] == [version]
    shelf.registry.discard(version)
    shelf.registry.discard(version)
    assert shelf.registry.abandoned() == []
    assert not shelf.store.exists(shelf.bucket, f"{version}/model.onnx")
    with pytest.raises(SafetyError, match=r"v1\.0\.0 was discarded"):
        shelf.publish("release-1", version)
    assert shelf.registry.reserve(owner="release-1") == V1_1
    with pytest.raises(VersionMissing, match="never reserved"):
        shelf.registry.discard(Version(9, 9, 9))


# Publishing -----------------------------------------------------------------------------------------------------------


def test_a_published_version_is_complete_signed_and_listed(shelf: Shelf) -> None:
    progress: list[tuple[int, int]] = []
    manifest = shelf.publish("release-1", on_progress=lambda done, total: progress.append((done, total)))
    assert manifest.version == V1
    assert set(manifest.files) == {"model.onnx", "metadata.json", "model_card.md", "mistakes/00.png"}
    assert shelf.registry.manifest(V1) == manifest
    assert progress[-1][0] == progress[-1][1] == sum(entry.size_bytes for entry in manifest.files.values())
    (info,) = shelf.registry.versions()
    assert (info.version, info.files) == (V1, 6)
    assert abs((datetime.now(UTC) - info.published_at).total_seconds()) < 600
    report = shelf.registry.verify(V1)
    assert report.ok
    assert report.signed_by == shelf.fingerprint
    assert report.unlisted == ()


def test_the_manifest_tells_where_the_version_comes_from(shelf: Shelf) -> None:
    shelf.publish("release-1")
    stored = json.loads(shelf.store.get(shelf.bucket, "v1.0.0/manifest.json"))
    assert stored["format"] == "khet-model/1"
    assert stored["version"] == "v1.0.0"
    assert stored["lineage"]["parent"] == "v1.2.0"
    assert stored["metrics"] == {"accuracy": 0.94}
    assert datetime.fromisoformat(stored["created_at"]).tzinfo is not None


def test_the_manifest_is_written_last(shelf: Shelf) -> None:
    shelf.publish("release-1")
    times = {info.key: info.modified_at for info in shelf.store.list(shelf.bucket, "v1.0.0/")}
    assert max(times, key=lambda key: (times[key], key == "v1.0.0/manifest.json")) == "v1.0.0/manifest.json"


def test_publishing_the_same_again_changes_nothing(shelf: Shelf) -> None:
    first = shelf.publish("release-1")
    before = list(shelf.store.list(shelf.bucket, "v1.0.0/"))
    assert shelf.publish("release-1", V1) == first
    assert list(shelf.store.list(shelf.bucket, "v1.0.0/")) == before


def test_a_published_version_never_changes(shelf: Shelf) -> None:
    shelf.publish("release-1")
    shelf.folder.joinpath("model.onnx").write_bytes(b"other weights")
    with pytest.raises(IntegrityError, match=r"v1\.0\.0 is published already, with other content \(model\.onnx\)"):
        shelf.publish("release-1", V1)
    assert shelf.registry.verify(V1).ok
    with pytest.raises(SafetyError, match="is published"):
        shelf.registry.discard(V1)


def test_a_number_that_belongs_to_another_release_is_refused(shelf: Shelf) -> None:
    version = shelf.registry.reserve(owner="release-1")
    with pytest.raises(SafetyError, match=r"reserved by release-1 since .* UTC, not by release-2"):
        shelf.publish("release-2", version)


def test_leftovers_of_an_earlier_attempt_are_replaced(shelf: Shelf) -> None:
    version = shelf.registry.reserve(owner="release-1")
    shelf.store.put(shelf.bucket, f"{version}/old.bin", b"stray")
    shelf.store.put(shelf.bucket, f"{version}/model.onnx", b"earlier weights")
    shelf.store.put(shelf.bucket, f"{version}/manifest.json.sig", b"x" * 64)
    shelf.publish("release-1", version)
    report = shelf.registry.verify(version)
    assert report.ok
    assert report.unlisted == ()


def test_an_incomplete_version_does_not_exist_for_readers(shelf: Shelf, tmp_path: Path) -> None:
    version = shelf.registry.reserve(owner="release-1")
    shelf.store.put(shelf.bucket, f"{version}/model.onnx", b"half")
    assert shelf.registry.versions() == []
    for read in (
        lambda: shelf.registry.manifest(version),
        lambda: shelf.registry.verify(version),
        lambda: shelf.registry.fetch(version, tmp_path / "got"),
        lambda: shelf.registry.move_alias("candidate", version, by="me", reason="try"),
    ):
        with pytest.raises(VersionMissing, match=r"v1\.0\.0 is not published"):
            read()


def test_publishing_needs_a_key_and_a_model(shelf: Shelf, tmp_path: Path) -> None:
    keyless = Registry(shelf.store, shelf.bucket)
    arguments = {"lineage": a_lineage(), "metrics": {}, "created_by": "me"}
    with pytest.raises(ConfigError, match="signing_key is not set"):
        keyless.publish(V1, shelf.folder, **arguments)  # type: ignore[arg-type]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"holds no model\.onnx"):
        shelf.registry.publish(V1, empty, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a folder"):
        shelf.registry.publish(V1, tmp_path / "none", **arguments)  # type: ignore[arg-type]
    generate_keypair(tmp_path / "other.key", tmp_path / "other.pub")
    stranger = Registry(shelf.store, shelf.bucket, signing_key=tmp_path / "other.key", trusted_keys=shelf.trusted)
    with pytest.raises(ConfigError, match=r"is none of registry\.trusted_keys"):
        stranger.publish(V1, shelf.folder, **arguments)  # type: ignore[arg-type]
    assert list(shelf.store.list(shelf.bucket, "")) == []


# Fetching and tampering -----------------------------------------------------------------------------------------------


def test_a_fetched_version_is_what_was_published(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    found = shelf.registry.fetch(V1, tmp_path / "got")
    assert found.version == V1
    assert found.signed_by == shelf.fingerprint
    for name in found.manifest.files:
        assert found.path(name).read_bytes() == (shelf.folder / name).read_bytes()
    assert verify_bundle(tmp_path / "got", V1, shelf.trusted).manifest == found.manifest


def test_a_replica_fetches_only_what_it_serves(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    shelf.registry.fetch(V1, tmp_path / "got", only=("model.onnx", "metadata.json"))
    names = sorted(path.name for path in (tmp_path / "got").iterdir())
    assert names == ["manifest.json", "manifest.json.sig", "metadata.json", "model.onnx"]
    with pytest.raises(IntegrityError, match=r"v1\.0\.0 has no weights\.bin"):
        shelf.registry.fetch(V1, tmp_path / "got", only=("weights.bin",))


def test_a_verified_local_copy_needs_no_store(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    shelf.registry.fetch(V1, tmp_path / "got", only=("model.onnx",))
    shelf.store.delete(shelf.bucket, [info.key for info in shelf.store.list(shelf.bucket, "v1.0.0/")])
    assert shelf.registry.fetch(V1, tmp_path / "got", only=("model.onnx",)).version == V1


def test_a_damaged_local_copy_is_fetched_again(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    got = shelf.registry.fetch(V1, tmp_path / "got")
    for damage in (b"", b"other bytes", None):
        if damage is None:
            got.path("model.onnx").unlink()
        else:
            got.path("model.onnx").write_bytes(damage)
        shelf.registry.fetch(V1, tmp_path / "got")
        assert got.path("model.onnx").read_bytes() == (shelf.folder / "model.onnx").read_bytes()


def test_two_processes_may_fetch_into_one_folder(shelf: Shelf, tmp_path: Path) -> None:
    shelf.folder.joinpath("model.onnx").write_bytes(b"w" * 3_000_000)
    shelf.publish("release-1")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: shelf.registry.fetch(V1, tmp_path / "got"), range(6)))
    assert len({bundle.manifest.created_at for bundle in found}) == 1
    verify_bundle(tmp_path / "got", V1, shelf.trusted)
    assert not list((tmp_path / "got").rglob(".*"))


def test_what_killed_downloads_left_is_swept(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    old, young = tmp_path / "got" / ".model.onnx.aa.fetched", tmp_path / "got" / ".model.onnx.bb.fetched"
    deep = tmp_path / "got" / "mistakes" / "..00.png.cc.fetched.dd.partial"
    deep.parent.mkdir(parents=True)
    for path in (old, young, deep):
        path.write_bytes(b"half")
    for path in (old, deep):
        os.utime(path, (0, 0))
    shelf.registry.fetch(V1, tmp_path / "got")
    assert [path.exists() for path in (old, young, deep)] == [False, True, False]


_UNSIGNED = r"manifest\.json of v1\.0\.0: the signature was made by none"
TAMPERINGS = {
    "model replaced": ("model.onnx", b"0" * 64, r"model\.onnx of v1\.0\.0 does not match its manifest \(sha256 "),
    "model cut": ("model.onnx", b"w", r"model\.onnx of v1\.0\.0 does not match its manifest \(1 bytes, expected 64\)"),
    "model gone": ("model.onnx", None, r"model\.onnx of v1\.0\.0 is missing from the store"),
    "signature replaced": (
        "manifest.json.sig",
        b"0" * 64,
        r"manifest\.json of v1\.0\.0: the signature was made by none",
    ),
    "signature cut": ("manifest.json.sig", b"0", _UNSIGNED),
    "signature gone": ("manifest.json.sig", None, r"manifest\.json of v1\.0\.0 has no signature"),
    "manifest replaced": ("manifest.json", b"{}", _UNSIGNED),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_a_tampered_version_is_refused(shelf: Shelf, tmp_path: Path, case: str) -> None:
    name, content, message = TAMPERINGS[case]
    shelf.publish("release-1")
    shelf.tamper(f"v1.0.0/{name}", content)
    with pytest.raises(IntegrityError, match=message) as caught:
        shelf.registry.fetch(V1, tmp_path / "got")
    assert "Nothing was loaded or deployed" in str(caught.value)
    assert "khet verify v1.0.0" in str(caught.value)
    assert not (tmp_path / "got" / "model.onnx").exists()
    report = shelf.registry.verify(V1)
    assert not report.ok
    assert name.removesuffix(".sig") in report.problems[0]
    with pytest.raises(IntegrityError, match=r"candidate still points at nothing"):
        shelf.registry.move_alias("candidate", V1, by="me", reason="try")
    assert shelf.registry.alias("candidate") is None


def test_the_manifest_of_another_version_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    shelf.publish("release-2")
    for info in list(shelf.store.list(shelf.bucket, "v1.0.0/")):
        name = info.key.partition("/")[2]
        shelf.tamper(f"v1.1.0/{name}", shelf.store.get(shelf.bucket, info.key))
    with pytest.raises(IntegrityError, match=r"stored under v1\.1\.0 belongs to v1\.0\.0"):
        shelf.registry.fetch(V1_1, tmp_path / "got")


def test_only_trusted_keys_count(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish("release-1")
    generate_keypair(tmp_path / "other.key", tmp_path / "other.pub")
    stranger = Registry(shelf.store, shelf.bucket, trusted_keys=[tmp_path / "other.pub"])
    with pytest.raises(IntegrityError, match="none of the trusted keys"):
        stranger.fetch(V1, tmp_path / "got")
    both = Registry(shelf.store, shelf.bucket, trusted_keys=[tmp_path / "other.pub", *shelf.trusted])
    assert both.fetch(V1, tmp_path / "got").signed_by == shelf.fingerprint
    with pytest.raises(ConfigError, match="trusted_keys is empty"):
        Registry(shelf.store, shelf.bucket).manifest(V1)
    with pytest.raises(ConfigError, match=r"gone\.pub cannot be read"):
        Registry(shelf.store, shelf.bucket, trusted_keys=[tmp_path / "gone.pub"]).manifest(V1)


def test_openssl_alone_can_check_the_signature(shelf: Shelf, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    shelf.publish("release-1")
    shelf.registry.fetch(V1, tmp_path / "got")
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(shelf.trusted[0]), "-rawin"]
    command += ["-in", "manifest.json", "-sigfile", "manifest.json.sig"]
    done = subprocess.run(command, cwd=tmp_path / "got", capture_output=True, text=True, check=False)
    assert "Verified Successfully" in done.stdout, done.stderr


def test_aws_s3_ls_shows_versions_as_folders(shelf: Shelf, settings: ObjectStoreSettings) -> None:
    shelf.publish("release-1")
    shelf.registry.move_alias("production", V1, by="me", reason="first")
    assert settings.secret_access_key is not None
    environment = {
        "AWS_ACCESS_KEY_ID": settings.access_key_id or "",
        "AWS_SECRET_ACCESS_KEY": settings.secret_access_key.get_secret_value(),
        "AWS_DEFAULT_REGION": settings.region,
    }
    aws = [str(Path(sys.executable).with_name("aws")), "--endpoint-url", str(settings.endpoint_url), "s3", "ls"]
    top = subprocess.run([*aws, f"s3://{shelf.bucket}/"], env=environment, capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in top.stdout.splitlines()] == ["aliases/", "reservations/", "v1.0.0/"]
    version = [*aws, f"s3://{shelf.bucket}/v1.0.0/"]
    inside = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert "model.onnx" in inside


# Aliases --------------------------------------------------------------------------------------------------------------


def test_moving_production_keeps_the_old_one_as_previous(shelf: Shelf) -> None:
    for n in (1, 2, 3):
        shelf.publish(f"release-{n}")
    registry = shelf.registry
    assert registry.alias("production") is None
    registry.move_alias("production", V1, by="asha", reason="first release")
    assert registry.alias("previous") is None
    state = registry.move_alias("production", V1_1, by="asha", reason="better")
    assert (state.version, state.moved_from, state.by, state.reason) == (V1_1, V1, "asha", "better")
    registry.move_alias("production", V1_2, by="ravi", reason="better still")
    found = {name: str(state.version) for name, state in registry.aliases().items()}
    assert found == {"production": "v1.2.0", "previous": "v1.1.0"}
    assert [str(move.to) for move in registry.alias_history("production")] == ["v1.0.0", "v1.1.0", "v1.2.0"]
    assert [move.seq for move in registry.alias_history("production")] == [1, 2, 3]
    stored = json.loads(shelf.store.get(shelf.bucket, "aliases/production.json"))
    assert stored["to"] == "v1.2.0"


def test_moving_an_alias_again_to_where_it_is_adds_nothing(shelf: Shelf) -> None:
    shelf.publish("release-1")
    shelf.publish("release-2")
    registry = shelf.registry
    registry.move_alias("production", V1, by="me", reason="a")
    registry.move_alias("production", V1_1, by="me", reason="b")
    again = registry.move_alias("production", V1_1, by="someone", reason="c")
    assert (again.by, again.reason, again.seq) == ("me", "b", 2)
    previous = registry.alias("previous")
    assert previous is not None
    assert previous.version == V1


def test_a_move_killed_before_its_pointer_was_rewritten_counts(shelf: Shelf) -> None:
    shelf.publish("release-1")
    shelf.publish("release-2")
    registry = shelf.registry
    registry.move_alias("production", V1, by="me", reason="a")
    stale = shelf.store.get(shelf.bucket, "aliases/production.json")
    registry.move_alias("production", V1_1, by="me", reason="b")
    shelf.tamper("aliases/production.json", stale)
    state = registry.alias("production")
    assert state is not None
    assert state.version == V1_1
    registry.move_alias("production", V1_1, by="me", reason="b")
    assert json.loads(shelf.store.get(shelf.bucket, "aliases/production.json"))["to"] == "v1.1.0"


def test_a_cleared_alias_points_nowhere_and_keeps_its_history(shelf: Shelf) -> None:
    shelf.publish("release-1")
    registry = shelf.registry
    registry.move_alias("candidate", V1, by="me", reason="try")
    registry.clear_alias("candidate", by="me", reason="refused")
    registry.clear_alias("candidate", by="me", reason="refused")
    assert registry.alias("candidate") is None
    assert [move.to for move in registry.alias_history("candidate")] == [V1, None]
    with pytest.raises(SafetyError, match="never cleared"):
        registry.clear_alias("production", by="me", reason="oops")


def test_racing_movers_leave_one_unbroken_history(shelf: Shelf) -> None:
    for n in range(4):
        shelf.publish(f"release-{n}")
    targets = [Version(1, minor, 0) for minor in range(4)]

    def move(target: Version) -> None:
        try:
            shelf.registry.move_alias("candidate", target, by="me", reason="race")
        except SafetyError as error:
            assert "moved by someone else" in str(error)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move, targets))
    history = shelf.registry.alias_history("candidate")
    assert [entry.seq for entry in history] == [1, 2, 3, 4]
    assert [entry.moved_from for entry in history] == [None, *(entry.to for entry in history[:-1])]
    state = shelf.registry.alias("candidate")
    assert state is not None
    assert state.version == history[-1].to


def test_a_garbled_alias_is_reported_and_nothing_else(shelf: Shelf) -> None:
    shelf.tamper("aliases/production.json", b"{not json")
    with pytest.raises(IntegrityError, match=r"aliases/production\.json is not an alias"):
        shelf.registry.alias("production")
