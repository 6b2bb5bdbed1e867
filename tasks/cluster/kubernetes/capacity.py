"""How many more replicas the nodes have room for. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal

from tasks.cluster.kubernetes.client import Object


def slots(nodes: Iterable[Object], pods: Iterable[Object], requests: Mapping[str, str], own: Collection[str]) -> int:
    """How many replicas with these requests fit on the nodes beside the pods of others; `own` are uids of pods that
    count as if they were not there.

    What the scheduler also weighs (affinity, taints that are tolerated, quotas) is left out: an estimate.
    """
    used: dict[str, list[Object]] = defaultdict(list)
    for pod in pods:
        node = pod["spec"].get("nodeName")
        if node and pod["metadata"]["uid"] not in own and pod["status"].get("phase") not in ("Succeeded", "Failed"):
            used[node].append(pod)
    return sum(_on_node(node, used[node["metadata"]["name"]], requests) for node in nodes if _takes_pods(node))


def _takes_pods(node: Object) -> bool:
    conditions = node["status"].get("conditions") or ()
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    barred = any(taint["effect"] != "PreferNoSchedule" for taint in node["spec"].get("taints") or ())
    return ready and not barred and not node["spec"].get("unschedulable")


def _on_node(node: Object, pods: list[Object], requests: Mapping[str, str]) -> int:
    offered = node["status"]["allocatable"]
    fits = [quantity(offered.get("pods", "0")) - len(pods)]
    for resource, asked in requests.items():
        if (each := quantity(asked)) > 0:
            taken = sum((_requested(pod, resource) for pod in pods), Decimal(0))
            fits.append((quantity(offered.get(resource, "0")) - taken) // each)
    return max(0, int(min(fits)))


def _requested(pod: Object, resource: str) -> Decimal:
    containers = pod["spec"]["containers"]
    asked = ((c.get("resources") or {}).get("requests") or {} for c in containers)
    return sum((quantity(requests.get(resource, "0")) for requests in asked), Decimal(0))


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity as a number: 250m is 0.25, 1Gi is 1073741824."""
    from kubernetes.utils.quantity import parse_quantity

    return Decimal(parse_quantity(text))  # type: ignore[no-untyped-call]
