"""The local stack with a real Kubernetes as its cluster: pods of the real serving image, and flows that may do there
what their own account may, and no more."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.cluster.kubernetes.client import NODE, Kind, Kube
from tests.support.images import loaded_serving_image
from tests.support.kube import KubeNamespace, running_namespace
from tests.support.local_stack import LocalStack, start_local_stack
from tests.support.node import eventually

ROLES = "rbac.authorization.k8s.io/v1"
OUTSIDE = (
    Kind(ROLES, "ClusterRole", "clusterroles", namespaced=False),
    Kind(ROLES, "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
)


@dataclass
class ClusterStack(LocalStack):
    """A stack whose replicas are pods of `namespace`."""

    namespace: KubeNamespace


def reachable_address(kube: Kube) -> str:
    """An address of this machine that pods reach: KHET_TEST_HOST_ADDRESS, or the node's own where it is this machine;
    else the test is skipped. A cluster that was just started has no node yet."""
    eventually(lambda: any(node["status"].get("addresses") for node in kube.find(NODE)), 60, "a node with an address")
    addresses = [os.environ.get("KHET_TEST_HOST_ADDRESS", "")]
    for node in kube.find(NODE):
        addresses += [entry["address"] for entry in node["status"]["addresses"] if entry["type"] == "InternalIP"]
    for address in filter(None, addresses):
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.bind((address, 0))
            return address
    pytest.skip("no address of this machine is known that pods reach: set KHET_TEST_HOST_ADDRESS")


@contextlib.contextmanager
def running_cluster_stack(home: Path, **variables: str) -> Iterator[ClusterStack]:
    """`khet up` and `khet cluster init` in a namespace of a real cluster, both gone afterwards."""
    home.mkdir(parents=True)
    with running_namespace(home) as namespace:
        listen = {"KHET_CLUSTER__BACKEND": "kubernetes", "KHET_STACK__LISTEN": reachable_address(namespace.admin)}
        started = start_local_stack(home / "khet", **listen, **variables)
        stack = ClusterStack(started.home, started.environment, started.faults, namespace)
        try:
            stack.khet("cluster", "init", *_there(namespace), "--image", loaded_serving_image())
            stack.environment["KHET_CLUSTER__KUBERNETES__KUBECONFIG"] = str(namespace.account("khet-pipelines"))
            yield stack
        finally:
            stack.khet("down", code=None)
            for kind in OUTSIDE:
                namespace.admin.delete(kind, f"khet-pipelines-capacity-{namespace.name}")


def _there(namespace: KubeNamespace) -> tuple[str, ...]:
    return ("--kubeconfig", str(namespace.kubeconfig), "--namespace", namespace.name)
