"""The object store against a real S3 server (SeaweedFS)."""

from __future__ import annotations

import hashlib
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, IntegrityError, is_retryable
from ml.objects import ObjectMissing, ObjectStore
from tests.support.s3 import impatient, unique
from tests.support.stack import object_store

BUCKET = "khet-guard-models"
MIB = 1 << 20


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="module")
def store(settings: ObjectStoreSettings) -> ObjectStore:
    return ObjectStore(settings)


def test_what_is_put_is_got(store: ObjectStore) -> None:
    key = unique("a") + "/b ü.bin"
    assert store.put(BUCKET, key, b"\x00leaf")
    assert store.get(BUCKET, key) == b"\x00leaf"
    assert store.exists(BUCKET, key)
    assert store.put(BUCKET, key, b"")
    assert store.get(BUCKET, key) == b""


def test_a_missing_object_is_named_and_not_worth_a_retry(store: ObjectStore) -> None:
    with pytest.raises(ObjectMissing, match="no-such-key") as caught:
        store.get(BUCKET, "no-such-key")
    assert not is_retryable(caught.value)
    assert not store.exists(BUCKET, "no-such-key")


def test_only_the_first_of_many_conditional_puts_wins(store: ObjectStore) -> None:
    key = unique("race")
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: store.put(BUCKET, key, b"%d" % n, if_absent=True), range(16)))
    assert sum(won) == 1
    assert store.get(BUCKET, key) == b"%d" % won.index(True)
    assert not store.put(BUCKET, key, store.get(BUCKET, key), if_absent=True), "same bytes, another writer"


class Lossy:
    """The real client, except that the answer to the first call of `method` is lost after the server applied it."""

    def __init__(self, client: object, method: str) -> None:
        self._client = client
        self._method = method
        self.lost = 0

    def __getattr__(self, name: str) -> object:
        real = getattr(self._client, name)
        return self._lose(real) if name == self._method and not self.lost else real

    def _lose(self, real: Callable[..., object]) -> Callable[..., object]:
        from botocore.exceptions import ConnectionClosedError

        def call(**kwargs: object) -> object:
            real(**kwargs)
            self.lost += 1
            raise ConnectionClosedError(endpoint_url="http://lost")

        return call


def lossy(settings: ObjectStoreSettings, method: str) -> tuple[ObjectStore, Lossy]:
    store = ObjectStore(settings)
    client = Lossy(store.client(), method)
    store._s3.raw = lambda: client  # type: ignore[method-assign]
    return store, client


def test_a_conditional_put_whose_answer_was_lost_knows_its_own_write(settings: ObjectStoreSettings) -> None:
    store, client = lossy(settings, "put_object")
    key = unique("lost")
    assert store.put(BUCKET, key, b"mine", if_absent=True)
    assert client.lost == 1
    assert not ObjectStore(settings).put(BUCKET, key, b"mine", if_absent=True)


