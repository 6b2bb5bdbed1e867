"""What the flows may do in the cluster: one list, which the Role of the pipelines grants and `khet doctor` asks for.

A test compares it with every call of the adapter and with deployments/kubernetes/base/roles.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from tasks.cluster.kubernetes.client import ROUTE


@dataclass(frozen=True, slots=True, order=True)
class Permission:
    """One verb on one resource. `everywhere`: in the whole cluster, not only in the service's namespace."""

    group: str
    resource: str
    verb: str
    everywhere: bool = False

    def __str__(self) -> str:
        name = f"{self.resource}.{self.group}" if self.group else self.resource
        return f"{self.verb} {name}{' in all namespaces' if self.everywhere else ''}"

    def attributes(self, namespace: str) -> dict[str, Any]:
        """The resourceAttributes of a SubjectAccessReview."""
        resource, _, subresource = self.resource.partition("/")
        asked = {"group": self.group, "resource": resource, "subresource": subresource, "verb": self.verb}
        return {**asked, "namespace": "" if self.everywhere else namespace}


def _all(group: str, resource: str, verbs: str, *, everywhere: bool = False) -> Iterable[Permission]:
    return (Permission(group, resource, verb, everywhere) for verb in verbs.split())


PERMISSIONS: Final = (
    *_all("apps", "deployments", "create delete get list patch watch"),
    *_all("apps", "deployments/scale", "patch"),
    *_all("", "services", "create get patch"),
    *_all("", "pods", "list patch"),
    *_all("", "pods/log", "get"),
    *_all("", "pods/proxy", "get"),
    *_all("", "events", "create"),
    *_all("coordination.k8s.io", "leases", "create get update"),
    *_all("gateway.networking.k8s.io", "httproutes", "create patch"),
    *_all("autoscaling", "horizontalpodautoscalers", "list"),
    # Whether there is room for a canary depends on the nodes and on all that runs there.
    *_all("", "nodes", "list", everywhere=True),
    *_all("", "pods", "list", everywhere=True),
)


def needed(*, gateway: bool) -> tuple[Permission, ...]:
    """Those that the flows use with these settings: without a gateway nobody writes routes."""
    routes = ROUTE.api_version.partition("/")[0]
    return tuple(one for one in PERMISSIONS if gateway or one.group != routes)
