"""One at a time, against a real S3 server: one winner, fencing tokens that grow, takeover only after expiry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from configs.areas import ObjectStoreSettings
from configs.errors import IntegrityError, SafetyError
from ml.objects import ObjectStore
from tasks.lease import SKEW_S, Lease, break_lease, holder, is_held
from tests.support.s3 import impatient, unique
from tests.support.stack import object_store

BUCKET = "khet-guard-models"
TTL_S = 60.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStoreSettings]:
    with object_store(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(scope="module")
def store(settings: ObjectStoreSettings) -> ObjectStore:
    return ObjectStore(settings)


@pytest.fixture
def name() -> str:
    return unique("rollout")


class Clock:
    """Wall and monotonic time that a test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 5, 4, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take(store: ObjectStore, name: str, owner: str, clock: Clock, ttl_s: float = TTL_S) -> Lease:
    return Lease.acquire(store, BUCKET, name, owner, ttl_s, now=clock.now, clock=clock.monotonic)


def eventually(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.02)


@pytest.mark.parametrize("state", ["never taken", "released", "expired"])
def test_of_many_takers_exactly_one_wins(store: ObjectStore, name: str, clock: Clock, state: str) -> None:
    if state != "never taken":
        before = take(store, name, "earlier", clock)
        if state == "released":
            before.release()
        else:
            clock.seconds += TTL_S + SKEW_S

    def attempt(n: int) -> Lease | None:
        try:
            return take(store, name, f"run-{n}", clock)
        except SafetyError:
            return None

    with ThreadPoolExecutor(16) as pool:
        won = [lease for lease in pool.map(attempt, range(16)) if lease]
    assert len(won) == 1
    current = holder(store, BUCKET, name)
    assert current is not None
    assert current.owner == won[0].record.owner


def test_a_held_lease_is_refused_with_all_that_one_needs_to_know(store: ObjectStore, name: str, clock: Clock) -> None:
    take(store, name, "release-7", clock)
    with pytest.raises(SafetyError) as caught:
        take(store, name, "release-8", clock)
    text = str(caught.value)
    assert f"The {name} lease is held by release-7 since 2026-05-04 00:16:40 UTC" in text
    assert "expires at 00:17:40 UTC" in text
    assert "khet doctor --fix" in text


def test_it_is_free_only_after_expiry_and_a_margin_for_skewed_clocks(
    store: ObjectStore, name: str, clock: Clock
) -> None:
    take(store, name, "a", clock)
    clock.seconds += TTL_S + SKEW_S - 0.1
    with pytest.raises(SafetyError, match="held by a"):
        take(store, name, "b", clock)
    assert is_held(holder(store, BUCKET, name), clock.now())
    clock.seconds += 0.1
    assert not is_held(holder(store, BUCKET, name), clock.now())
    assert take(store, name, "b", clock).token == 2


def test_fencing_tokens_only_grow_and_old_generations_go(store: ObjectStore, name: str, clock: Clock) -> None:
    tokens = []
    for n in range(25):
        lease = take(store, name, f"run-{n}", clock)
        tokens.append(lease.token)
        lease.release()
    assert tokens == list(range(1, 26))
    kept = [info.key for info in store.list(BUCKET, f"leases/{name}/")]
    assert len(kept) <= 21
    assert kept[-1].endswith("/00000025.json")


def test_renewing_keeps_it(store: ObjectStore, name: str, clock: Clock) -> None:
    lease = take(store, name, "a", clock)
    for _ in range(3):
        clock.seconds += TTL_S - 1
        lease.renew()
        lease.check()
    with pytest.raises(SafetyError, match="held by a"):
        take(store, name, "b", clock)


def test_a_holder_that_renews_too_late_has_lost_it(store: ObjectStore, name: str, clock: Clock) -> None:
    lease = take(store, name, "a", clock)
    clock.seconds += TTL_S
    with pytest.raises(SafetyError, match="was lost"):
        lease.check()
    assert lease.lost.is_set()
    with pytest.raises(SafetyError, match="was lost"):
        lease.renew()


