"""A training pod of a real cluster that is taken away: the next one goes on in an empty folder."""

from __future__ import annotations

import copy
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from configs.areas import ObjectStoreSettings
from configs.settings import PROJECT_ROOT
from deployments.kubernetes.checks.build import ROOT, build
from ml.checkpoint_store import TrainingStore, fingerprint
from ml.dataset import Dataset
from ml.objects import ObjectStore
from ml.train import load_config
from tasks.cluster.kubernetes.client import POD, Kind
from tasks.datasets.store import DatasetStore
from tests.support.cluster_stack import reachable_address
from tests.support.images import loaded_serving_image
from tests.support.kube import ACCOUNT, CONFIG_MAP, Forwarder, KubeNamespace, running_namespace, tools
from tests.support.local_stack import wait_until
from tests.support.stack import object_store
from tests.support.training import CONFIGS, dataset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
JOB, SECRET = Kind("batch/v1", "Job", "jobs"), Kind("v1", "Secret", "secrets")
EPOCHS = 60
OVERRIDES = ("tracking=false", "accelerator=cpu", "threads=1", f"budget={{epochs: {EPOCHS}}}")
PLACES = {"packages": Path(sysconfig.get_path("purelib")), "code": PROJECT_ROOT}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectStoreSettings]:
    """A store that has the dataset `tiny`."""
    with object_store(tmp_path / "s3") as found:
        DatasetStore(ObjectStore(found), found.data_bucket, 8).publish(Dataset.open(dataset()))
        yield found


@pytest.fixture
def namespace(tmp_path: Path, store: ObjectStoreSettings) -> Iterator[KubeNamespace]:
    """What an environment has for training: an account, settings, credentials; the store's door on the node's side."""
    if tools() is None or sys.version_info[:2] != (3, 11):
        pytest.skip("the trainer's packages are mounted from this machine: its node and a Python 3.11 are needed")
    (tmp_path / "namespace").mkdir()
    with running_namespace(tmp_path / "namespace") as found:
        address = urlsplit(str(store.endpoint_url))
        door = Forwarder(str(address.hostname), int(address.port or 0), reachable_address(found.admin))
        settings = {"object_store": {"endpoint_url": f"http://{door.address}"}, "training": {"checkpoint_every_s": 0}}
        assert store.access_key_id is not None and store.secret_access_key is not None
        keys = {
            "object-store-access-key": store.access_key_id,
            "object-store-secret-key": store.secret_access_key.get_secret_value(),
        }
        found.admin.apply(ACCOUNT, "khet-training", {})
        found.admin.apply(CONFIG_MAP, "khet-pipelines", {"data": {"settings.yaml": yaml.safe_dump(settings)}})
        found.admin.apply(SECRET, "khet-pipelines", {"stringData": keys})
        yield found
        door.close()


def job() -> dict[str, Any]:
    """The Job of deployments/kubernetes/training/torchrun as one pod without a GPU.

    Its image is the serving one: the packages that this lacks are those of this Python, mounted from the node.
    """
    shipped = next(one for one in build(ROOT / "training" / "torchrun") if one["kind"] == "Job")
    template = copy.deepcopy(shipped["spec"]["template"])
    pod = template["spec"]
    del pod["nodeSelector"], pod["tolerations"], pod["subdomain"]
    [fetching], [training] = pod["initContainers"], pod["containers"]
    assert fetching["command"][:3] == ["khet", "data", "fetch"]
    fetching["command"] = ["python", "-c", "from flows.cli import main; main()", "data", "fetch", "tiny"]
    sets = [part for value in OVERRIDES for part in ("--set", value)]
    given = ["--config", "configs/training/smoke.yaml", "--data", "tiny", "--store", "training/pod"]
    training["command"] = ["python", "-m", "ml.train", *given, "--out", "/var/lib/khet-guard/training", *sets]
    training["env"] = [one for one in training["env"] if one["name"] != "JOB_COMPLETION_INDEX"]
    for one in (fetching, training):
        one |= {"image": loaded_serving_image(), "imagePullPolicy": "Never", "workingDir": "/mnt/code"}
        one["resources"] = {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
        paths = {"KHET_HOME": "/var/lib/khet-guard", "KHET_PROFILE": "local", "PYTHONPATH": "/mnt/packages:/mnt/code"}
        one["env"] += [{"name": name, "value": value} for name, value in paths.items()]
        one["volumeMounts"] += [{"name": name, "mountPath": f"/mnt/{name}", "readOnly": True} for name in PLACES]
    pod["volumes"] += [{"name": name, "hostPath": {"path": str(path)}} for name, path in PLACES.items()]
    return {"spec": {"backoffLimit": 4, "template": template}}


def test_a_pod_that_is_taken_away_is_followed_by_one_that_goes_on(
    namespace: KubeNamespace, store: ObjectStoreSettings
) -> None:
    run = fingerprint(load_config(CONFIGS / "smoke.yaml", OVERRIDES), Dataset.open(dataset()).manifest_hash)
    kept = TrainingStore(ObjectStore(store), store.models_bucket, "training/pod", run)
    kube = namespace.admin

    def log() -> str:
        return "\n".join(kube.text(POD, pod["metadata"]["name"], "log") for pod in kube.find(POD))

    kube.apply(JOB, "khet-train", job())
    wait_until("checkpoints are stored", lambda: (found := kept.newest()) and found.epoch >= 3, 240, 0.3)
    [first] = kube.find(POD)
    kube.delete(POD, first["metadata"]["name"])
    found = wait_until("the next pod has finished", kept.finished, 300, 0.5)
    [second] = [pod for pod in kube.find(POD) if pod["metadata"]["uid"] != first["metadata"]["uid"]]
    assert second["metadata"]["name"] != first["metadata"]["name"]
    assert found.result.resumed_from_step is not None and found.result.resumed_from_step > 0, log()
    assert [epoch.epoch for epoch in found.result.history] == list(range(EPOCHS))
