"""The gateway's numbers as Prometheus text (exposition format 0.0.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from tasks.cluster import Track
from tasks.cluster.node.counters import Counters, Histogram
from tasks.cluster.node.fleet import Fleet
from tasks.cluster.node.gateway import Gateway
from tasks.cluster.node.routing import Router

_SHADOW_OUTCOMES = ("pairs", "differ", "errors", "dropped")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def render(ledger: Iterable[Counters], fleet: Fleet, router: Router, gateway: Gateway) -> str:
    """One scrape."""
    lines = [*tallies(ledger), *_tracks(fleet, router), *_gateway(gateway)]
    return "\n".join(lines) + "\n"


def tallies(ledger: Iterable[Counters]) -> Iterable[str]:
    """The lines of what was counted, by track and version; `tasks.cluster.exposition` reads them."""
    yield from _requests(ledger)
    yield from _predictions(ledger)
    yield from _shadow(ledger)


def _requests(ledger: Iterable[Counters]) -> Iterable[str]:
    yield "# HELP gateway_counting_since_seconds When counting began, in Unix time: a reset moves it."
    yield "# TYPE gateway_counting_since_seconds gauge"
    for kept in ledger:
        yield f"gateway_counting_since_seconds{{{_labels(kept)}}} {kept.since.timestamp():.6f}"
    yield "# HELP gateway_requests_total Attempts by track, version and status."
    yield "# TYPE gateway_requests_total counter"
    for kept in ledger:
        for status, count in kept.statuses.items():
            yield f'gateway_requests_total{{{_labels(kept)},status="{status}"}} {count}'
    yield "# HELP gateway_request_duration_seconds Time a replica took, as the gateway saw it."
    yield "# TYPE gateway_request_duration_seconds histogram"
    for kept in ledger:
        yield from _histogram("gateway_request_duration_seconds", _labels(kept), kept.latency)


def _predictions(ledger: Iterable[Counters]) -> Iterable[str]:
    yield from _by_class("gateway_predictions_total", "Answers to users by class.", ledger, lambda kept: kept.classes)
    yield "# HELP gateway_ood_total Answers to users about photos that look like no leaf."
    yield "# TYPE gateway_ood_total counter"
    for kept in ledger:
        yield f"gateway_ood_total{{{_labels(kept)}}} {kept.ood}"


def _by_class(
    name: str, text: str, ledger: Iterable[Counters], counts: Callable[[Counters], Mapping[str, int]]
) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} counter"
    for kept in ledger:
        for named, count in counts(kept).items():
            yield f'{name}{{{_labels(kept)},class="{_escaped(named)}"}} {count}'


def _shadow(ledger: Iterable[Counters]) -> Iterable[str]:
    yield "# HELP gateway_shadow_total Mirrored requests by what came of them; differ is part of pairs."
    yield "# TYPE gateway_shadow_total counter"
    for kept in ledger:
        for outcome in _SHADOW_OUTCOMES:
            yield f'gateway_shadow_total{{{_labels(kept)},outcome="{outcome}"}} {getattr(kept, f"shadow_{outcome}")}'
    yield "# HELP gateway_shadow_duration_seconds Time a replica took for a mirrored request."
    yield "# TYPE gateway_shadow_duration_seconds histogram"
    for kept in ledger:
        yield from _histogram("gateway_shadow_duration_seconds", _labels(kept), kept.shadow_latency)
    yield from _shadow_predictions(ledger)


def _shadow_predictions(ledger: Iterable[Counters]) -> Iterable[str]:
    text = "Answers to mirrored requests by class."
    yield from _by_class("gateway_shadow_predictions_total", text, ledger, lambda kept: kept.shadow_classes)
    yield "# HELP gateway_shadow_ood_total Answers to mirrored requests about photos that look like no leaf."
    yield "# TYPE gateway_shadow_ood_total counter"
    for kept in ledger:
        yield f"gateway_shadow_ood_total{{{_labels(kept)}}} {kept.shadow_ood}"
    yield "# HELP gateway_shadow_class_total Compared pairs by the class the user was told; differ is part of pairs."
    yield "# TYPE gateway_shadow_class_total counter"
    for kept in ledger:
        for outcome, counts in (("pairs", kept.pairs_by_class), ("differ", kept.differ_by_class)):
            for named, count in counts.items():
                labels = f'{_labels(kept)},class="{_escaped(named)}",outcome="{outcome}"'
                yield f"gateway_shadow_class_total{{{labels}}} {count}"


def _tracks(fleet: Fleet, router: Router) -> Iterable[str]:
    ready = {track.value: float(fleet.ready_count(track)) for track in Track}
    weights = {track.value: router.weights.get(track, 0.0) for track in Track}
    mirror = {track.value: router.mirror.get(track, 0.0) for track in Track}
    yield from _gauge("gateway_ready_replicas", "Replicas that take requests.", ready)
    yield from _gauge("gateway_track_weight", "Share of requests a track answers.", weights)
    yield from _gauge("gateway_track_mirror", "Share of requests copied to a track.", mirror)


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} gauge"
    for track, value in values.items():
        yield f'{name}{{track="{track}"}} {value:g}'


def _gateway(gateway: Gateway) -> Iterable[str]:
    yield "# HELP gateway_in_flight Predictions under way."
    yield "# TYPE gateway_in_flight gauge"
    yield f"gateway_in_flight {gateway.in_flight}"
    yield "# HELP gateway_retries_total Requests sent to a second replica."
    yield "# TYPE gateway_retries_total counter"
    yield f"gateway_retries_total {gateway.retries}"
    yield "# HELP gateway_rejected_total Requests answered 503 by the gateway itself."
    yield "# TYPE gateway_rejected_total counter"
    for reason, count in gateway.rejected.items():
        yield f'gateway_rejected_total{{reason="{reason}"}} {count}'


def _histogram(name: str, labels: str, histogram: Histogram) -> Iterable[str]:
    total = 0
    for bound_ms, total in histogram.cumulative().items():
        bound = "+Inf" if bound_ms == float("inf") else f"{bound_ms / 1e3:g}"
        yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
    yield f"{name}_sum{{{labels}}} {histogram.sum_ms / 1e3:.6f}"
    yield f"{name}_count{{{labels}}} {total}"


def _labels(kept: Counters) -> str:
    return f'track="{kept.track}",version="{kept.version}"'


def _escaped(value: str) -> str:
    """A label's value as the exposition format wants it: classes are named by models, not by us."""
    return value.translate(_ESCAPES)
