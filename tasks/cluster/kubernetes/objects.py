"""The objects that serve a version, as plain dicts. Pure: settings in, manifests out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from configs.areas import ClusterSettings, KubernetesSettings
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes.client import Object

TRACK: Final = "khet.guard/track"
TRAFFIC: Final = "khet.guard/traffic"
WEIGHTS: Final = "khet.guard/weights"
MIRROR: Final = "khet.guard/mirror"
STICKY: Final = "khet.guard/sticky"
MEMORY: Final = "khet.guard/memory"
VARIANT_HEADER: Final = "X-Khet-Variant"
NAME: Final = "app.kubernetes.io/name"
VERSION: Final = "app.kubernetes.io/version"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGER: Final = "khet-pipelines"
CONTAINER: Final = "ml-service"
PORT: Final = 8080
USER_ID: Final = 10001
ETC: Final = "/etc/khet"
CACHE: Final = "/var/cache/khet"
# Between SIGTERM and SIGKILL, on top of the wait before it: longer than a replica drains (serving.drain_s).
_DRAIN_S: Final = 30
_SCALE: Final = 1_000_000  # weights of the Gateway API are whole numbers up to this


def name_of(settings: KubernetesSettings, track: Track) -> str:
    """Name of the track's Deployment. Stable has the service's own: it is what people look for."""
    return settings.service if track is Track.stable else f"{settings.service}-{track}"


def service_name(settings: KubernetesSettings, track: Track) -> str:
    """Name of the Service that reaches just this track."""
    return f"{settings.service}-{track}"


def lease_name(settings: KubernetesSettings) -> str:
    """Name of the Lease that traffic away from stable is held by."""
    return f"{settings.service}-rollout"


def selector(settings: KubernetesSettings, track: Track | None = None) -> str:
    """Label selector of everything that serves, or of one track."""
    parts = {NAME: settings.service} | ({TRACK: str(track)} if track else {})
    return ",".join(f"{name}={value}" for name, value in parts.items())


def labels(settings: KubernetesSettings) -> dict[str, str]:
    """What all our objects have in common."""
    return {
        NAME: settings.service,
        "app.kubernetes.io/component": "serving",
        "app.kubernetes.io/part-of": "khet-guard",
        MANAGED_BY: MANAGER,
    }


def deployment(cluster: ClusterSettings, track: Track, version: Version, *, fast: bool = False) -> Object:
    """The Deployment of a track, without the number of replicas: that belongs to whoever scales it.

    One pod at a time is replaced, and none goes before a new one is ready; `fast` starts all new ones at once.
    """
    settings = cluster.kubernetes
    named = labels(settings) | {TRACK: str(track), VERSION: str(version)}
    return {
        "metadata": {"labels": named, "annotations": {"kubernetes.io/change-cause": f"serve {version}"}},
        "spec": {
            "selector": {"matchLabels": {NAME: settings.service, TRACK: str(track)}},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": "100%" if fast else 1, "maxUnavailable": 0},
            },
            "progressDeadlineSeconds": math.ceil(cluster.ready_timeout_s) + 30,
            "revisionHistoryLimit": 10,
            "template": {
                # A new pod of a guest has no traffic until somebody gives it some; one of stable has it at once.
                "metadata": {"labels": named | {TRAFFIC: "on" if track is Track.stable else "off"}},
                "spec": _pod(cluster, track, version),
            },
        },
    }


def _pod(cluster: ClusterSettings, track: Track, version: Version) -> Object:
    settings = cluster.kubernetes
    volumes: list[Object] = [
        {"name": "etc", "configMap": {"name": settings.config_map, "optional": True}},
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
    ]
    optional: Object = {}
    if settings.service_account:
        optional["serviceAccountName"] = settings.service_account
    if settings.pull_secret:
        optional["imagePullSecrets"] = [{"name": settings.pull_secret}]
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.pre_stop_s + _DRAIN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {NAME: settings.service, TRACK: str(track)}},
            }
        ],
        "containers": [_container(cluster, version)],
        "volumes": volumes,
        **optional,
    }


def _container(cluster: ClusterSettings, version: Version) -> Object:
    settings = cluster.kubernetes
    mounts = [
        {"name": "etc", "mountPath": ETC, "readOnly": True},
        {"name": "cache", "mountPath": CACHE},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  (an emptyDir of this pod)
    ]
    return {
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": settings.pull_policy,
        **({"command": list(settings.command)} if settings.command else {}),
        "args": ["--host", "0.0.0.0", "--port", str(PORT), "--name", "$(POD_NAME)"],  # noqa: S104
        "env": _environment(settings, version),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {"requests": dict(settings.requests), "limits": dict(settings.limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "startupProbe": _probe("/readyz", 1, math.ceil(cluster.ready_timeout_s)),
        "readinessProbe": _probe("/readyz", 1, 2),
        "livenessProbe": _probe("/healthz", 10, 3),
        # The endpoints go first; until every proxy has noticed, requests still come and are answered.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(settings.pre_stop_s)]}}},
        "volumeMounts": mounts,
    }


def _environment(settings: KubernetesSettings, version: Version) -> list[Object]:
    secrets = {
        "KHET_OBJECT_STORE__ACCESS_KEY_ID": "object-store-access-key",
        "KHET_OBJECT_STORE__SECRET_ACCESS_KEY": "object-store-secret-key",
    }
    return [
        {"name": "MODEL_VERSION", "value": str(version)},
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "KHET_HOME", "value": ETC},
        {"name": "KHET_SERVING__CACHE_DIR", "value": CACHE},
        *[
            {
                "name": variable,
                "valueFrom": {"secretKeyRef": {"name": settings.object_store_secret, "key": key, "optional": True}},
            }
            for variable, key in secrets.items()
        ],
    ]


def _probe(path: str, period_s: int, failures: int) -> Object:
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }


def service(settings: KubernetesSettings, track: Track | None = None) -> Object:
    """The Service of one track, or without one that of the users: it selects the pods whose traffic is on."""
    chosen = {NAME: settings.service, TRACK: str(track)} if track else users(settings, {})
    return {
        "metadata": {"labels": labels(settings) | ({TRACK: str(track)} if track else {})},
        "spec": {
            "selector": chosen,
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def users(settings: KubernetesSettings, weights: Mapping[Track, float]) -> dict[str, str]:
    """Which pods the users' Service selects: those whose traffic is on, or all of a guest that answers everybody."""
    guest = next((track for track, share in weights.items() if share == 1.0 and track is not Track.stable), None)
    return {NAME: settings.service, **({TRACK: str(guest)} if guest else {TRAFFIC: "on"})}


