"""The doctor on a real Kubernetes where something is wrong: it says what, in time, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from configs.areas import ObjectStoreSettings
from configs.settings import Settings
from tasks.cluster.kubernetes import probe
from tasks.cluster.kubernetes.client import POD
from tasks.cluster.kubernetes.inspection import SECRET, Finding, inspect
from tasks.cluster.kubernetes.objects import NAME
from tests.support.kube import CONFIG_MAP, KubeNamespace, running_namespace
from tests.support.node import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LIMIT_S = 30
VALUE = "c3VwZXItc2VjcmV0"


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeNamespace]:
    with running_namespace(tmp_path_factory.mktemp("doctor"), settings={"config_map": "ml-service"}) as made:
        yield made


def look(namespace: KubeNamespace, **changes: Any) -> dict[str, Finding]:
    """The findings by name, in time."""
    store = ObjectStoreSettings(access_key_id="KHET", secret_access_key=SecretStr("key"))
    began = time.monotonic()
    found = inspect(Settings(cluster=namespace.cluster_settings(**changes), object_store=store))
    assert time.monotonic() - began < LIMIT_S
    return {finding.name: finding for finding in found}


def probes(namespace: KubeNamespace) -> list[str]:
    """Probes that are not on their way out."""
    found = namespace.admin.find(POD, f"{NAME}={probe.NAME}")
    return [pod["metadata"]["name"] for pod in found if "deletionTimestamp" not in pod["metadata"]]


def test_what_pods_read_and_do_not_find_is_named(namespace):
    found = look(namespace, service_account="nobody", object_store_secret="half")
    assert found["replica settings"].detail.startswith("there is no ConfigMap ml-service")
    assert "khet cluster init" in found["replica settings"].detail
    assert found["replica secret"].detail.startswith("there is no Secret half (object-store-access-key")
    assert "no ServiceAccount nobody" in found["service account"].detail

    namespace.admin.apply(SECRET, "half", {"data": {"object-store-access-key": VALUE}})
    namespace.admin.apply(CONFIG_MAP, "ml-service", {"data": {"settings.yaml": "registry: {trust: []}"}})
    found = look(namespace, object_store_secret="half")
    assert found["replica secret"].detail == "Secret half has no object-store-secret-key"
    assert "settings.yaml: registry: trust: unknown key" in found["replica settings"].detail
    assert VALUE not in str(found)

    trusting = "registry: {trusted_keys: [/etc/khet/release.pub]}"
    namespace.admin.apply(CONFIG_MAP, "ml-service", {"data": {"settings.yaml": trusting}})
    assert "has no release.pub" in look(namespace)["replica settings"].detail


def test_an_image_that_no_node_has_is_told_in_the_kubelet_s_words(namespace):
    found = look(namespace, image="docker.io/library/khet-no-such-image:1")
    assert (found["image"].state, found["pod"].state) == ("failed", "skipped")
    assert "khet-no-such-image:1: ErrImageNeverPull" in found["image"].detail
    eventually(lambda: not probes(namespace), 10)


def test_an_image_that_is_no_serving_image_is_told_apart(namespace):
    found = look(namespace)  # the stub: no python on its PATH
    assert (found["image"].state, found["pod"].state) == ("ok", "failed")
    assert "python" in found["pod"].detail
    eventually(lambda: not probes(namespace), 10)


def test_each_missing_permission_is_named_and_what_may_not_be_looked_at_is_skipped(namespace):
    every = ["create", "delete", "get", "list", "update", "watch"]
    rules = [
        {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": every},
        {"apiGroups": [""], "resources": ["services", "pods", "events"], "verbs": ["get", "list", "patch"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": every},
    ]
    found = look(namespace, kubeconfig=namespace.limited(rules))
    assert found["permissions"].detail == (
        "this account may not patch deployments.apps, patch deployments/scale.apps, create services, get pods/log, "
        "get pods/proxy, create events, list horizontalpodautoscalers.autoscaling, list nodes in all namespaces, "
        "list pods in all namespaces"
    )
    assert "roles.yaml" in found["permissions"].fix
    assert {found[name].state for name in ("namespace", "permissions of pods", "replica secret", "pod")} == {"skipped"}
    assert "the permission to create pods is missing" in found["pod"].detail


def test_an_api_server_that_goes_away_meanwhile_is_said_in_time(namespace):
    def close() -> None:
        eventually(lambda: probes(namespace), 20)
        namespace.door.close()

    closing = threading.Thread(target=close)
    closing.start()
    try:
        found = look(namespace)
    finally:
        closing.join()
        namespace.door.open()
    assert found["pod"].state == "failed"
    assert "did not answer" in found["pod"].detail


def test_what_a_doctor_that_was_killed_left_behind_ends_by_itself(namespace):
    made = probe.manifest(namespace.cluster_settings(), None, None)
    made["spec"] |= {"activeDeadlineSeconds": 1}
    made["spec"]["containers"][0]["command"] = ["sleep", "60"]
    namespace.admin.create(POD, made)
    eventually(lambda: namespace.admin.get(POD, made["metadata"]["name"])["status"].get("phase") == "Failed", 60)
