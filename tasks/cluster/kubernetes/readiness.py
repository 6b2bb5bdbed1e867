"""Whether a Deployment is as desired, and if not, what stops it. Pure: objects of the API in, a value out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from configs.errors import ExternalError
from tasks.cluster.kubernetes.client import Object
from tasks.cluster.kubernetes.objects import CONTAINER, TRACK, VERSION

# Why a container waits that no waiting will change.
_NEVER: Final = ("InvalidImageName", "ErrImageNeverPull")
_NO_SUCH_IMAGE: Final = ("not found", "manifest unknown", "does not exist")
_HOPELESS_DEATHS: Final = 2


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a pod from being ready. `previous`: the log of the container before the current one tells more."""

    pod: str
    reason: str
    hopeless: bool = False
    previous: bool = False
    started: bool = True


@dataclass(frozen=True, slots=True)
class Readiness:
    """`hopeless`: waiting longer will not help."""

    ready: bool
    reason: str
    hopeless: bool = False
    worst: Trouble | None = None


def readiness(deployment: Object, pods: Sequence[Object]) -> Readiness:
    """The state of a Deployment and of its track's pods, those that are ending left out."""
    spec, status = deployment["spec"], deployment.get("status") or {}
    wanted, metadata = spec.get("replicas", 1), deployment["metadata"]
    labels = metadata["labels"]
    ready = sum(is_ready(pod) and version_of(pod) == labels.get(VERSION) for pod in pods)
    reason = f"{ready} of {wanted} replicas of {labels.get(VERSION)} are ready on {labels.get(TRACK)}"
    if _settled(status, metadata["generation"], wanted) and ready == wanted == len(pods):
        return Readiness(True, reason)
    if spec.get("paused"):
        return Readiness(False, f"{reason}; its rollout is paused (`kubectl rollout resume` goes on)", hopeless=True)
    starting = [pod for pod in pods if not is_ready(pod) and _is_current(deployment, pod)]
    troubles = [trouble for pod in starting if (trouble := trouble_of(pod))]
    worst = max(troubles, key=lambda trouble: (trouble.hopeless, trouble.previous), default=None)
    if worst is not None:
        return Readiness(False, f"{reason}; {worst.pod} {worst.reason}", worst.hopeless, worst)
    failed = [c.get("message", "") for c in status.get("conditions") or () if _is(c, "ReplicaFailure", "True")]
    return Readiness(False, "; ".join((reason, *failed[:1])))


def _is_current(deployment: Object, pod: Object) -> bool:
    """Whether a pod is of the version and image that are wanted now: one that was given up says nothing about them."""
    wanted, has = _image(deployment["spec"].get("template", {})), _image(pod)
    return version_of(pod) == deployment["metadata"]["labels"].get(VERSION) and (None in (wanted, has) or wanted == has)


def _image(described: Object) -> str | None:
    containers = (described.get("spec") or {}).get("containers") or ()
    return next((container.get("image") for container in containers if container["name"] == CONTAINER), None)


def _settled(status: Object, generation: int, wanted: int) -> bool:
    counts = (status.get(name, 0) for name in ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"))
    return status.get("observedGeneration", 0) >= generation and all(count == wanted for count in counts)


def trouble_of(pod: Object) -> Trouble | None:
    """Why this pod is not ready; None where it is just starting."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if _is(condition, "PodScheduled", "False"):
            return Trouble(name, f"has no node: {condition.get('message', '')}", started=False)
    found = next((c for c in status.get("containerStatuses") or () if c["name"] == CONTAINER), None)
    return _trouble(name, found) if found else None


def _trouble(name: str, container: Object) -> Trouble | None:
    state, before = container.get("state") or {}, (container.get("lastState") or {}).get("terminated")
    ended = state.get("terminated") or before
    if ended is not None:
        deaths = container.get("restartCount", 0) + bool(state.get("terminated"))
        code = ended.get("exitCode", 0)
        own = 0 < code < 128 and code != ExternalError.exit_code
        reason = f"exited with code {code} ({deaths} times)" if code < 128 else f"was ended ({ended.get('reason')})"
        return Trouble(name, reason, own and deaths >= _HOPELESS_DEATHS, previous="terminated" not in state)
    waiting = state.get("waiting") or {}
    if (why := waiting.get("reason")) in (None, "ContainerCreating", "PodInitializing"):
        return None
    message = waiting.get("message", "")
    hopeless = why in _NEVER or (why == "ErrImagePull" and any(words in message for words in _NO_SUCH_IMAGE))
    return Trouble(name, f"waits: {why}: {message}".rstrip(": "), hopeless, started=False)


def is_ready(pod: Object) -> bool:
    """Whether its readiness probe said so last."""
    return any(_is(condition, "Ready", "True") for condition in (pod.get("status") or {}).get("conditions") or ())


def is_ending(pod: Object) -> bool:
    """Whether it was told to end, or has ended."""
    return "deletionTimestamp" in pod["metadata"] or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def version_of(pod: Object) -> str:
    """The version that its labels name."""
    return str(pod["metadata"]["labels"].get(VERSION, ""))


def _is(condition: dict[str, Any], kind: str, value: str) -> bool:
    return condition.get("type") == kind and condition.get("status") == value