def route(settings: KubernetesSettings, weights: Mapping[Track, float], *, sticky: bool = False) -> Object:
    """The HTTPRoute that splits users' traffic by `weights`.

    `sticky`: a request that names its track in `X-Khet-Variant` gets it. Gateways cannot deal users to versions by a
    hash; whoever knows the user in front of the gateway sets the header, by `tasks.cluster.sticky.track_of`.
    """
    namespace, _, name = (settings.gateway or "").rpartition("/")
    parent = {"name": name} | ({"namespace": namespace} if namespace else {})
    served = [(track, share) for track, share in sorted(weights.items()) if share > 0]
    named: list[Object] = [
        {
            "matches": [{"headers": [{"type": "Exact", "name": VARIANT_HEADER, "value": str(track)}]}],
            "backendRefs": [_backend(settings, track, _SCALE)],
        }
        for track, _ in (served if sticky else ())
    ]
    split: Object = {"backendRefs": [_backend(settings, track, round(share * _SCALE)) for track, share in served]}
    return {
        "metadata": {"labels": labels(settings)},
        "spec": {"parentRefs": [parent], "rules": [*named, split]},
    }


def _backend(settings: KubernetesSettings, track: Track, weight: int) -> Object:
    return {"name": service_name(settings, track), "port": 80, "weight": weight}


def lease(settings: KubernetesSettings, spec: Mapping[str, Any]) -> Object:
    """The Lease that holds traffic away from stable."""
    return {
        "metadata": {"name": lease_name(settings), "labels": labels(settings)},
        "spec": dict(spec),
    }


def event(
    settings: KubernetesSettings, namespace: str, about: Object, *, name: str, at: str, reason: str, note: str
) -> Object:
    """An Event on a Deployment, for `kubectl describe` and `kubectl get events`."""
    metadata = about["metadata"]
    return {
        "metadata": {"name": name, "labels": labels(settings)},
        "involvedObject": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "namespace": namespace,
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": note[:1024],
        "type": "Warning" if reason == "LeaseExpired" else "Normal",
        "source": {"component": MANAGER},
        "reportingComponent": "khet.guard/pipelines",
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
