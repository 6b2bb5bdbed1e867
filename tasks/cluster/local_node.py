"""The local node as a `Cluster`: a client of its control API."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar

import httpx

from configs.areas import ClusterSettings
from configs.errors import ConfigError, ExternalError, KhetError, SafetyError
from ml.version import Version
from tasks.cluster import ClusterStatus, ReplicaStatus, Track, TrackCounters
from tasks.cluster.memory import Memory

_ERRORS: dict[str, type[KhetError]] = {kind.__name__: kind for kind in (ConfigError, ExternalError, SafetyError)}
ParsedT = TypeVar("ParsedT")
_POLL_S = 0.1
_SHUTDOWN_S = 9.0
_TRIES = 8


class LocalNode:
    """Implements `tasks.cluster.Cluster`, and tells a little more: `events`, `shadow_examples`, `shutdown`."""

    def __init__(self, url: str, token: str, *, call_timeout_s: float = 10.0, ready_timeout_s: float = 90.0) -> None:
        self._url = url.rstrip("/")
        self._call_timeout_s = call_timeout_s
        self._ready_timeout_s = ready_timeout_s
        self._client = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=call_timeout_s,
            transport=httpx.HTTPTransport(verify=_trust(self._url), retries=1),  # of connecting, no more
        )

    @classmethod
    def from_settings(cls, settings: ClusterSettings) -> LocalNode:
        """The client of the configured node.

        Raises:
            ConfigError: no node is configured.
        """
        if settings.node_url is None or settings.node_token is None:
            raise ConfigError(
                "cluster.node_url and cluster.node_token are not set. Next: `khet up` starts a local node."
            )
        return cls(
            settings.node_url,
            settings.node_token.get_secret_value(),
            call_timeout_s=settings.call_timeout_s,
            ready_timeout_s=settings.ready_timeout_s,
        )

    def deploy(self, track: Track, version: Version, replicas: int) -> None:
        """See `Cluster.deploy`. Another version on a track other than stable first loses that track's traffic."""
        self._post("/v1/deploy", track=track, version=str(version), replicas=replicas)

    def wait_ready(self, track: Track, timeout_s: float) -> None:
        """See `Cluster.wait_ready`. Ends early when every start of a replica fails for a reason that will not go away:
        then the error is not retryable."""
        deadline = time.monotonic() + timeout_s
        while True:
            state = self._get("/v1/ready", track=track)
            if state["ready"]:
                return
            if state["hopeless"] or time.monotonic() >= deadline:
                raise _not_ready(state, timeout_s)
            time.sleep(_POLL_S)

    def set_weights(
        self,
        weights: Mapping[Track, float],
        *,
        mirror: Mapping[Track, float] | None = None,
        lease_s: float | None = None,
    ) -> None:
        """See `Cluster.set_weights`."""
        self._post("/v1/weights", weights=dict(weights), mirror=dict(mirror or {}), lease_s=lease_s)

    def renew_lease(self, lease_s: float) -> None:
        """See `Cluster.renew_lease`."""
        self._post("/v1/lease", lease_s=lease_s)

    def scale(self, track: Track, replicas: int) -> None:
        """See `Cluster.scale`."""
        self._post("/v1/scale", track=track, replicas=replicas)

    def restart(self, track: Track) -> None:
        """See `Cluster.restart`."""
        self._post("/v1/restart", track=track, key=uuid.uuid4().hex)

    def remove(self, track: Track) -> None:
        """See `Cluster.remove`."""
        self._post("/v1/remove", track=track)

    def rollback(self, version: Version, replicas: int) -> None:
        """See `Cluster.rollback`. The node goes on with it when the caller dies.

        Raises:
            ExternalError: `version` was not ready in time; what served before still does.
        """
        self._post("/v1/rollback", version=str(version), replicas=replicas)
        self.wait_ready(Track.stable, self._ready_timeout_s)
        self.set_weights({Track.stable: 1.0})
        self.remove(Track.previous)

    def room(self) -> int:
        """See `Cluster.room`: one replica a core, as long as the free memory lasts."""
        answer = self._get("/v1/room")
        return _read("room", lambda: int(answer["replicas"]))

    def status(self) -> ClusterStatus:
        """See `Cluster.status`."""
        return _read("status", lambda: _status(self._get("/v1/status")))

    def counters(self) -> Mapping[Track, TrackCounters]:
        """See `Cluster.counters`."""
        found = self._get("/v1/counters")
        return _read("counters", lambda: {Track(track): _counters(row) for track, row in found.items()})

    def reachable(
        self,
        weights: Mapping[Track, float],
        replicas: Mapping[Track, int],  # noqa: ARG002  (the Protocol's)
    ) -> Mapping[Track, float]:
        """See `Cluster.reachable`: the gateway splits requests, not replicas."""
        return dict(weights)

    def address(self, track: Track) -> None:
        """See `Cluster.address`: the gateway mirrors."""

    def logs(self, track: Track, lines: int = 100) -> str:
        """See `Cluster.logs`."""
        return str(self._get("/v1/logs", track=track, lines=lines)["text"])

    def memory(self) -> Memory:
        """See `Cluster.memory`."""
        return _read("memory", lambda: Memory.model_validate(self._get("/v1/memory")))

    def remember(self, change: Callable[[Memory], Memory]) -> Memory:
        """See `Cluster.remember`."""
        for _ in range(_TRIES):
            old = self.memory()
            new = change(old)
            if new == old:
                return old
            new = new.model_copy(update={"revision": old.revision + 1})
            if self._call("POST", "/v1/memory", json=new.model_dump(mode="json"))["kept"]:
                return new
        raise ExternalError("somebody else changes what the local node remembers all the time; nothing was changed.")

    def events(self, limit: int = 100) -> list[dict[str, str]]:
        """What the node did lately, oldest first: `at`, `kind`, `subject`, `detail`."""
        return list(self._get("/v1/events", limit=limit))

    def shadow_examples(self) -> list[dict[str, str]]:
        """Recent mirrored requests whose two answers differed: `request_id`, `served_by` and `served_class`,
        `mirrored_to` and `mirrored_class` (versions and classes), `at`."""
        return list(self._get("/v1/shadow-examples"))

    def shutdown(self) -> None:
        """End all replicas and the node. A node that does not run is fine."""
        try:
            self._client.post("/shutdown", timeout=max(self._call_timeout_s, _SHUTDOWN_S))
        except httpx.ConnectError:
            return
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error

    def _post(self, path: str, **body: Any) -> None:
        self._call("POST", path, json=body)

    def _get(self, path: str, **query: Any) -> Any:
        return self._call("GET", path, params=query)

    def _call(self, method: str, path: str, **sent: Any) -> Any:
        try:
            response = self._client.request(method, path, **sent)
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._no_answer(error) from error
        if response.is_success:
            return answer
        kind = _ERRORS.get(answer.get("error", ""), ExternalError)
        raise kind(answer.get("message", f"the node answered {response.status_code} to {path}"))

    def _no_answer(self, error: Exception) -> ExternalError:
        what = f"{type(error).__name__}: {error}"
        return ExternalError(
            f"the local node at {self._url} did not answer ({what}). It keeps the traffic as it last knew it.\n"
            "Next: `khet status` shows what runs; `khet up` starts what does not."
        )