def test_a_multipart_completion_whose_answer_was_lost_is_complete(
    settings: ObjectStoreSettings, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x" * (17 * MIB))
    store, client = lossy(settings, "complete_multipart_upload")
    key = unique("lost-parts")
    store.put_file(BUCKET, key, file)
    assert client.lost == 1
    assert len(store.get(BUCKET, key)) == 17 * MIB


@pytest.mark.parametrize("size", [0, 1, 16 * MIB, 16 * MIB + 1, 40 * MIB + 7], ids=lambda n: f"{n} bytes")
def test_files_of_any_size_come_back_the_same(store: ObjectStore, tmp_path: Path, size: int) -> None:
    source, copy, key = tmp_path / "in", tmp_path / "deep" / "out", unique("file")
    source.write_bytes((b"0123456789abcdef!" * (size // 17 + 1))[:size])
    store.put_file(BUCKET, key, source)
    digest = store.get_file(BUCKET, key, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert digest == hashlib.sha256(source.read_bytes()).hexdigest()
    assert [p.name for p in copy.parent.iterdir()] == ["out"]


def test_a_download_that_fails_leaves_the_old_file(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ObjectMissing):
        store.get_file(BUCKET, "no-such-key", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_that_differ_from_the_stored_sha_are_refused(store: ObjectStore, tmp_path: Path) -> None:
    key = unique("rotten")
    store.client().put_object(Bucket=BUCKET, Key=key, Body=b"other", Metadata={"khet-sha256": "0" * 64})
    with pytest.raises(IntegrityError, match=r"does not match the SHA-256"):
        store.get(BUCKET, key)
    with pytest.raises(IntegrityError, match=r"does not match the SHA-256"):
        store.get_file(BUCKET, key, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert store.digest(BUCKET, key) == (hashlib.sha256(b"other").hexdigest(), 5)
    assert store.recorded_sha256(BUCKET, key) == "0" * 64
    assert store.recorded_sha256(BUCKET, unique("none")) is None


def test_an_unreadable_file_is_a_wrong_argument(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.*cannot be read"):
        store.put_file(BUCKET, "x", tmp_path / "gone")


def test_listing_goes_through_all_pages_in_key_order(store: ObjectStore) -> None:
    base = unique("many")
    store.upload(BUCKET, {f"{base}/{n:04d}": b"%d" % n for n in range(1005)})
    found = list(store.list(BUCKET, f"{base}/"))
    assert [info.key for info in found] == [f"{base}/{n:04d}" for n in range(1005)]
    assert found[1004].size_bytes == 4
    assert abs(found[0].modified_at - datetime.now(UTC)) < timedelta(minutes=10)
    assert store.delete(BUCKET, (info.key for info in found)) == 1005
    assert list(store.list(BUCKET, f"{base}/")) == []


def test_prefixes_are_the_folders_directly_below(store: ObjectStore) -> None:
    base = unique("tree")
    store.upload(BUCKET, {f"{base}/{name}": b"" for name in ("v1.0.0/a", "v1.0.0/b/c", "v2.0.0/a", "loose")})
    assert list(store.prefixes(BUCKET, f"{base}/")) == [f"{base}/v1.0.0/", f"{base}/v2.0.0/"]
    assert f"{base}/" in store.prefixes(BUCKET)


def test_deleting_what_is_gone_is_fine(store: ObjectStore) -> None:
    assert store.delete(BUCKET, [unique("gone")]) == 1
    assert store.delete(BUCKET, []) == 0


def test_an_upload_reports_its_progress_in_the_callers_thread(store: ObjectStore, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * (33 * MIB))
    seen: list[tuple[int, int, int]] = []
    base = unique("up")
    items = {f"{base}/big": big, f"{base}/small": b"12345"}
    store.upload(BUCKET, items, lambda done, total: seen.append((done, total, threading.get_ident())))
    assert seen[-1][:2] == (33 * MIB + 5, 33 * MIB + 5)
    assert {ident for *_, ident in seen} == {threading.get_ident()}
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)


def test_a_presigned_address_needs_no_credentials(store: ObjectStore) -> None:
    key = unique("signed")
    store.put(BUCKET, key, b"leaf")
    assert httpx.get(store.presigned_get(BUCKET, key, 60)).content == b"leaf"


def test_a_missing_bucket_is_made_only_where_allowed(settings: ObjectStoreSettings) -> None:
    bucket = unique("bucket")
    strict = ObjectStore(settings.model_copy(update={"create_buckets": False}))
    for attempt in (
        lambda: strict.put(bucket, "a", b""),
        lambda: strict.ensure_bucket(bucket),
        lambda: list(strict.list(bucket, "")),
        lambda: strict.get(bucket, "a"),
    ):
        with pytest.raises(ConfigError, match=bucket):
            attempt()
    willing = ObjectStore(settings.model_copy(update={"create_buckets": True}))
    assert willing.put(bucket, "a", b"1")
    willing.ensure_bucket(bucket)
    strict.ensure_bucket(bucket)
    assert strict.get(bucket, "a") == b"1"


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"secret_access_key": SecretStr("wrong-secret-value")}, "secret_access_key does not belong"),
        ({"access_key_id": "nobody"}, "does not know object_store.access_key_id"),
    ],
    ids=["wrong secret", "unknown key"],
)
def test_wrong_credentials_are_a_setting_to_correct(
    settings: ObjectStoreSettings, wrong: dict[str, object], hint: str
) -> None:
    store = ObjectStore(settings.model_copy(update=wrong))
    with pytest.raises(ConfigError, match=hint):
        store.get(BUCKET, "x")
    with pytest.raises(ConfigError, match=r"credentials are wrong"):
        store.exists(BUCKET, "x")


def test_no_secret_is_shown(settings: ObjectStoreSettings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="ml")
    assert settings.endpoint_url is not None
    address = settings.endpoint_url.replace("http://", "http://user:hunter2@")
    store = impatient(settings, secret_access_key=SecretStr("wrong-secret-value"), endpoint_url=address)
    with pytest.raises((ConfigError, ExternalError)) as caught:
        store.put(BUCKET, "x", b"")
    shown = "".join(traceback.format_exception(caught.value)) + repr(store) + caplog.text
    assert "wrong-secret-value" not in shown
    assert "hunter2" not in repr(store) + str(caught.value)


def test_a_store_that_is_not_there_is_named_with_what_to_do(settings: ObjectStoreSettings) -> None:
    with pytest.raises(ExternalError, match=r"http://127\.0\.0\.1:1 did not answer.*connection refused") as caught:
        impatient(settings, endpoint_url="http://127.0.0.1:1").put(BUCKET, "x", b"")
    assert "khet up" in str(caught.value)
    assert is_retryable(caught.value)


def test_a_proxy_of_the_environment_is_not_in_the_way(
    settings: ObjectStoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert impatient(settings).put(BUCKET, unique("proxy"), b"")


def test_a_malformed_address_is_a_setting_to_correct(settings: ObjectStoreSettings) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        impatient(settings, endpoint_url="not a url").get(BUCKET, "x")
