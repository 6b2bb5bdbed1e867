"""How the object store waits, gives up and explains, with a clock and a server of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from configs.areas import ObjectStoreSettings
from configs.errors import ConfigError, ExternalError, KhetError, is_retryable
from ml.objects import ObjectMissing, ObjectStore
from ml.s3_errors import Kind, classify, reason
from ml.uploads import raise_first

SETTINGS = ObjectStoreSettings(
    endpoint_url="http://user:hunter2@127.0.0.1:1",
    access_key_id="key",
    secret_access_key=SecretStr("hunter2"),
    patience_s=60,
)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.naps: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


def refused() -> Exception:
    from botocore.exceptions import EndpointConnectionError

    return EndpointConnectionError(endpoint_url="http://127.0.0.1:1")


def answer(code: str, status: int, message: str = "") -> Exception:
    from botocore.exceptions import ClientError

    body = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(body, "PutObject")  # type: ignore[arg-type]


def store_that(time: Time, respond: Callable[[int], None], **changes: object) -> ObjectStore:
    """A store whose every call asks `respond(number of the call)`, which may raise."""
    store = ObjectStore(SETTINGS.model_copy(update=changes), clock=time.clock, sleep=time.sleep)
    calls = iter(range(1, 10_000))

    class Client:
        def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]:
            def call(**_: object) -> dict[str, Any]:
                respond(next(calls))
                return {"Metadata": {}}

            return call

    store._s3.raw = Client  # type: ignore[method-assign]
    return store


def test_an_outage_shorter_than_the_patience_is_ridden_out() -> None:
    time = Time()

    def respond(_: int) -> None:
        if time.now < 20:
            raise refused()

    assert store_that(time, respond).put("b", "k", b"data")
    assert 20 <= time.now < 27


def test_an_outage_longer_than_the_patience_fails_when_the_patience_is_over() -> None:
    time = Time()

    def respond(_: int) -> None:
        raise refused()

    with pytest.raises(ExternalError, match=r"http://127\.0\.0\.1:1 did not answer for 60 s") as caught:
        store_that(time, respond).put("b", "k", b"data")
    assert is_retryable(caught.value)
    assert time.now == pytest.approx(60)
    for part in ("while storing s3://b/k", "connection refused", "repeating is safe", "khet status", "khet up"):
        assert part in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_pauses_grow_to_seconds_and_differ() -> None:
    time = Time()

    def respond(_: int) -> None:
        raise refused()

    with pytest.raises(ExternalError):
        store_that(time, respond, patience_s=120).put("b", "k", b"")
    assert 0.1 <= time.naps[0] <= 0.2
    assert all(2.5 <= nap <= 5 for nap in time.naps[8:-1])
    assert len(set(time.naps)) == len(time.naps)


def test_no_patience_means_one_try() -> None:
    time, calls = Time(), []

    def respond(number: int) -> None:
        calls.append(number)
        raise refused()

    with pytest.raises(ExternalError):
        store_that(time, respond, patience_s=0).get("b", "k")
    assert calls == [1]


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("InternalError", 500, Kind.retry),
        ("ServiceUnavailable", 503, Kind.retry),
        ("SlowDown", 503, Kind.retry),
        ("TooManyRequests", 429, Kind.retry),
        ("RequestTimeout", 400, Kind.retry),
        ("ConditionalRequestConflict", 409, Kind.retry),
        ("BadDigest", 400, Kind.retry),
        ("PreconditionFailed", 412, Kind.exists),
        ("NoSuchKey", 404, Kind.key_missing),
        ("404", 404, Kind.key_missing),
        ("NoSuchBucket", 404, Kind.bucket_missing),
        ("AccessDenied", 403, Kind.config),
        ("403", 403, Kind.config),
        ("SignatureDoesNotMatch", 403, Kind.config),
        ("RequestTimeTooSkewed", 403, Kind.config),
        ("EntityTooLarge", 400, Kind.refused),
        ("NotImplemented", 501, Kind.retry),
    ],
)
def test_answers_are_told_apart(code: str, status: int, expected: Kind) -> None:
    assert classify(answer(code, status)) is expected


def test_broken_connections_are_worth_a_retry_and_bad_certificates_are_not() -> None:
    from botocore import exceptions as boto
    from urllib3.exceptions import ProtocolError

    for error in (
        refused(),
        boto.ReadTimeoutError(endpoint_url="x"),
        boto.ConnectTimeoutError(endpoint_url="x"),
        boto.ConnectionClosedError(endpoint_url="x"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto.ResponseStreamingError(error="cut"),
        ProtocolError("cut"),
    ):
        assert classify(error) is Kind.retry, error
    assert classify(boto.SSLError(endpoint_url="x", error="bad")) is Kind.config
    assert classify(boto.NoCredentialsError()) is Kind.config
    assert "access_key_id" in reason(boto.NoCredentialsError())
    assert classify(ValueError("Invalid endpoint: x")) is Kind.config


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (answer("AccessDenied", 403), ConfigError),
        (answer("NoSuchKey", 404), ObjectMissing),
        (answer("NoSuchBucket", 404), ConfigError),
        (answer("EntityTooLarge", 400, "too large"), ExternalError),
    ],
    ids=["denied", "no key", "no bucket", "refused"],
)
def test_a_final_answer_is_not_asked_for_again(error: Exception, expected: type[KhetError]) -> None:
    time = Time()

    def respond(_: int) -> None:
        raise error

    with pytest.raises(expected) as caught:
        store_that(time, respond).get("b", "k")
    assert time.naps == []
    assert not is_retryable(caught.value)


def test_a_vanished_rival_object_counts_as_anothers(tmp_path: Path) -> None:
    def respond(number: int) -> None:
        raise answer("PreconditionFailed", 412) if number == 1 else answer("404", 404)

    assert store_that(Time(), respond).put("b", "k", b"", if_absent=True) is False


def test_a_store_for_quick_questions_gives_up_quickly() -> None:
    quick = ObjectStore(SETTINGS).with_patience(0.5)
    assert quick._settings.patience_s == 0.5
    assert quick._settings.read_timeout_s == 0.5
    assert quick._settings.max_attempts == 1


def test_nothing_shows_a_secret_and_nothing_heavy_is_imported() -> None:
    from tests.support.processes import run_python

    assert repr(ObjectStore(SETTINGS)) == "ObjectStore(http://127.0.0.1:1)"
    assert repr(ObjectStore(ObjectStoreSettings())) == "ObjectStore(AWS S3 (us-east-1))"
    heavy = "boto3 botocore torch prefect psycopg cryptography jinja2 onnxruntime"
    modules = (
        "ml.objects, ml.bundle, ml.signing, ml.lineage, tasks.registry, tasks.registry.card, tasks.lease, tasks.audit"
    )
    code = f"import sys, {modules}; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert run_python([code]) == ["[]"]


def test_an_error_survives_the_way_between_processes() -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(ObjectMissing("gone")))  # noqa: S301  (our own bytes)
    assert isinstance(copy, ObjectMissing)
    assert not copy.retryable


def test_a_wrong_setting_explains_more_than_the_outages_beside_it() -> None:
    from concurrent.futures import Future

    jobs: dict[Future[Any], str] = {}
    for name, error in (("a", ExternalError("away")), ("b", ConfigError("denied")), ("c", None)):
        future: Future[Any] = Future()
        future.set_exception(error) if error else future.set_result(None)
        jobs[future] = name
    with pytest.raises(ConfigError, match="denied"):
        raise_first(jobs, "s3://b")
    only = {future: name for future, name in jobs.items() if name != "b"}
    with pytest.raises(ExternalError, match=r"Of 2 for s3://b, 1 were stored \(c\), 1 were not \(a\)"):
        raise_first(only, "s3://b")
