"""The deployment procedures where the cluster has more to offer than the Protocol.

Images, surge and unavailable bounds, a progress deadline, and a difference of the objects themselves, which the API
server works out by a dry run.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

from configs.errors import ExternalError
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import objects
from tasks.cluster.kubernetes.adapter import KubernetesCluster
from tasks.cluster.kubernetes.client import DEPLOYMENT, POD, SERVICE, Object
from tasks.cluster.kubernetes.readiness import is_ending, readiness
from tasks.cluster.procedures import ProtocolProcedures, Update, diff

_LOOK_AGAIN_S: Final = 1
# What the server writes by itself, and `kubectl diff` leaves out too.
_SERVERS_OWN: Final = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink")
_REVISION: Final = "deployment.kubernetes.io/revision"
_STICKY_S: Final = 10_800  # Kubernetes' own default for an address that sends nothing


class KubernetesProcedures(ProtocolProcedures):
    """See `tasks.cluster.procedures.Procedures`."""

    def __init__(self, cluster: KubernetesCluster) -> None:
        super().__init__(cluster)
        self._own = cluster
        self._kube = cluster.kube
        self._all = cluster.settings
        self._settings = cluster.settings.kubernetes

    def image(self) -> str | None:
        """See `Procedures.image`."""
        live = self._kube.get(DEPLOYMENT, self._settings.service)
        return _container(live)["image"] if live else None

    def update(self, update: Update, *, dry_run: bool = False) -> str:
        """See `Procedures.update`. Without an image the one that runs stays; a rollout sets the configured one again.

        Raises:
            SafetyError: somebody else set one of the fields; the message names both.
        """
        wanted = updated(objects.deployment(self._all, Track.stable, update.version), update, self.image())
        return self._apply(self._settings.service, wanted, dry_run=dry_run)

    def wait_updated(self, update: Update) -> None:
        """See `Procedures.wait_updated`. The deadline is the Deployment's own: seconds without progress."""
        # Each replica may use up the deadline; a controller that reports nothing at all is not waited for longer.
        over = time.monotonic() + update.deadline_s * (update.replicas + 1) + 30
        while True:
            found = self._kube.get(DEPLOYMENT, self._settings.service) or {}
            if not found:
                raise ExternalError(f"the Deployment {self._settings.service} was deleted meanwhile.", retryable=False)
            now = readiness(found, self._pods())
            if now.ready:
                self._cluster.wait_ready(Track.stable, self._all.ready_timeout_s)
                return
            if now.hopeless or is_stuck(found) or time.monotonic() > over:
                self._give_up(update)
            self._kube.wait_change(DEPLOYMENT, found, _LOOK_AGAIN_S)

    def deploy(self, track: Track, version: Version, replicas: int, *, dry_run: bool = False) -> str:
        """See `Procedures.deploy`."""
        name = objects.name_of(self._settings, track)
        found = self._apply(name, objects.deployment(self._all, track, version), dry_run=True)
        if not dry_run:
            self._cluster.deploy(track, version, replicas)
        return found

    def scale(self, track: Track, replicas: int, *, dry_run: bool = False) -> str:
        """See `Procedures.scale`. A dry run says no where an autoscaler would make the real one say so."""
        self._own.check_scalable(track)
        return super().scale(track, replicas, dry_run=dry_run)

    def restart(self, track: Track, *, dry_run: bool = False) -> str:
        """See `Procedures.restart`."""
        name = objects.name_of(self._settings, track)
        found = super().restart(track, dry_run=True)
        if not dry_run:
            self._cluster.restart(track)
        return found.replace("cluster", f"Deployment/{name}", 2)

    def guard(self, *, dry_run: bool = False) -> str:
        """See `Procedures.guard`: nothing in the cluster does it by itself."""
        lost = self._own.lease_lost()
        if not dry_run:
            self._own.enforce()
        return f"nobody renewed the rollout's lease by {lost:%H:%M:%S} UTC: all traffic to stable" if lost else ""

    def stick(self, *, on: bool, dry_run: bool = False) -> str:
        """See `Procedures.stick`: by a header behind a gateway, else the users' Service keeps an address on one pod."""
        if self._own.is_routed():
            return self._stick_route(on=on, dry_run=dry_run)
        name = self._settings.service
        live = self._kube.get(SERVICE, name)
        if live is None or (not on and live["spec"].get("sessionAffinity", "None") == "None"):
            return ""
        sticky: Object = {"sessionAffinity": "None", "sessionAffinityConfig": None}
        if on:
            sticky = {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": _STICKY_S}},
            }
        self._kube.merge(SERVICE, name, {"spec": sticky}, dry_run=dry_run)
        return f"the Service {name} keeps each client address on one pod for {_STICKY_S // 3600} h" if on else ""

    def _stick_route(self, *, on: bool, dry_run: bool) -> str:
        if not dry_run:
            self._own.stick(on=on)
        header = objects.VARIANT_HEADER
        return f"requests whose {header} names a track get it; who sets none is dealt anew each time" if on else ""

    def _apply(self, name: str, wanted: Object, *, dry_run: bool) -> str:
        live = self._kube.get(DEPLOYMENT, name) or {}
        planned = self._kube.apply(DEPLOYMENT, name, wanted, dry_run=True)
        found = diff(comparable(live), comparable(planned), f"Deployment/{name}")
        if found and not dry_run:
            self._kube.apply(DEPLOYMENT, name, wanted)
        return found

    def _pods(self) -> list[Object]:
        found = self._kube.find(POD, objects.selector(self._settings, Track.stable))
        return [pod for pod in found if not is_ending(pod)]

    def _give_up(self, update: Update) -> None:
        """Say why, with the last log lines of the pod that is to blame."""
        try:
            self._cluster.wait_ready(Track.stable, 0)
        except ExternalError as error:
            what = str(error).replace("not ready after 0 s", f"no progress for {update.deadline_s:g} s", 1)
            raise ExternalError(what, retryable=False) from error


def updated(manifest: Object, update: Update, image: str | None) -> Object:
    """The manifest with the update's bounds, deadline and image."""
    spec = manifest["spec"]
    spec["strategy"]["rollingUpdate"] = {"maxSurge": update.surge, "maxUnavailable": update.unavailable}
    spec["progressDeadlineSeconds"] = max(1, math.ceil(update.deadline_s))
    container = _container(manifest)
    container["image"] = update.image or image or container["image"]
    cause = f"serve {update.version}" + (f" in {update.image}" if update.image else "")
    manifest["metadata"]["annotations"]["kubernetes.io/change-cause"] = cause
    return manifest


def is_stuck(deployment: Object) -> bool:
    """Whether the progress deadline of the latest generation has passed."""
    status = deployment.get("status") or {}
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return False
    return any(
        condition.get("type") == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded"
        for condition in status.get("conditions") or ()
    )


def comparable(found: Object) -> Object:
    """An object without what the server writes by itself."""
    metadata: dict[str, Any] = {k: v for k, v in found.get("metadata", {}).items() if k not in _SERVERS_OWN}
    if "annotations" in metadata:
        metadata["annotations"] = {k: v for k, v in metadata["annotations"].items() if k != _REVISION}
    rest = {name: value for name, value in found.items() if name not in ("status", "metadata")}
    return {**rest, "metadata": metadata} if found else {}


def _container(deployment: Object) -> dict[str, Any]:
    found: list[dict[str, Any]] = deployment["spec"]["template"]["spec"]["containers"]
    return next(container for container in found if container["name"] == objects.CONTAINER)
