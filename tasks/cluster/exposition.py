"""Counters of tracks from Prometheus text (exposition format 0.0.4): a gateway's /metrics, or a replica's. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from configs.errors import ExternalError
from ml.version import Version, is_version
from tasks.cluster import Track, TrackCounters

_PREDICT = "/predict"
_UNKNOWN = datetime.fromtimestamp(0, UTC)  # of counters that do not say when they began
ReadT = TypeVar("ReadT")


@dataclass(slots=True)
class _Reading:
    """What was read of one version so far."""

    since: datetime = _UNKNOWN
    requests: int = 0
    errors: int = 0
    latency: Counter[float] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    ood: int = 0
    shadow: Counter[str] = field(default_factory=Counter)
    shadow_latency: Counter[float] = field(default_factory=Counter)
    shadow_classes: Counter[str] = field(default_factory=Counter)
    shadow_ood: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    differ: Counter[str] = field(default_factory=Counter)

    def asked(self, status: str, count: int) -> None:
        """A status other than a number says why there was none."""
        self.requests += count
        self.errors += count if not status.isdecimal() or int(status) >= 500 else 0

    def counters(self, version: Version) -> TrackCounters:
        return TrackCounters(
            version=version,
            since=self.since,
            requests=self.requests,
            errors=self.errors,
            latency_ms=dict(sorted(self.latency.items())),
            shadow_pairs=self.shadow["pairs"],
            shadow_differ=self.shadow["differ"],
            shadow_errors=self.shadow["errors"],
            shadow_latency_ms=dict(sorted(self.shadow_latency.items())),
            predictions=self.classes.total(),
            ood=self.ood,
            classes=dict(self.classes),
            shadow_ood=self.shadow_ood,
            shadow_classes=dict(self.shadow_classes),
            shadow_by_class={told: (pairs, self.differ[told]) for told, pairs in self.pairs.items()},
        )


def read_gateway(text: str) -> dict[Track, TrackCounters]:
    """The counters of every track in a gateway's /metrics: those of its latest version, where it still has others.

    Raises:
        ExternalError: the text is no exposition, or lacks a label.
    """
    found = _read("gateway", lambda: _gateway(text))
    ordered = sorted(found.items(), key=lambda item: item[1].since)
    return {track: reading.counters(version) for (track, version), reading in ordered}


def read_replica(text: str) -> TrackCounters:
    """The counters of the one version in a replica's /metrics. It cannot tell pinned requests from a user's,
    and knows nothing of requests that never reached it.

    Raises:
        ExternalError: the text is no exposition, lacks a label, or names no version.
    """
    version, reading = _read("replica", lambda: _replica(text))
    return reading.counters(version)


def _gateway(text: str) -> dict[tuple[Track, Version], _Reading]:
    found: dict[tuple[Track, Version], _Reading] = defaultdict(_Reading)
    for sample in _samples(text):
        note = _GATEWAY.get(sample.name)
        if note is not None and is_version(sample.labels["version"]):  # "none": of a track without a version
            key = Track(sample.labels["track"]), Version.parse(sample.labels["version"])
            note(found[key], sample.labels, sample.value)
    return found


def _replica(text: str) -> tuple[Version, _Reading]:
    reading, versions = _Reading(), set()
    for sample in _samples(text):
        if (named := sample.labels.get("version")) is not None and is_version(named):
            versions.add(Version.parse(named))
        if (note := _REPLICA.get(sample.name)) and sample.labels.get("path", _PREDICT) == _PREDICT:
            note(reading, sample.labels, sample.value)
    [version] = versions
    return version, reading


def _samples(text: str) -> Iterable[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _read(what: str, parse: Callable[[], ReadT]) -> ReadT:
    try:
        return parse()
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ExternalError(f"the metrics of a {what} cannot be read: {error!r}. Nothing was counted.") from error


Labels = Mapping[str, str]


def _since(reading: _Reading, _labels: Labels, value: float) -> None:
    reading.since = datetime.fromtimestamp(value, UTC)


def _requests(reading: _Reading, labels: Labels, value: float) -> None:
    reading.asked(labels["status"], int(value))


def _latency(reading: _Reading, labels: Labels, value: float) -> None:
    reading.latency[_bound_ms(labels)] += int(value)


def _classes(reading: _Reading, labels: Labels, value: float) -> None:
    reading.classes[labels["class"]] += int(value)


def _ood(reading: _Reading, _labels: Labels, value: float) -> None:
    reading.ood += int(value)


def _shadow(reading: _Reading, labels: Labels, value: float) -> None:
    reading.shadow[labels["outcome"]] += int(value)


def _shadow_latency(reading: _Reading, labels: Labels, value: float) -> None:
    reading.shadow_latency[_bound_ms(labels)] += int(value)


def _shadow_classes(reading: _Reading, labels: Labels, value: float) -> None:
    reading.shadow_classes[labels["class"]] += int(value)


def _shadow_ood(reading: _Reading, _labels: Labels, value: float) -> None:
    reading.shadow_ood += int(value)


def _shadow_by_class(reading: _Reading, labels: Labels, value: float) -> None:
    counts = reading.pairs if labels["outcome"] == "pairs" else reading.differ
    counts[labels["class"]] += int(value)


def _bound_ms(labels: Labels) -> float:
    """Rounded, so that 0.0025 s and 2.5 ms are one bound."""
    return round(float(labels["le"]) * 1e3, 6)


Note = Callable[[_Reading, Labels, float], None]
_GATEWAY: dict[str, Note] = {
    "gateway_counting_since_seconds": _since,
    "gateway_requests_total": _requests,
    "gateway_request_duration_seconds_bucket": _latency,
    "gateway_predictions_total": _classes,
    "gateway_ood_total": _ood,
    "gateway_shadow_total": _shadow,
    "gateway_shadow_duration_seconds_bucket": _shadow_latency,
    "gateway_shadow_predictions_total": _shadow_classes,
    "gateway_shadow_ood_total": _shadow_ood,
    "gateway_shadow_class_total": _shadow_by_class,
}
_REPLICA: dict[str, Note] = {
    "process_start_time_seconds": _since,
    "http_requests_total": _requests,
    "http_request_duration_seconds_bucket": _latency,
    "model_predictions_total": _classes,
    "model_ood_total": _ood,
}
