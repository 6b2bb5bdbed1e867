"""A pod like a replica's that lives for seconds: can its image be pulled, and what does it reach from where it runs?"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from configs.areas import ClusterSettings
from configs.errors import ExternalError, KhetError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import objects
from tasks.cluster.kubernetes.client import EVENT, POD, Kube, Object
from tasks.cluster.kubernetes.readiness import trouble_of

NAME: Final = "khet-doctor"
# What keeps a container from ever starting, as the kubelet calls it. Waiting for its next try tells nothing new.
_NO_IMAGE: Final = ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable")
_NO_START: Final = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
# Whatever becomes of the doctor: the kubelet ends the pod, and the next doctor removes it.
_LIFE_S: Final = 60
_LOOK_AGAIN_S: Final = 1
_NOT_OF_A_PROBE: Final = ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle")
_ANY_VERSION: Final = Version(0, 0, 0)  # a replica's manifest names one; the probe's drops it


@dataclass(frozen=True, slots=True)
class Probed:
    """What came of it. `image`: it was pulled, else `problem` says why not. `answers`: see `ml.reach`; without any,
    `problem` says why there are none."""

    image: bool
    problem: str = ""
    where: str = ""
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def probe(
    kube: Kube, cluster: ClusterSettings, version: Version | None, database: str | None, limit_s: float
) -> Probed:
    """Run the pod, at most `limit_s` seconds, and delete it however that ends.

    `version` is looked for in the object store; `database` is HOST:PORT.

    Raises:
        ConfigError: it may not be created.
        ExternalError: the API server does not answer.
    """
    _sweep(kube)
    made = manifest(cluster, version, database)
    name = made["metadata"]["name"]
    try:
        kube.create(POD, made)
        return _watch(kube, name, time.monotonic() + limit_s, limit_s)
    finally:
        with contextlib.suppress(KhetError):
            kube.delete(POD, name)


def manifest(cluster: ClusterSettings, version: Version | None, database: str | None) -> Object:
    """A replica's pod, restricted as that is, which looks around instead of serving. No secret is in its arguments.

    To network policies it is a flow run: those may reach the object store and the database.
    """
    spec: Object = objects.deployment(cluster, Track.stable, version or _ANY_VERSION)["spec"]["template"]["spec"]
    container = {name: value for name, value in spec["containers"][0].items() if name not in _NOT_OF_A_PROBE}
    container |= {
        "command": ["python", "-m", "ml.reach", "--result", "/dev/termination-log"],
        "args": ["--database", database] if database else [],
        "env": [one for one in container["env"] if version is not None or one["name"] != "MODEL_VERSION"],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    labels = {**objects.labels(cluster.kubernetes), objects.NAME: NAME, "app.kubernetes.io/component": "flow-run"}
    short = {"restartPolicy": "Never", "activeDeadlineSeconds": _LIFE_S, "terminationGracePeriodSeconds": 1}
    kept = {name: value for name, value in spec.items() if name != "topologySpreadConstraints"}
    return {
        "metadata": {"name": f"{NAME}-{uuid.uuid4().hex[:8]}", "labels": labels},
        "spec": {**kept, **short, "containers": [container]},
    }


def _sweep(kube: Kube) -> None:
    """Remove what a doctor that was killed left behind; younger pods may belong to another one."""
    before = (datetime.now(UTC) - timedelta(seconds=2 * _LIFE_S)).isoformat()
    with contextlib.suppress(KhetError):
        for pod in kube.find(POD, f"{objects.NAME}={NAME}"):
            if pod["metadata"]["creationTimestamp"] < before:
                kube.delete(POD, pod["metadata"]["name"])


def _watch(kube: Kube, name: str, over: float, limit_s: float) -> Probed:
    while True:
        pod = kube.get(POD, name)
        if pod is None:
            raise ExternalError(f"somebody deleted the pod {name} while it looked around. Next: ask again.")
        if (found := result(pod)) is not None:
            return found
        if time.monotonic() >= over:
            return _given_up(kube, pod, limit_s)
        kube.wait_change(POD, pod, _LOOK_AGAIN_S)


def result(pod: Object) -> Probed | None:
    """What a pod's status tells; None while there is still something to wait for."""
    status = pod.get("status") or {}
    container: Object = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    if waiting.get("reason") in _NO_IMAGE:
        return Probed(False, f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": "))
    if waiting.get("reason") in _NO_START:
        return Probed(True, f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": "))
    if (ended := state.get("terminated")) is not None:
        return _ended(ended, where=f"on {pod['spec'].get('nodeName')}")
    if status.get("phase") == "Failed":  # evicted, or refused by the node
        return Probed(True, f"the pod failed: {status.get('reason', '')}: {status.get('message', '')}".rstrip(": "))
    return None


def _ended(ended: Mapping[str, Any], where: str) -> Probed:
    message = str(ended.get("message") or "")
    try:
        answers = json.loads(message)
    except ValueError:
        said = message.strip().splitlines()[-1] if message.strip() else ended.get("reason", "no word")
        return Probed(True, f"it ended with code {ended.get('exitCode')} and without an answer: {said}", where)
    return Probed(True, "", where, answers)


def _given_up(kube: Kube, pod: Object, limit_s: float) -> Probed:
    """Say what the pod still waits for: no node, a volume, a network, a pull that takes long."""
    trouble = trouble_of(pod)
    last = trouble.reason if trouble else _last_event(kube, pod) or f"it is {pod['status'].get('phase', 'Pending')}"
    started = any("running" in (one.get("state") or {}) for one in pod["status"].get("containerStatuses") or ())
    return Probed(started, f"no answer after {limit_s:g} s: {last}")


def _last_event(kube: Kube, pod: Object) -> str:
    with contextlib.suppress(KhetError):
        found = kube.find(EVENT, fields=f"involvedObject.uid={pod['metadata']['uid']}")
        newest = max(found, key=lambda event: str(event.get("lastTimestamp") or ""), default=None)
        if newest is not None:
            return f"{newest.get('reason')}: {newest.get('message')}"
    return ""