def _trust(url: str) -> ssl.SSLContext | bool:
    """Reading the certificate store takes longer than most calls do, and http has no use for it."""
    return True if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _not_ready(state: Mapping[str, Any], timeout_s: float) -> ExternalError:
    what = "gave up early" if state["hopeless"] else f"not ready after {timeout_s:g} s"
    lines = "\n".join(("", "Its last log lines:", *state["log_tail"])) if state["log_tail"] else ""
    message = f"{what}: {state['reason']}. Replicas that served before go on serving.{lines}"
    return ExternalError(message, retryable=not state["hopeless"])


def _read(what: str, parse: Callable[[], ParsedT]) -> ParsedT:
    try:
        return parse()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExternalError(f"the local node sent a {what} that cannot be read: {error!r}", retryable=False) from error


def _status(answer: Mapping[str, Any]) -> ClusterStatus:
    desired = answer["desired"]
    lease = desired["lease_expires_at"]
    return ClusterStatus(
        versions={Track(t): Version.parse(wanted["version"]) for t, wanted in desired["tracks"].items()},
        replicas=tuple(_replica(row) for row in answer["replicas"]),
        weights={Track(t): float(w) for t, w in desired["weights"].items()},
        mirror={Track(t): float(w) for t, w in desired["mirror"].items()},
        lease_expires_at=datetime.fromisoformat(lease) if lease else None,
        shares={Track(t): float(w) for t, w in desired["weights"].items()},
    )


def _replica(row: Mapping[str, Any]) -> ReplicaStatus:
    return ReplicaStatus(
        name=row["name"],
        track=Track(row["track"]),
        version=Version.parse(row["version"]),
        ready=row["ready"],
        pid_or_pod=row["pid_or_pod"],
        address=row["address"],
        started_at=datetime.fromisoformat(row["started_at"]),
        restarts=row["restarts"],
    )


def _counters(row: Mapping[str, Any]) -> TrackCounters:
    return TrackCounters(
        version=Version.parse(row["version"]),
        since=datetime.fromisoformat(row["since"]),
        requests=row["requests"],
        errors=row["errors"],
        latency_ms={float(bound): count for bound, count in row["latency_ms"].items()},
        shadow_pairs=row["shadow_pairs"],
        shadow_differ=row["shadow_differ"],
        shadow_errors=row["shadow_errors"],
        shadow_latency_ms={float(bound): count for bound, count in row["shadow_latency_ms"].items()},
        predictions=row["predictions"],
        ood=row["ood"],
        classes=dict(row["classes"]),
        shadow_ood=row["shadow_ood"],
        shadow_classes=dict(row["shadow_classes"]),
        shadow_by_class={told: (pairs, differ) for told, (pairs, differ) in row["shadow_by_class"].items()},
    )
