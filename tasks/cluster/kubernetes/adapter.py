"""A Kubernetes cluster as a `Cluster`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from configs.areas import ClusterSettings
from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from ml.version import Version
from tasks.cluster import ClusterStatus, ReplicaStatus, Track, TrackCounters
from tasks.cluster.kubernetes import capacity, counting, objects, state, traffic
from tasks.cluster.kubernetes.client import (
    AUTOSCALER,
    DEPLOYMENT,
    EVENT,
    LEASE,
    NODE,
    POD,
    ROUTE,
    SERVICE,
    DeniedError,
    Kube,
    NotFoundError,
    Object,
    StaleError,
)
from tasks.cluster.kubernetes.readiness import Readiness, Trouble, is_ending, is_ready, readiness, version_of
from tasks.cluster.kubernetes.state import Seen
from tasks.cluster.memory import Memory
from tasks.cluster.node import policy
from tasks.cluster.node.state import Desired

log = logging.getLogger(__name__)

MAX_REPLICAS: Final = 500
_MAX_LINES: Final = 2_000
_LONGEST_LEASE_S: Final = 3600  # one that lasts for hours would guard nobody
_TRIES: Final = 8
_LOOK_AGAIN_S: Final = 1
_SILENCE_S: Final = 0.5
_TAIL: Final = 15


class KubernetesCluster:
    """Implements `tasks.cluster.Cluster`; every change is an Event on the Deployment.

    Weights, mirroring and the lease are kept in the cluster, so any process can go on where another one died. Nothing
    in the cluster ends a lost lease by itself: the first call of anybody does, and `enforce`, which the watchdog calls.
    """

    def __init__(self, kube: Kube, settings: ClusterSettings) -> None:
        self._kube = kube
        self._cluster = settings
        self._settings = settings.kubernetes
        self._counting = counting.Counting(self._metrics())
        self._routed: bool | None = None

    @classmethod
    def from_settings(cls, settings: ClusterSettings) -> KubernetesCluster:
        """The configured cluster; nothing is sent yet.

        Raises:
            ConfigError: there is no way to it.
        """
        return cls(Kube.connect(settings.kubernetes, settings.call_timeout_s), settings)

    @property
    def kube(self) -> Kube:
        """The API server, for procedures beyond the Protocol."""
        return self._kube

    @property
    def settings(self) -> ClusterSettings:
        """What it was built from."""
        return self._cluster

    # What a rollout asks for

    def deploy(self, track: Track, version: Version, replicas: int) -> None:
        """See `Cluster.deploy`. Where an autoscaler has the Deployment, it decides how many replicas there are."""
        _check_replicas(replicas)
        seen = self._change(lambda old: policy.deploy(old, track, str(version), 1))  # how many is not in this state
        self._roll_out(seen, track, version, replicas)

    def wait_ready(self, track: Track, timeout_s: float) -> None:
        """See `Cluster.wait_ready`. Wakes with every change of the Deployment, by a watch."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                now = self._look(track, deadline)
            except ExternalError:  # an API server that is restarted is back in time, or it is not
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_SILENCE_S)
                continue
            if now.ready:
                return
            if now.hopeless or time.monotonic() >= deadline:
                raise self._not_ready(now, timeout_s)

    def _look(self, track: Track, deadline: float) -> Readiness:
        """The state of a track as soon as it is ready or hopeless, or after the next change."""
        found = self._deployment(track)
        now = readiness(found, self._pods(track))
        if now.ready:
            self._align()
        elif not now.hopeless and (left := deadline - time.monotonic()) > 0:
            self._kube.wait_change(DEPLOYMENT, found, min(_LOOK_AGAIN_S, math.ceil(left)))
        return now

    def set_weights(
        self,
        weights: Mapping[Track, float],
        *,
        mirror: Mapping[Track, float] | None = None,
        lease_s: float | None = None,
    ) -> None:
        """See `Cluster.set_weights`. Without a gateway the shares are those that whole pods can make."""
        until = self._lease_end(lease_s)

        def change(old: Desired) -> Desired:
            new = policy.set_weights(old, _checked(weights), _checked(mirror or {}), until)
            self._check_guests(new)
            return new

        seen = self._change(change)
        self._note(seen, Track.stable, "TrafficMoved", _describe(seen.desired))

    def renew_lease(self, lease_s: float) -> None:
        """See `Cluster.renew_lease`. A pod of a guest that was replaced meanwhile gets its traffic back.

        Raises:
            SafetyError: it has expired, or another process holds it now.
        """
        until = self._lease_end(lease_s)
        now = _now()
        self._change(lambda old: policy.renew(old, until or now, now), mine=True)

    def scale(self, track: Track, replicas: int) -> None:
        """See `Cluster.scale`.

        Raises:
            SafetyError: an autoscaler decides how many there are.
        """
        _check_replicas(replicas)
        seen = self._change(lambda old: policy.scale(old, track, replicas))
        self.check_scalable(track)
        self._scale(track, replicas)
        self._note(seen, track, "Scaled", f"{track} has {replicas} replicas")

    def check_scalable(self, track: Track) -> None:
        """Raises SafetyError when an autoscaler decides how many replicas the track has."""
        if (scaler := self._autoscaler(track)) is not None:
            raise SafetyError(
                f"the HorizontalPodAutoscaler {scaler} decides how many replicas {track} has; nothing was changed.\n"
                f"Next: `kubectl edit hpa {scaler}` changes its bounds."
            )

    def restart(self, track: Track) -> None:
        """See `Cluster.restart`. As `kubectl rollout restart` does it."""
        name = self._deployment(track)["metadata"]["name"]
        stamp = {"kubectl.kubernetes.io/restartedAt": _now().isoformat()}
        self._kube.merge(DEPLOYMENT, name, {"spec": {"template": {"metadata": {"annotations": stamp}}}})
        self._note(self._read(), track, "Restarted", f"every replica of {track} is replaced, one at a time")

    def remove(self, track: Track) -> None:
        """See `Cluster.remove`."""
        before = self._change(lambda old: policy.remove(old, track))
        if track not in before.deployments:
            return
        self._kube.delete(DEPLOYMENT, objects.name_of(self._settings, track))
        self._note(before, Track.stable, "Removed", f"{track} is taken away")

    def rollback(self, version: Version, replicas: int) -> None:
        """See `Cluster.rollback`.

        Raises:
            ExternalError: `version` was not ready in time; what served before still does.
        """
        _check_replicas(replicas)
        seen = self._change(policy.retreat)
        self._roll_out(seen, Track.stable, version, replicas, fast=True)
        self.wait_ready(Track.stable, self._cluster.ready_timeout_s)
        if seen.desired.weights.get(Track.previous):
            self.set_weights({Track.stable: 1.0})
        for guest in (Track.canary, Track.baseline, Track.previous):
            self.remove(guest)

    def lease_lost(self) -> datetime | None:
        """When a lease ended that nobody has yet returned the traffic of; None where all is well. Changes nothing."""
        seen = self._read()
        return seen.desired.lease_expires_at if state.expired(seen, _now()) else None

    def enforce(self) -> bool:
        """Return the traffic to stable if a lease was lost, and give every pod the traffic it should have. Whether the
        lease had been lost."""
        lost = self.lease_lost() is not None
        if lost:
            self._change(lambda old: old)
        self._align()
        return lost

    # What it looks at

    def room(self) -> int:
        """See `Cluster.room`: by the requests of a replica, and what other pods were promised. Needs the permission to
        list nodes, and pods of all namespaces."""
        pods = self._kube.find(POD, everywhere=True)
        mine = [pod for pod in pods if self._is_mine(pod)]
        own = {pod["metadata"]["uid"] for pod in mine}
        fits = capacity.slots(self._kube.find(NODE), pods, self._settings.requests, own)
        desired = sum(wanted.replicas for wanted in self._read().desired.tracks.values())
        return max(0, fits - max(desired, sum(not is_ending(pod) for pod in mine)))

    def status(self) -> ClusterStatus:
        """See `Cluster.status`. A lease that was lost is ended, where this process may do so."""
        seen = self._read()
        if state.expired(seen, _now()):
            with contextlib.suppress(DeniedError):  # somebody who may only look is told how it is
                self._change(lambda old: old)
                seen = self._read()
        desired, pods = seen.desired, self._pods()
        on = [_traffic(pod) for pod in pods if Track(_track(pod)) in desired.tracks]
        counts = {track: sum(pod.on and pod.ready for pod in on if pod.track is track) for track in Track}
        return ClusterStatus(
            versions=state.versions(desired),
            replicas=tuple(_replica(pod) for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))),
            weights=dict(desired.weights),
            mirror=dict(desired.mirror),
            lease_expires_at=desired.lease_expires_at,
            shares=dict(desired.weights) if self.is_routed() else traffic.shares(counts),
        )

    def counters(self) -> Mapping[Track, TrackCounters]:
        """See `Cluster.counters`. What never reached a pod, nobody counts."""
        seen = self._read()
        wanted = {track: entry.version for track, entry in seen.desired.tracks.items()}
        pods = [
            pod for pod in self._all_pods() if _is_running(pod) and wanted.get(Track(_track(pod))) == version_of(pod)
        ]
        return self._counting.look(pods, seen.deployments)

    def reachable(self, weights: Mapping[Track, float], replicas: Mapping[Track, int]) -> Mapping[Track, float]:
        """See `Cluster.reachable`."""
        return dict(weights) if self.is_routed() else traffic.shares(traffic.allocate(replicas, weights))

    def address(self, track: Track) -> str:
        """See `Cluster.address`: the track's Service, by its IP address. Reachable inside the cluster."""
        self._deployment(track)
        found = self._kube.get(SERVICE, objects.service_name(self._settings, track))
        if found is None:
            raise ConfigError(f"the Service of {track} is missing. Next: deploy the track again.")
        return f"http://{counting.url_host(found['spec']['clusterIP'])}:{found['spec']['ports'][0]['port']}"

    def logs(self, track: Track, lines: int = 100) -> str:
        """See `Cluster.logs`."""
        if not 1 <= lines <= _MAX_LINES:
            raise ConfigError(f"{lines} lines were asked for; 1 to {_MAX_LINES} can be. Nothing was read.")
        parts = [(pod["metadata"]["name"], self._log(pod["metadata"]["name"], lines)) for pod in self._pods(track)]
        return "\n".join(f"==> {name} <==\n{text}" for name, text in parts)

    def memory(self) -> Memory:
        """See `Cluster.memory`: an annotation of the stable Deployment."""
        return state.memory(self._stable())

    def remember(self, change: Callable[[Memory], Memory]) -> Memory:
        """See `Cluster.remember`."""
        for _ in range(_TRIES):
            stable = self._stable()
            old = state.memory(stable)
            new = change(old)
            if stable is None or new == old:
                return new
            new = new.model_copy(update={"revision": old.revision + 1})
            written = {objects.MEMORY: new.model_dump_json(exclude_defaults=True)}
            known = {"resourceVersion": stable["metadata"]["resourceVersion"], "annotations": written}
            with contextlib.suppress(StaleError):
                self._kube.merge(DEPLOYMENT, stable["metadata"]["name"], {"metadata": known})
                return new
        raise self._crowded()

    # State

    def _stable(self) -> Object | None:
        return self._kube.get(DEPLOYMENT, objects.name_of(self._settings, Track.stable))

    def _crowded(self) -> ExternalError:
        return ExternalError(f"somebody else changes {self._settings.service} all the time; nothing was changed.")

    def _read(self) -> Seen:
        found = self._kube.find(DEPLOYMENT, objects.selector(self._settings))
        return state.read(found, self._kube.get(LEASE, objects.lease_name(self._settings)))

    def _change(self, change: Callable[[Desired], Desired], *, mine: bool = False) -> Seen:
        """Change weights, mirroring and lease as one, from the state as it is now: whoever changed it in between makes
        this start anew. With `mine` only the process that holds the lease may. Returns the state afterwards."""
        for _ in range(_TRIES):
            try:
                seen = self._without_lost_lease(self._read())
                if mine:
                    _check_holder(seen)
                new = change(seen.desired)
                self._write(seen, new)
            except StaleError:
                continue
            return replace(seen, desired=new)
        raise self._crowded()

    def _without_lost_lease(self, seen: Seen) -> Seen:
        if not state.expired(seen, _now()):
            return seen
        ended = seen.desired.lease_expires_at
        self._write(seen, policy.expire(seen.desired), lost=True)
        self._note(seen, Track.stable, "LeaseExpired", f"nobody renewed it by {ended:%H:%M:%S} UTC; all to stable")
        return self._read()

    def _write(self, seen: Seen, new: Desired, *, lost: bool = False) -> None:
        """The guard first, the intent second, then what it does: whoever dies in between leaves a state that the next
        call makes whole, and never a canary without a lease."""
        old = seen.desired
        if new.lease_expires_at is not None and new.lease_expires_at != old.lease_expires_at:
            self._hold(seen, new.lease_expires_at)
        if (new.weights, new.mirror) != (old.weights, old.mirror) and Track.stable in seen.deployments:
            stable = seen.deployments[Track.stable]["metadata"]
            change = {"resourceVersion": stable["resourceVersion"], "annotations": state.written(new)}
            self._kube.merge(DEPLOYMENT, stable["name"], {"metadata": change})
        self._send_traffic(new.weights)
        if new.lease_expires_at is None and seen.holder and seen.lease:
            self._put_lease(seen.lease, state.released(seen.lease, lost=lost))

    def _hold(self, seen: Seen, until: datetime) -> None:
        spec = state.held(until, _now())
        if seen.lease is None:
            self._kube.create(LEASE, objects.lease(self._settings, spec))
        else:
            self._put_lease(seen.lease, spec)

    def _put_lease(self, lease: Object, spec: Mapping[str, Any]) -> None:
        self._kube.replace(LEASE, lease["metadata"]["name"], {**lease, "spec": dict(spec)})

    def _lease_end(self, lease_s: float | None) -> datetime | None:
        if lease_s is None:
            return None
        if not 0 < lease_s <= _LONGEST_LEASE_S:
            raise ConfigError(f"a lease of {lease_s:g} s is not possible: above 0, at most {_LONGEST_LEASE_S} s.")
        return state.lease_end(_now(), lease_s)

    # Traffic

    def _align(self) -> None:
        """Give every pod the traffic that the weights say, for pods come and go."""
        self._send_traffic(self._read().desired.weights)

    def _send_traffic(self, weights: Mapping[Track, float]) -> None:
        if self.is_routed():
            wanted = objects.route(self._settings, weights, sticky=self._is_sticky())
            self._kube.apply(ROUTE, self._settings.service, wanted)
            return
        changes = traffic.switches([_traffic(pod) for pod in self._pods()], weights)
        self._label({name for name, on in changes if on}, "on")
        self._select(weights)
        self._label({name for name, on in changes if not on}, "off")

    def _label(self, pods: Collection[str], state: str) -> None:
        for name in sorted(pods):
            with contextlib.suppress(NotFoundError):  # it has ended meanwhile
                self._kube.merge(POD, name, {"metadata": {"labels": {objects.TRAFFIC: state}}})

    def _select(self, weights: Mapping[Track, float]) -> None:
        """A guest with all of the traffic gets it at once, by one change of the users' Service; back again too."""
        name = self._settings.service
        live = self._kube.get(SERVICE, name)
        selected = live["spec"].get("selector", {}) if live else {}
        wanted = objects.users(self._settings, weights)
        if live is not None and selected != wanted:
            gone = {label: None for label in selected if label not in wanted}
            self._kube.merge(SERVICE, name, {"spec": {"selector": gone | wanted}})

    def _is_sticky(self) -> bool:
        """Whether users are to stay on one track while the traffic is split."""
        stable = self._stable() or {"metadata": {}}
        return objects.STICKY in (stable["metadata"].get("annotations") or {})

    def stick(self, *, on: bool) -> None:
        """Remember whether users stay on one track, and route them so. Behind a gateway only."""
        name = objects.name_of(self._settings, Track.stable)
        note = {objects.STICKY: "on" if on else None}
        self._kube.merge(DEPLOYMENT, name, {"metadata": {"annotations": note}})
        self._align()

    def is_routed(self) -> bool:
        """Whether a gateway splits the traffic; else the number of pods does."""
        if self._routed is None:
            self._routed = self._finds_gateway()
        return self._routed

    def _finds_gateway(self) -> bool:
        if self._settings.traffic == "replica-ratio":
            return False
        wanted = self._settings.traffic == "gateway-api"
        if self._settings.gateway is None:
            if wanted:
                raise ConfigError("cluster.kubernetes.gateway is not set. Next: name the Gateway of the HTTPRoute.")
            return False
        served = self._kube.serves(ROUTE)
        if wanted and not served:
            raise ConfigError(f"the cluster serves no {ROUTE.api_version}. Next: install the Gateway API's CRDs.")
        return served

    def _check_guests(self, new: Desired) -> None:
        for track in new.weights:
            if track is not Track.stable and not any(is_ready(pod) for pod in self._pods(track)):
                raise ExternalError(f"{track} has no ready replica; the traffic is as it was. Next: wait for it.")

    # Deployments and pods

    def _roll_out(self, seen: Seen, track: Track, version: Version, replicas: int, *, fast: bool = False) -> None:
        self._ensure_services(track)
        wanted = objects.deployment(self._cluster, track, version, fast=fast)
        made = self._kube.apply(DEPLOYMENT, objects.name_of(self._settings, track), wanted)
        if made["spec"].get("replicas", 1) != replicas and self._autoscaler(track) is None:
            self._scale(track, replicas)
        if track is Track.stable and self.is_routed():
            self._send_traffic(self._read().desired.weights)
        described = f"{track} shall serve {version} on {replicas} replicas"
        self._note(replace(seen, deployments={**seen.deployments, track: made}), track, "Deployed", described)

    def _ensure_services(self, track: Track) -> None:
        """Made where they are missing, never changed: the users' selector moves with the traffic."""
        named = {self._settings.service: None, objects.service_name(self._settings, track): track}
        for name, only in named.items():
            if self._kube.get(SERVICE, name) is None:
                self._kube.apply(SERVICE, name, objects.service(self._settings, only))

    def _scale(self, track: Track, replicas: int) -> None:
        name = objects.name_of(self._settings, track)
        self._kube.merge(DEPLOYMENT, name, {"spec": {"replicas": replicas}}, subresource="scale")

    def _autoscaler(self, track: Track) -> str | None:
        """The HPA that has the track's Deployment."""
        name = objects.name_of(self._settings, track)
        for found in self._kube.find(AUTOSCALER):
            target = found["spec"]["scaleTargetRef"]
            if (target["kind"], target["name"]) == (DEPLOYMENT.name, name):
                return str(found["metadata"]["name"])
        return None

    def _deployment(self, track: Track) -> Object:
        found = self._kube.get(DEPLOYMENT, objects.name_of(self._settings, track))
        if found is None:
            raise ConfigError(f"track {track} is not deployed. Nothing was changed. Next: deploy it.")
        return found

    def _all_pods(self) -> list[Object]:
        found = self._kube.find(POD, objects.selector(self._settings))
        return [pod for pod in found if _track(pod) in Track.__members__]

    def _pods(self, track: Track | None = None) -> list[Object]:
        """Those that are not ending."""
        return [pod for pod in self._all_pods() if not is_ending(pod) and track in (None, Track(_track(pod)))]

    def _is_mine(self, pod: Object) -> bool:
        metadata = pod["metadata"]
        mine = (metadata.get("labels") or {}).get(objects.NAME) == self._settings.service
        return mine and metadata["namespace"] == self._kube.namespace

    def _not_ready(self, now: Readiness, timeout_s: float) -> ExternalError:
        what = "gave up early" if now.hopeless else f"not ready after {timeout_s:g} s"
        lines = self._last_words(now.worst) if now.worst and now.worst.started else ""
        tail = f"\nIts last log lines:\n{lines}" if lines else ""
        message = f"{what}: {now.reason}. Replicas that served before go on serving.{tail}"
        return ExternalError(message, retryable=not now.hopeless)

    def _last_words(self, trouble: Trouble) -> str:
        with contextlib.suppress(KhetError):
            return self._log(trouble.pod, _TAIL, previous=trouble.previous)
        return ""

    def _log(self, pod: str, lines: int, *, previous: bool = False) -> str:
        query = {"container": objects.CONTAINER, "tailLines": lines} | ({"previous": "true"} if previous else {})
        try:
            return self._kube.text(POD, pod, "log", query).rstrip("\n")
        except DeniedError:
            raise
        except ConfigError:
            return ""  # its container has not started

    def _metrics(self) -> counting.Fetch:
        inside = "KUBERNETES_SERVICE_HOST" in os.environ
        if self._settings.metrics_from == "pods" or (self._settings.metrics_from == "auto" and inside):
            return counting.from_pods(self._cluster.call_timeout_s)
        return counting.through_api_server(self._kube)

    def _note(self, seen: Seen, track: Track, reason: str, note: str) -> None:
        """Write an Event. One that cannot be written costs its line, never the work that it tells of."""
        log.info("%s: %s", reason, note)
        about = seen.deployments.get(track)
        if about is None:
            return
        at = _now().strftime("%Y-%m-%dT%H:%M:%SZ")
        name = f"{self._settings.service}.{uuid.uuid4().hex[:12]}"
        made = objects.event(self._settings, self._kube.namespace, about, name=name, at=at, reason=reason, note=note)
        try:
            self._kube.create(EVENT, made)
        except KhetError as error:
            log.warning("the event was not written: %s", error)