def test_the_owner_takes_its_own_lease_over_after_a_kill(store: ObjectStore, name: str, clock: Clock) -> None:
    first = take(store, name, "release-7", clock)
    second = take(store, name, "release-7", clock)
    assert second.token > first.token
    with pytest.raises(SafetyError, match="was lost"):
        first.renew()
    first.release()  # of no effect any more
    second.renew()
    with pytest.raises(SafetyError, match="held by release-7"):
        take(store, name, "release-8", clock)


def test_a_broken_lease_is_free_and_its_holder_stops(store: ObjectStore, name: str, clock: Clock) -> None:
    lease = take(store, name, "a", clock)
    break_lease(store, BUCKET, name, by="on-call", now=clock.now)
    break_lease(store, BUCKET, name, by="on-call", now=clock.now)
    with pytest.raises(SafetyError, match="was lost"):
        lease.renew()
    assert take(store, name, "b", clock).token == 3


def test_a_with_block_renews_by_itself_and_releases(store: ObjectStore, name: str) -> None:
    with Lease.acquire(store, BUCKET, name, "a", 3.0) as lease:
        written = lease.record.expires_at
        eventually(lambda: lease.record.expires_at > written + timedelta(seconds=2))
        lease.check()
    current = holder(store, BUCKET, name)
    assert current is not None
    assert current.released
    with Lease.acquire(store, BUCKET, name, "b", 3.0) as lease:
        assert lease.token == 2


def test_a_failing_with_block_releases_too(store: ObjectStore, name: str) -> None:
    with pytest.raises(RuntimeError, match="boom"), Lease.acquire(store, BUCKET, name, "a", TTL_S):
        raise RuntimeError("boom")
    with Lease.acquire(store, BUCKET, name, "b", TTL_S) as lease:
        assert lease.token == 2


def test_a_holder_notices_that_it_was_superseded(store: ObjectStore, name: str) -> None:
    with Lease.acquire(store, BUCKET, name, "a", 3.0) as lease:
        break_lease(store, BUCKET, name, by="on-call")
        eventually(lease.lost.is_set)
        with pytest.raises(SafetyError):
            lease.check()


def test_a_holder_without_a_store_knows_when_its_time_is_over(settings: ObjectStoreSettings, name: str) -> None:
    store = ObjectStore(settings)
    with Lease.acquire(store, BUCKET, name, "a", 2.0) as lease:
        lease._quick = impatient(settings, endpoint_url="http://127.0.0.1:1")
        lease.check()
        eventually(lease.lost.is_set)
        with pytest.raises(SafetyError, match="not renewed in time"):
            lease.check()


def test_work_that_is_done_stays_done_when_its_lease_cannot_be_released(
    settings: ObjectStoreSettings, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Lease.acquire(ObjectStore(settings), BUCKET, name, "a", TTL_S) as lease:
        lease._store = impatient(settings, endpoint_url="http://127.0.0.1:1")
    assert f"lease {name} expires by itself" in caplog.text


def test_a_garbled_lease_is_not_taken_for_a_free_one(store: ObjectStore, name: str, clock: Clock) -> None:
    store.put(BUCKET, f"leases/{name}/00000001.json", b"{}")
    with pytest.raises(IntegrityError, match=r"00000001\.json is not a lease"):
        take(store, name, "a", clock)


def test_processes_race_for_it_too(settings: ObjectStoreSettings, name: str, tmp_path: Path) -> None:
    from tests.support.processes import run_python

    assert settings.secret_access_key is not None
    config = settings.model_dump(mode="json") | {"secret_access_key": settings.secret_access_key.get_secret_value()}
    code = f"""
import os
from pydantic import SecretStr
from configs.areas import ObjectStoreSettings
from configs.errors import SafetyError
from ml.objects import ObjectStore
from tasks.lease import Lease
config = {config!r}
store = ObjectStore(ObjectStoreSettings(**(config | {{"secret_access_key": SecretStr(config["secret_access_key"])}})))
try:
    print("won", Lease.acquire(store, {BUCKET!r}, {name!r}, str(os.getpid()), 60).token)
except SafetyError:
    print("refused")
"""
    answers = run_python([code] * 4)
    assert sorted(answers) == ["refused", "refused", "refused", "won 1"]
