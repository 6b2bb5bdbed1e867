"""Writes every answer down without ever delaying one: memory, then disk, then the object store.

Worker threads append to a bounded queue. A writer thread turns it into Parquet batches in the spool. A second thread
delivers the spool, oldest first, as often as it takes. So a store that is down costs disk, a full disk costs rows
(counted), and neither costs a request.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from configs.errors import KhetError
from ml.images import statistics
from ml.serving.inference import Prediction
from ml.serving.metrics import Metrics
from ml.serving.rows import Batch, Origin, Row, to_batches
from ml.serving.service import Photo
from ml.serving.spool import Entry, Spool

logger = logging.getLogger(__name__)
# Rows in memory, in batches: enough for a writer that is held up for seconds.
_QUEUED_BATCHES: Final = 20
# Rows in memory while the disk takes none, in full batches; they go straight to the store. Counted in rows, because
# a slow trickle of requests makes many small batches.
_BATCHES_WITHOUT_DISK: Final = 16
_BACKOFF_S: Final = (0.5, 30.0)
_ADOPT_EVERY_S: Final = 30.0
# Between them they stay under the time a supervisor waits before SIGKILL; what is not delivered stays in the spool.
_LAST_WRITE_S: Final = 3.0
_LAST_DELIVERY_S: Final = 3.0


class Put(Protocol):
    """The one call of the object store that is used here."""

    def __call__(self, bucket: str, key: str, data: bytes) -> object:
        """Store `data`; raises KhetError."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Where the log goes and how it is cut."""

    bucket: str
    batch_rows: int
    flush_s: float


class PredictionLog:
    """The log of one replica. `record` is called by worker threads; the rest by the main thread."""

    def __init__(self, settings: LogSettings, origin: Origin, put: Put, spool: Spool, metrics: Metrics) -> None:
        self._settings = settings
        self._origin = origin
        self._queue: deque[Row] = deque()
        self._max_rows = _QUEUED_BATCHES * settings.batch_rows
        self._metrics = metrics
        self._stopping = False
        self._full_batch = threading.Event()
        self._spool = spool
        rows_in_memory = _BATCHES_WITHOUT_DISK * settings.batch_rows
        self._deliverer = Deliverer(settings.bucket, put, spool, metrics, rows_in_memory)
        self._spool_broken = False
        self._writer = threading.Thread(target=self._write, name="log-writer", daemon=True)
        metrics.watch("prediction_log_queued_rows", "Rows in memory.", lambda: len(self._queue))
        metrics.watch("prediction_log_spooled_rows", "Rows on disk, not delivered yet.", lambda: spool.rows)
        metrics.watch("prediction_log_spooled_bytes", "Disk used by them.", lambda: spool.used_bytes)

    def start(self) -> None:
        """Start both threads."""
        self._writer.start()
        self._deliverer.start()

    def record(self, photo: Photo, prediction: Prediction, latency_s: float) -> None:
        """Queue one answer."""
        if len(self._queue) >= self._max_rows:  # before the work of making a row
            self._metrics.log_rows("dropped", 1)
            return
        self.append(
            Row(
                photo.request_id,
                time.time(),
                prediction.order[0],
                prediction.probs,
                prediction.ood_score,
                prediction.is_leaf,
                statistics(prediction.rgb),
                prediction.embedding,
                hashlib.sha256(photo.data).hexdigest(),
                1e3 * latency_s,
                photo.source,
            )
        )

    def append(self, row: Row) -> None:
        """Queue one row; where the queue is full it is counted and forgotten."""
        if len(self._queue) >= self._max_rows:
            self._metrics.log_rows("dropped", 1)
            return
        self._queue.append(row)
        if len(self._queue) >= self._settings.batch_rows:
            self._full_batch.set()

    def close(self) -> None:
        """Write what is queued, deliver what can be delivered in a few seconds; the rest stays in the spool."""
        self._stopping = True
        self._full_batch.set()
        self._writer.join(_LAST_WRITE_S)
        self._deliverer.stop(_LAST_DELIVERY_S)
        if left := len(self._queue):
            self._metrics.log_rows("dropped", left)
            logger.error("%d rows of the prediction log could not be written in time.", left)

    def _write(self) -> None:
        while not self._stopping:
            self._full_batch.wait(self._settings.flush_s)
            self._full_batch.clear()
            self._write_queue()
        self._write_queue()

    def _write_queue(self) -> None:
        while self._queue:
            rows = [self._queue.popleft() for _ in range(min(len(self._queue), self._settings.batch_rows))]
            try:
                batches = to_batches(rows, self._origin)
            except Exception:  # no row is worth the thread that writes all others
                self._metrics.log_problem("encode")
                self._metrics.log_rows("dropped", len(rows))
                logger.exception("%d rows of the prediction log could not be encoded.", len(rows))
                continue
            for batch in batches:
                self._keep(batch)

    def _keep(self, batch: Batch) -> None:
        try:
            dropped = self._spool.add(batch)
        except OSError as error:
            self._metrics.log_problem("spool")
            if not self._spool_broken:  # once, not a line every few seconds
                logger.error("The spool takes no batches (%s); they go from memory to the store meanwhile.", error)
            self._spool_broken = True
            self._deliverer.deliver_from_memory(batch)
            return
        if self._spool_broken:
            logger.info("The spool takes batches again.")
        self._spool_broken = False
        if dropped:
            self._metrics.log_problem("spool_full")
            self._metrics.log_rows("dropped", dropped)
        self._deliverer.wake()


