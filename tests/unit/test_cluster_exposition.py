"""The counters in the text that the gateway and the replicas really write."""

from __future__ import annotations

import pytest

from configs.errors import ExternalError
from ml.serving.metrics import Metrics
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.exposition import read_gateway, read_replica
from tasks.cluster.node import metrics
from tasks.cluster.node.answers import Prediction
from tasks.cluster.node.counters import Counters
from tasks.cluster.node.state import utcnow

AWKWARD = 'Apple "scab"\\n\n{late}, 100 %'


def exposed(*ledger: Counters) -> str:
    """What the gateway would write of these."""
    return "\n".join(metrics.tallies(ledger)) + "\n"


@pytest.fixture
def canary() -> Counters:
    kept = Counters(Track.canary, "v1.1.0", utcnow())
    for status, took_ms in ((200, 2.5), (200, 30.0), (200, 400.0), (500, 1.0), (422, 1.0)):
        kept.answered(status, took_ms)
    kept.failed("broken")
    for said in (Prediction("rust", True), Prediction(AWKWARD, False), Prediction("rust", True)):
        kept.predicted(said)
        kept.compared(Prediction("rust", True), said)
        kept.shadow_latency.add(15.0)
    kept.shadow_errors += 1
    return kept


def test_the_gateways_text_holds_all_that_was_counted(canary):
    [(track, read)] = read_gateway(exposed(canary)).items()
    assert (track, read.version, read.since) == (Track.canary, Version(1, 1, 0), canary.since)
    assert (read.requests, read.errors, read.predictions, read.ood) == (6, 2, 3, 1)
    assert read.latency_ms == canary.latency.cumulative()
    assert read.classes == {"rust": 2, AWKWARD: 1}
    assert (read.shadow_pairs, read.shadow_differ, read.shadow_errors) == (3, 1, 1)
    assert read.shadow_latency_ms == canary.shadow_latency.cumulative()
    assert (read.shadow_classes, read.shadow_ood) == ({"rust": 2, AWKWARD: 1}, 1)
    assert read.shadow_by_class == {"rust": (3, 1)}


def test_of_two_versions_on_a_track_the_latest_is_read(canary):
    newer = Counters(Track.canary, "v1.0.9", utcnow())
    newer.answered(200, 1.0)
    for ledger in ((canary, newer), (newer, canary)):
        read = read_gateway(exposed(*ledger))[Track.canary]
        assert (read.version, read.requests) == (Version(1, 0, 9), 1)


def test_a_track_without_a_version_is_left_out(canary):
    lost = Counters(Track.baseline, "none", utcnow())
    lost.failed("unavailable")
    assert set(read_gateway(exposed(canary, lost))) == {Track.canary}


def test_a_replicas_text_counts_predictions_and_nothing_else():
    replica = Metrics("v1.3.0")
    replica.model_loaded(["rust", AWKWARD], accuracy=0.9)
    for chosen, is_leaf, took_s in ((0, True, 0.004), (1, False, 0.3)):
        replica.predicted(chosen, is_leaf, took_s)
        replica.request_finished(200, "/predict", took_s)
    replica.request_finished(500, "/predict", 0.002)
    replica.request_finished(500, "/metrics", 0.002)
    read = read_replica(replica.render().decode())
    assert (read.version, read.requests, read.errors) == (Version(1, 3, 0), 3, 1)
    assert (read.predictions, read.ood, read.classes) == (2, 1, {"rust": 1, AWKWARD: 1})
    assert [read.latency_ms[bound] for bound in (2.5, 5.0, 250.0, 500.0, float("inf"))] == [1, 2, 2, 3, 3]
    assert read.since < utcnow()


def test_a_replica_that_was_asked_nothing_yet_has_counted_nothing():
    replica = Metrics("v1.3.0")
    replica.set_ready(True)
    read = read_replica(replica.render().decode())
    assert (read.version, read.requests, read.classes) == (Version(1, 3, 0), 0, {})


@pytest.mark.parametrize(
    "text",
    [
        "not { an exposition",
        "gateway_requests_total 3\n",
        'gateway_ood_total{track="canary",version="v1.0.0"} NaN\n',
        'gateway_ood_total{track="lost",version="v1.0.0"} 1\n',
    ],
    ids=["garbage", "no labels", "not a number", "no such track"],
)
def test_text_that_cannot_be_read_counts_nothing(text):
    with pytest.raises(ExternalError):
        read_gateway(text)


def test_a_replica_without_a_version_cannot_be_read():
    with pytest.raises(ExternalError):
        read_replica("process_start_time_seconds 1.7e9\n")
