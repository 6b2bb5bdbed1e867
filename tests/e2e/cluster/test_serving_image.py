"""The real serving image, in pods that the adapter starts."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import KubernetesCluster
from tests.support.images import loaded_serving_image
from tests.support.kube import CONFIG_MAP, KubeNamespace, running_namespace
from tests.support.node import eventually
from tests.support.replica import photo
from tests.support.tiny_model import write_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
VERSION = Version(1, 0, 0)


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[KubeNamespace]:
    """Pods of the real image serve a folder that a ConfigMap holds, so that they need no registry."""
    settings = {
        "image": loaded_serving_image(),
        "command": ["python", "-m", "ml.serve", "--model", "/etc/khet"],
        "config_map": "model",
        "limits": {"cpu": "1", "memory": "512Mi"},
    }
    with running_namespace(tmp_path, settings=settings) as found:
        model = write_tiny_model(tmp_path / "model").parent
        files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in model.iterdir()}
        found.admin.apply(CONFIG_MAP, "model", {"binaryData": files})
        yield found


def test_pods_of_the_real_image_answer_predictions_and_are_counted(namespace: KubeNamespace) -> None:
    cluster: KubernetesCluster = namespace.client
    address = namespace.users_url()

    cluster.deploy(Track.stable, VERSION, 1)
    cluster.wait_ready(Track.stable, 60)
    cluster.set_weights({Track.stable: 1.0})
    eventually(lambda: namespace.answers(photo()), 60, "an answer of the Service")
    before = cluster.counters()[Track.stable].requests
    answer = httpx.post(address + "/predict", content=photo(), headers={"content-type": "image/jpeg"}, timeout=20)

    assert answer.status_code == 200, cluster.logs(Track.stable)
    assert answer.json()["model_version"] == str(VERSION)
    assert cluster.counters()[Track.stable].requests - before == 1
