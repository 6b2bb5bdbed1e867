"""The local node with the real service, an object store and signed versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from configs.errors import ExternalError
from ml.objects import ObjectStore
from ml.version import Version
from tasks.cluster import Track, TrackCounters
from tasks.cluster.exposition import read_replica
from tasks.cluster.meter import minus
from tests.support.node import NodeProcess, Traffic, eventually, running_node
from tests.support.registry import Shelf
from tests.support.replica import photo
from tests.support.stack import start_object_store, stop_parts
from tests.support.tiny_model import write_tiny_model

V1, V2, TAMPERED = Version(1, 0, 0), Version(1, 1, 0), Version(1, 2, 0)
STABLE, CANARY = Track.stable, Track.canary


@dataclass(frozen=True)
class Served:
    """A node and what it can deploy: v1.0.0, v1.1.0 (classes under wrong names), v1.2.0 (changed in the store)."""

    node: NodeProcess
    shelf: Shelf


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any) -> Iterator[Served]:
    tmp = tmp_path_factory.mktemp("served")
    store = start_object_store(tmp / "store")
    shelf = Shelf.make(ObjectStore(store), store.models_bucket, tmp)
    for version, permute in ((V1, None), (V2, (1, 2, 3, 0)), (TAMPERED, None)):
        folder = tmp / str(version)
        write_tiny_model(folder, permute=permute)
        replace(shelf, folder=folder).publish("release", version)
    shelf.tamper(f"{TAMPERED}/model.onnx", b"another model")
    areas = {
        "object_store": store.model_dump(mode="json", exclude_none=True)
        | {"secret_access_key": store.secret_access_key.get_secret_value()},
        "registry": {"trusted_keys": [str(key) for key in shelf.trusted]},
    }
    try:
        with running_node(tmp / "home", command=(), areas=areas) as node:
            yield Served(node, shelf)
    finally:
        stop_parts(tmp / "store")


def test_real_replicas_go_from_canary_to_promotion_to_rollback_without_a_failed_request(served):
    node, cluster = served.node, served.node.client
    cluster.deploy(STABLE, V1, 1)
    cluster.wait_ready(STABLE, 60)
    with Traffic(node.gateway_url, 20, photo()) as traffic:
        cluster.deploy(CANARY, V2, 1)
        cluster.wait_ready(CANARY, 60)
        cluster.set_weights({STABLE: 1.0}, mirror={CANARY: 1.0}, lease_s=30)
        eventually(lambda: cluster.counters()[CANARY].shadow_pairs >= 20, 20)
        cluster.set_weights({STABLE: 0.5, CANARY: 0.5}, lease_s=30)
        traffic.wait_for(20)
        cluster.deploy(STABLE, V2, 1)
        cluster.wait_ready(STABLE, 60)
        cluster.set_weights({STABLE: 1.0})
        cluster.remove(CANARY)
        traffic.wait_for(10)
        cluster.rollback(V1, 1)
        traffic.wait_for(10)
    assert traffic.failures == {}
    assert set(traffic.versions) == {"v1.0.0", "v1.1.0"}
    assert node.predict(photo()).json()["model_version"] == "v1.0.0"


def test_a_model_that_was_changed_in_the_store_is_refused_and_the_reason_is_told(served):
    cluster = served.node.client
    cluster.deploy(STABLE, V1, 1)
    cluster.wait_ready(STABLE, 60)
    cluster.deploy(CANARY, TAMPERED, 1)
    with pytest.raises(ExternalError, match=r"(?s)gave up early.*exited with code 4.*model\.onnx") as caught:
        cluster.wait_ready(CANARY, 90)
    assert not caught.value.retryable
    assert served.node.predict(photo()).status_code == 200
    cluster.remove(CANARY)


def test_the_gateway_counts_the_classes_that_the_replica_names(served):
    node = served.node
    node.client.rollback(V1, 1)
    eventually(lambda: len(node.client.status().replicas) == 1, 20)
    [replica] = node.client.status().replicas

    def counted() -> tuple[TrackCounters, TrackCounters]:
        text = node.users.get(f"http://{replica.address}/metrics").text
        return node.client.counters()[STABLE], read_replica(text)

    before = counted()
    answers = [node.predict(photo(seed)).json() for seed in range(8)]
    gateway, itself = (minus(after, earlier) for after, earlier in zip(counted(), before, strict=True))
    named = Counter(answer["class"] for answer in answers)
    assert {name: count for name, count in gateway.classes.items() if count} == named
    assert {name: count for name, count in itself.classes.items() if count} == named
    strange = sum(not answer["is_leaf"] for answer in answers)
    assert (gateway.predictions, gateway.ood, itself.predictions, itself.ood) == (8, strange, 8, strange)
    assert (gateway.requests, itself.requests, gateway.errors, itself.errors) == (8, 8, 0, 0)


def test_questions_about_the_model_are_answered_by_stable(served):
    node = served.node
    node.client.deploy(STABLE, V1, 1)
    node.client.wait_ready(STABLE, 60)
    assert node.users.get(f"{node.gateway_url}/version").json()["version"] == "v1.0.0"
    assert node.users.get(f"{node.gateway_url}/metadata").status_code == 200
