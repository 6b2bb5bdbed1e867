"""What this replica counts, under the runbook's metric names, every series labelled with the model's version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

# Seconds. Fine around what a small model on a CPU takes, up to the 5 s and 2 s of the runbook's alerts and beyond.
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


class Metrics:
    """One registry a replica. `path` is always one of a few known ones: a scan of the web adds no series."""

    def __init__(self, version: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._version = version
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        registry = self.registry
        self._requests = Counter(
            "http_requests_total", "Answers by status.", ["status", "version", "path"], registry=registry
        )
        self._duration = Histogram(
            "http_request_duration_seconds",
            "From the request's head to the end of its answer.",
            ["version", "path"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._inference = Histogram(
            "model_inference_seconds", "The model alone.", ["version"], buckets=_BUCKETS, registry=registry
        ).labels(version)
        self._predictions = Counter(
            "model_predictions_total", "Answers by class.", ["class", "version"], registry=registry
        )
        self._ood = Counter("model_ood_total", "Photos that look like no leaf.", ["version"], registry=registry).labels(
            version
        )
        self._accuracy = Gauge(
            "model_accuracy", "On the holdout, when the version was published.", ["version"], registry=registry
        )
        self._log_rows = Counter(
            "prediction_log_rows_total",
            "Rows of the prediction log: written to the object store, or dropped.",
            ["result", "version"],
            registry=registry,
        )
        self._log_problems = Counter(
            "prediction_log_problems_total",
            "Failures of the log that cost no request.",
            ["kind", "version"],
            registry=registry,
        )
        self._ready = Gauge("model_ready", "1 while this replica takes traffic.", ["version"], registry=registry)
        self._finished: dict[tuple[int, str], tuple[Counter, Histogram]] = {}
        self._by_class: list[Counter] = []
        for result in ("written", "dropped"):
            self._log_rows.labels(result, version)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody looks."""
        Gauge(name, help_text, ["version"], registry=self.registry).labels(self._version).set_function(value)

    def model_loaded(self, classes: Sequence[str], accuracy: float | None) -> None:
        """The model is known now: its classes, and its accuracy if it was published with one."""
        self._by_class = [self._predictions.labels(name, self._version) for name in classes]
        if accuracy is not None:
            self._accuracy.labels(self._version).set(accuracy)

    def set_ready(self, ready: bool) -> None:
        """This replica takes traffic, or does not any more."""
        self._ready.labels(self._version).set(float(ready))

    def request_finished(self, status: int, path: str, seconds: float) -> None:
        """Count one answer."""
        pair = self._finished.get((status, path))
        if pair is None:
            pair = (self._requests.labels(str(status), self._version, path), self._duration.labels(self._version, path))
            self._finished[status, path] = pair
        pair[0].inc()
        pair[1].observe(seconds)

    def predicted(self, chosen: int, is_leaf: bool, inference_s: float) -> None:
        """Count one prediction of class number `chosen`."""
        self._by_class[chosen].inc()
        self._inference.observe(inference_s)
        if not is_leaf:
            self._ood.inc()

    def log_rows(self, result: str, rows: int) -> None:
        """Rows of the prediction log that were `written` or `dropped`."""
        self._log_rows.labels(result, self._version).inc(rows)

    def log_problem(self, kind: str) -> None:
        """A failure of the log: `store`, `spool`, `spool_full`, `encode`."""
        self._log_problems.labels(kind, self._version).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