def _now() -> datetime:
    return datetime.now(UTC)


def _track(pod: Object) -> str:
    return str(pod["metadata"]["labels"].get(objects.TRACK, ""))


def _is_running(pod: Object) -> bool:
    status = pod.get("status") or {}
    return status.get("phase") == "Running" and bool(status.get("podIP"))


def _traffic(pod: Object) -> traffic.PodTraffic:
    metadata = pod["metadata"]
    return traffic.PodTraffic(
        name=metadata["name"],
        track=Track(_track(pod)),
        ready=is_ready(pod),
        on=metadata["labels"].get(objects.TRAFFIC) == "on",
        age=metadata["creationTimestamp"],
    )


def _replica(pod: Object) -> ReplicaStatus:
    metadata, status = pod["metadata"], pod.get("status") or {}
    return ReplicaStatus(
        name=metadata["name"],
        track=Track(_track(pod)),
        version=Version.parse(version_of(pod)),
        ready=is_ready(pod),
        pid_or_pod=metadata["uid"],
        address=counting.address(pod),
        started_at=datetime.fromisoformat(status.get("startTime") or metadata["creationTimestamp"]),
        restarts=sum(container.get("restartCount", 0) for container in status.get("containerStatuses") or ()),
    )


def _check_replicas(replicas: int) -> None:
    if not 1 <= replicas <= MAX_REPLICAS:
        raise ConfigError(f"{replicas} replicas are not possible: 1 to {MAX_REPLICAS}. Nothing was changed.")


def _checked(weights: Mapping[Track, float]) -> Mapping[Track, float]:
    for track, share in weights.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"a weight of {share:g} for {track} is not possible. The traffic is as it was.")
    return weights


def _check_holder(seen: Seen) -> None:
    if seen.holder not in (None, state.identity()):
        raise SafetyError(f"{seen.holder} holds the lease now; this process may not change the traffic any more.")


def _describe(desired: Desired) -> str:
    shares = ", ".join(f"{track} {share:.0%}" for track, share in sorted(desired.weights.items())) or "nobody is served"
    copies = ", ".join(f"copies to {track}" for track in desired.mirror)
    until = f"until {desired.lease_expires_at:%H:%M:%S} UTC" if desired.lease_expires_at else ""
    return "; ".join(filter(None, (shares, copies, until)))
