"""One at a time, across machines: a lease kept in the object store, leaning only on `If-None-Match: *`.

A lease is a chain of generations, `leases/<name>/00000001.json` and so on; the highest is the current one. It is taken
by creating the next generation, which succeeds for one of any number of takers, and only once the current one is
released or has expired. Its number is the fencing token: it only ever grows. The holder renews by rewriting its own
generation, never when a higher one exists.

Machines whose clocks differ by up to `SKEW_S` are safe from each other: takers wait that much longer than the holder's
`expires_at`, and a holder counts its own time from before it wrote, on a clock that nobody sets.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self

from pydantic import AwareDatetime, ValidationError

from configs.errors import ExternalError, IntegrityError, KhetError, SafetyError
from ml.objects import ObjectMissing, ObjectStore
from ml.results import Record

SKEW_S = 5.0
_KEEP = 20  # generations kept for those who want to see who held it before
_log = logging.getLogger(__name__)


class LeaseRecord(Record):
    """One generation as it is stored."""

    name: str
    owner: str
    generation: int
    acquired_at: AwareDatetime
    expires_at: AwareDatetime
    released: bool = False


def utc_now() -> datetime:
    """The clock of production."""
    return datetime.now(UTC)


class Lease:
    """A held lease. As a context manager it renews itself in a thread and is released at the end.

    `lost` is set when the lease can no longer be counted on: taken by another, or not renewed in time. Work that
    changes a system calls `check()` before each change.
    """

    def __init__(
        self,
        store: ObjectStore,
        bucket: str,
        record: LeaseRecord,
        ttl_s: float,
        now: Callable[[], datetime],
        sure_until: float,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        # A renewal that outlasts the lease is worth nothing: it gives up early, and is tried again.
        self._quick = store.with_patience(ttl_s / 4)
        self._bucket = bucket
        self._record = record
        self._ttl_s = ttl_s
        self._now = now
        self._sure_until = sure_until
        self._clock = clock
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()

    @classmethod
    def acquire(
        cls,
        store: ObjectStore,
        bucket: str,
        name: str,
        owner: str,
        ttl_s: float,
        now: Callable[[], datetime] = utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> Lease:
        """Take the lease for `ttl_s` seconds. An owner takes its own lease over (a release resumed after a kill).

        Raises:
            SafetyError: somebody else holds it; the message says who, since when, until when, and what to do.
        """
        began = clock()
        current = holder(store, bucket, name)
        if current is not None and current.owner != owner and not _is_over(current, now()):
            raise SafetyError(_held(current))
        record = LeaseRecord(
            name=name,
            owner=owner,
            generation=current.generation + 1 if current else 1,
            acquired_at=now(),
            expires_at=now() + timedelta(seconds=ttl_s),
        )
        if not store.put(bucket, _key(record), _json(record), if_absent=True, content_type="application/json"):
            raise SafetyError(_held(holder(store, bucket, name) or record))
        lease = cls(store, bucket, record, ttl_s, now, began + ttl_s, clock)
        lease._tidy()
        return lease

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._keep, name=f"lease-{self._record.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._ttl_s)
        # The outcome of the work is what counts; a lease that cannot be released now expires by itself.
        try:
            self.release()
        except KhetError as failure:
            _log.warning("lease %s expires by itself: %s", self._record.name, failure)

    @property
    def token(self) -> int:
        """The fencing token: greater than that of every earlier holder."""
        return self._record.generation

    @property
    def record(self) -> LeaseRecord:
        """What is stored of it."""
        return self._record

    def check(self) -> None:
        """Return while the lease is surely held.

        Raises:
            SafetyError: it is not; change nothing more.
        """
        if self._clock() >= self._sure_until:
            self.lost.set()
        if self.lost.is_set():
            raise SafetyError(
                f"Lease {self._record.name} of {self._record.owner} was lost: it was not renewed in time, or somebody "
                "else took it. Nothing more is changed by this run.\n"
                "Next: `khet status` shows who acts now; `khet doctor --fix` finishes or undoes what was begun."
            )

    def renew(self) -> None:
        """Hold it for another `ttl_s` from now.

        Raises:
            SafetyError: it was lost.
            ExternalError: the store did not answer; the lease is held until it expires.
        """
        with self._writing:
            self.check()
            began = self._clock()
            self._refuse_superseded()
            renewed = self._record.model_copy(update={"expires_at": self._now() + timedelta(seconds=self._ttl_s)})
            self._quick.put(self._bucket, _key(renewed), _json(renewed), content_type="application/json")
            self._refuse_superseded()  # taken between the look and the write: the newer generation counts
            self._record = renewed
            self._sure_until = began + self._ttl_s

    def release(self) -> None:
        """Let others have it at once. Releasing a lost or released lease does nothing."""
        self._stop.set()
        with self._writing:
            if self._record.released or self.lost.is_set():
                return
            self._record = self._record.model_copy(update={"released": True})
            self._store.put(self._bucket, _key(self._record), _json(self._record), content_type="application/json")
            self.lost.set()

    def _keep(self) -> None:
        """Renew three times within each lifetime; tell `lost` when it is over."""
        while not self._stop.wait(min(self._ttl_s / 3, max(self._sure_until - self._clock(), 0.05))):
            try:
                self.renew()
            except SafetyError as error:
                _log.error("%s", error)
                return
            except ExternalError as error:
                _log.warning("lease %s could not be renewed yet: %s", self._record.name, error)
            except KhetError as error:
                _log.error("lease %s cannot be renewed: %s", self._record.name, error)

    def _refuse_superseded(self) -> None:
        keys = _generations(self._quick, self._bucket, self._record.name)
        if not keys or keys[-1] != _key(self._record):
            self.lost.set()
            self.check()

    def _tidy(self) -> None:
        """Old generations go. Failing here harms nobody: the next taker tries again."""
        keys = _generations(self._store, self._bucket, self._record.name)
        with contextlib.suppress(ExternalError):
            self._store.delete(self._bucket, keys[:-_KEEP])


def holder(store: ObjectStore, bucket: str, name: str) -> LeaseRecord | None:
    """The highest generation, released or expired as it may be; None: the lease was never taken.

    Raises:
        IntegrityError: what is stored is not a lease.
    """
    for _ in range(3):
        keys = _generations(store, bucket, name)
        if not keys:
            return None
        with contextlib.suppress(ObjectMissing):  # tidied since it was listed: then there are newer ones
            return _read(store, bucket, keys[-1])
    raise ExternalError(f"Lease {name} changes faster than it can be read. It was not taken.")


def break_lease(store: ObjectStore, bucket: str, name: str, by: str, now: Callable[[], datetime] = utc_now) -> None:
    """Take a lease away from whoever holds it and leave it free. For people who know that the holder is dead.

    A holder that lives after all notices at its next renewal and stops.
    """
    current = holder(store, bucket, name)
    if current is None or current.released:
        return
    at = now()
    record = LeaseRecord(
        name=name, owner=by, generation=current.generation + 1, acquired_at=at, expires_at=at, released=True
    )
    if not store.put(bucket, _key(record), _json(record), if_absent=True, content_type="application/json"):
        raise SafetyError(f"Lease {name} was taken by someone else in this moment. It was left as it is.")


def is_held(record: LeaseRecord | None, at: datetime) -> bool:
    """Whether a taker other than the owner would be refused."""
    return record is not None and not _is_over(record, at)


def _is_over(record: LeaseRecord, at: datetime) -> bool:
    return record.released or at >= record.expires_at + timedelta(seconds=SKEW_S)


def _held(record: LeaseRecord) -> str:
    return (
        f"The {record.name} lease is held by {record.owner} since {record.acquired_at:%Y-%m-%d %H:%M:%S} UTC; "
        f"unless renewed it expires at {record.expires_at:%H:%M:%S} UTC. Nothing was changed.\n"
        "Next: wait for it, or, if that run is dead, `khet doctor --fix` once it has expired."
    )


def _generations(store: ObjectStore, bucket: str, name: str) -> Sequence[str]:
    return sorted(info.key for info in store.list(bucket, f"leases/{name}/"))


def _read(store: ObjectStore, bucket: str, key: str) -> LeaseRecord:
    try:
        return LeaseRecord.model_validate_json(store.get(bucket, key))
    except ValidationError as error:
        raise IntegrityError(f"s3://{bucket}/{key} is not a lease: {error}. Nothing was changed.") from error


def _key(record: LeaseRecord) -> str:
    return f"leases/{record.name}/{record.generation:08d}.json"


def _json(record: LeaseRecord) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()