class Deliverer:
    """Moves batches into the object store from one thread. The same batch always gets the same key."""

    def __init__(
        self,
        bucket: str,
        put: Put,
        spool: Spool,
        metrics: Metrics,
        rows_in_memory: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._put = put
        self._spool = spool
        self._metrics = metrics
        self._clock = clock
        self._rows_in_memory = rows_in_memory
        self._memory: deque[Batch] = deque()
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._failures = 0
        self._adopt_at = clock()
        self._thread = threading.Thread(target=self._run, name="log-deliverer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """There is something to deliver."""
        self._news.set()

    def deliver_from_memory(self, batch: Batch) -> None:
        """Take a batch the disk refused; the oldest of too many is counted and forgotten."""
        with self._lock:
            self._memory.append(batch)
            while len(self._memory) > 1 and sum(kept.rows for kept in self._memory) > self._rows_in_memory:
                self._drop(self._memory.popleft().rows)
        self.wake()

    def stop(self, timeout_s: float) -> None:
        """One last round, then the end."""
        self._stopping.set()
        self.wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("The store is slow; %d rows stay in the spool for the next replica.", self._spool.rows)
            return
        self._drop(sum(batch.rows for batch in self._memory))
        try:
            self._spool.close()
        except OSError as error:
            logger.warning("The spool could not be closed cleanly: %s.", error)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._adopt_if_due()
            if self._deliver_all():
                self._news.wait(_ADOPT_EVERY_S)
            else:
                self._stopping.wait(min(_BACKOFF_S[1], _BACKOFF_S[0] * 2 ** min(self._failures, 10)))
            self._news.clear()
        self._deliver_all()

    def _deliver_all(self) -> bool:
        """Deliver until nothing is left; False at the first failure of the store."""
        while (batch := self._take()) is not None:
            if not self._send(batch.key, batch.data):
                with self._lock:
                    self._memory.appendleft(batch)
                return False
            self._metrics.log_rows("written", batch.rows)
        while (borrowed := self._borrow()) is not None:
            entry, data = borrowed
            if not self._send(entry.key, data):
                self._spool.give_back(entry)
                return False
            self._metrics.log_rows("written", entry.rows)
            self._forget(entry)
        return True

    def _take(self) -> Batch | None:
        """The oldest batch in memory: out of the queue while it is sent, so that making room never touches it."""
        with self._lock:
            return self._memory.popleft() if self._memory else None

    def _send(self, key: str, data: bytes) -> bool:
        try:
            self._put(self._bucket, key, data)
        except KhetError as error:
            self._metrics.log_problem("store")
            if self._failures == 0:  # once an outage
                logger.warning("The prediction log is not delivered: %s It is kept and tried again.", error)
            self._failures += 1
            return False
        if self._failures:
            logger.info("The prediction log is delivered again.")
        self._failures = 0
        return True

    def _borrow(self) -> tuple[Entry, bytes] | None:
        """The oldest readable batch of the spool; unreadable ones are counted and forgotten."""
        while (entry := self._spool.oldest()) is not None:
            try:
                return entry, self._spool.borrow(entry)
            except OSError as error:
                logger.error("%s in the spool cannot be read (%s); its rows are lost.", entry.file, error)
                self._metrics.log_problem("spool")
                self._drop(entry.rows)
                self._forget(entry)
        return None

    def _forget(self, entry: Entry) -> None:
        try:
            self._spool.remove(entry)
        except OSError as error:
            # It may be delivered a second time, under the same key: harmless.
            logger.warning("%s stays in the spool: %s.", entry.file, error)

    def _adopt_if_due(self) -> None:
        if self._clock() < self._adopt_at:
            return
        self._adopt_at = self._clock() + _ADOPT_EVERY_S
        try:
            adopted, dropped = self._spool.adopt()
        except OSError as error:
            self._metrics.log_problem("spool")
            logger.warning("What other replicas left in the spool cannot be taken over: %s.", error)
            return
        self._drop(dropped)
        if adopted:
            logger.info("%d rows that another replica left in the spool are delivered now.", adopted)

    def _drop(self, rows: int) -> None:
        if rows:
            self._metrics.log_rows("dropped", rows)
