"""A few verbs on a few kinds of object, with timeouts, through the official client; its exceptions end here.

Objects are plain dicts: what is sent is what a manifest says, and the same on every version of the API.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from urllib3 import Retry
from urllib3.exceptions import HTTPError

from configs.areas import KubernetesSettings
from configs.errors import ConfigError, ExternalError, KhetError, SafetyError

Object = dict[str, Any]
_CONNECT_S: Final = 3.05
_CONNECTIONS: Final = 32  # kept open; the doctor asks about that much side by side
_MERGE: Final = "application/merge-patch+json"
_APPLY: Final = "application/apply-patch+yaml"
_JSON: Final = "application/json"
# Reads and writes that may be repeated: a connection that was kept open ends when the API server is restarted.
_RETRIES: Final = Retry(total=2, backoff_factor=0.1, allowed_methods=("GET", "PUT"))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object and where the API has it."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    @property
    def root(self) -> str:
        """Path of its group and version."""
        return f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"


DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
REPLICA_SET = Kind("apps/v1", "ReplicaSet", "replicasets")
SERVICE = Kind("v1", "Service", "services")
POD = Kind("v1", "Pod", "pods")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
EVENT = Kind("v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
ROUTE = Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes")
AUTOSCALER = Kind("autoscaling/v1", "HorizontalPodAutoscaler", "horizontalpodautoscalers")


class StaleError(SafetyError):
    """The object was changed since it was read; read it again."""


class Kube:
    """One namespace of one cluster.

    Every call raises only: ConfigError (credentials refused, a permission or namespace is missing, an object is not
    valid), SafetyError (somebody else owns the fields), StaleError, ExternalError (no answer; retryable).
    """

    def __init__(self, api: Any, namespace: str, *, timeout_s: float, manager: str) -> None:
        self._api = api
        self._timeout_s = timeout_s
        self.namespace = namespace
        self.manager = manager

    @classmethod
    def connect(cls, settings: KubernetesSettings, timeout_s: float) -> Kube:
        """The configured cluster; nothing is sent yet.

        Raises:
            ConfigError: there is no kubeconfig, or it has no such context.
        """
        from kubernetes.client import ApiClient

        return cls(
            ApiClient(_configuration(settings)), settings.namespace, timeout_s=timeout_s, manager=settings.field_manager
        )

    def get(self, kind: Kind, name: str) -> Object | None:
        """The object, None without one."""
        try:
            return self._json("GET", self._path(kind, name))
        except NotFoundError:
            return None

    def find(self, kind: Kind, selector: str = "", *, everywhere: bool = False, fields: str = "") -> list[Object]:
        """All objects whose labels match, of this namespace or of all."""
        path = f"{kind.root}/{kind.plural}" if everywhere else self._path(kind)
        query = {"labelSelector": selector, "fieldSelector": fields}
        found = self._json("GET", path, query={name: value for name, value in query.items() if value})
        return list(found.get("items") or ())

    def apply(self, kind: Kind, name: str, wanted: Object, *, dry_run: bool = False) -> Object:
        """Server-side apply; fields that another manager owns with another value are a SafetyError, never taken."""
        whole = {"apiVersion": kind.api_version, "kind": kind.name, **wanted}
        whole["metadata"] = {**wanted.get("metadata", {}), "name": name}
        query = self._writing(dry_run) | {"force": "false"}
        return self._json("PATCH", self._path(kind, name), whole, query=query, content=_APPLY)

    def merge(self, kind: Kind, name: str, change: Object, *, subresource: str = "", dry_run: bool = False) -> Object:
        """JSON merge patch: what `change` names is set, None removes. With metadata.resourceVersion in it the object
        must be as it was read (else StaleError)."""
        path = "/".join(filter(None, (self._path(kind, name), subresource)))
        return self._json("PATCH", path, change, query=self._writing(dry_run), content=_MERGE)

    def create(self, kind: Kind, wanted: Object) -> Object:
        """A new object. StaleError where it exists already."""
        whole = {"apiVersion": kind.api_version, "kind": kind.name, **wanted}
        return self._json("POST", self._path(kind), whole, query=self._writing(False))

    def replace(self, kind: Kind, name: str, whole: Object) -> Object:
        """Write all of an object, as it was read but for the changes. StaleError where it changed meanwhile."""
        return self._json("PUT", self._path(kind, name), whole, query=self._writing(False))

    def delete(self, kind: Kind, name: str) -> None:
        """Delete the object and, later, what it owns. One that is not there is fine."""
        try:
            self._json("DELETE", self._path(kind, name), {"propagationPolicy": "Background"})
        except NotFoundError:
            return

    def text(self, kind: Kind, name: str, rest: str, query: Mapping[str, Any] | None = None) -> str:
        """What lies below an object: a pod's log, or its /metrics through the API server."""
        path = f"{self._path(kind, name)}/{rest}"
        return self._send("GET", path, query=query).decode("utf-8", "replace")

    def wait_change(self, kind: Kind, seen: Object, seconds: int) -> None:
        """Return when the object is no longer as it was seen, after `seconds` at the latest.

        A version that the server has forgotten (410) counts as a change: the caller reads the object anyway.
        """
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={seen['metadata']['name']}",
            "resourceVersion": seen["metadata"]["resourceVersion"],
            "timeoutSeconds": max(1, seconds),
        }
        try:
            response = self._open("GET", self._path(kind), query=query, silence_s=seconds + self._timeout_s)
            try:
                next(iter(response.response.stream(1)), None)
            finally:
                response.response.close()
        except _GoneError:
            return
        except HTTPError as error:
            raise self._silence(error) from error

    def serves(self, kind: Kind) -> bool:
        """Whether the cluster's API has this kind."""
        return kind.name in self.kinds(kind.api_version)

    def kinds(self, api_version: str) -> dict[str, Kind]:
        """The kinds that the cluster's API has in a group and version."""
        try:
            found = self._json("GET", Kind(api_version, "", "").root)
        except NotFoundError:
            return {}
        return {
            one["kind"]: Kind(api_version, one["kind"], one["name"], one["namespaced"])
            for one in found.get("resources", ())
            if "/" not in one["name"]
        }

    def written_by(self, manager: str) -> Kube:
        """The same, for another owner of fields."""
        return Kube(self._api, self.namespace, timeout_s=self._timeout_s, manager=manager)

    def version(self) -> str:
        """Version of the API server, as v1.36.2."""
        return str(self._json("GET", "/version").get("gitVersion", ""))

    @property
    def host(self) -> str:
        """Address of the API server."""
        return str(self._api.configuration.host)

    def _path(self, kind: Kind, name: str = "") -> str:
        within = f"namespaces/{self.namespace}" if kind.namespaced else ""
        return "/".join(filter(None, (kind.root, within, kind.plural, name)))

    def _writing(self, dry_run: bool) -> dict[str, str]:
        return {"fieldManager": self.manager} | ({"dryRun": "All"} if dry_run else {})

    def _json(self, method: str, path: str, body: Any = None, **sent: Any) -> Object:
        answer = self._send(method, path, body, **sent)
        try:
            return dict(json.loads(answer))
        except ValueError as error:
            raise ExternalError(f"{self.host} sent something else than JSON for {method} {path}.") from error

    def _send(self, method: str, path: str, body: Any = None, **sent: Any) -> bytes:
        response = self._open(method, path, body, **sent)
        try:
            return bytes(response.read())
        except HTTPError as error:
            raise self._silence(error) from error

    def _open(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        content: str = _JSON,
        silence_s: float | None = None,
    ) -> Any:
        from kubernetes.client.exceptions import OpenApiException

        try:
            method, url, headers, body, _ = self._api.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json, */*", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
            )
            timeout = (_CONNECT_S, silence_s or self._timeout_s)
            response = self._api.call_api(method, url, headers, body, _request_timeout=timeout)
            if response.status >= 400:
                raise refusal(response.status, response.read(), f"{method} {path}", self.manager)
        except (HTTPError, OpenApiException) as error:
            raise self._silence(error) from error
        return response

    def _silence(self, error: Exception) -> ExternalError:
        reason = getattr(error, "reason", None) or error
        return ExternalError(
            f"the API server at {self.host} did not answer ({type(reason).__name__}: {reason}). The cluster goes on as "
            "it last was.\nNext: `kubectl get --raw /readyz` shows whether it is up."
        )


def _configuration(settings: KubernetesSettings) -> Any:
    from kubernetes import config
    from kubernetes.client import Configuration

    found = Configuration()
    try:
        if is_inside(settings):
            config.load_incluster_config(client_configuration=found)  # type: ignore[no-untyped-call]
        else:
            file = str(settings.kubeconfig) if settings.kubeconfig else None
            config.load_kube_config(  # type: ignore[no-untyped-call]
                config_file=file, context=settings.context, client_configuration=found
            )
    except (config.ConfigException, OSError, ValueError) as error:
        where = settings.kubeconfig or os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser()
        raise _leads_nowhere(where, error) from error
    found.retries = _RETRIES
    found.connection_pool_maxsize = _CONNECTIONS
    return found


def is_inside(settings: KubernetesSettings) -> bool:
    """Whether the account of this process's own pod is used."""
    return settings.kubeconfig is None and settings.context is None and "KUBERNETES_SERVICE_HOST" in os.environ


def pinned(settings: KubernetesSettings) -> KubernetesSettings:
    """The same cluster by file and context, whatever the environment or `kubectl config use-context` says later.

    Raises:
        ConfigError: there is no kubeconfig, it has no such context, or it is made of several files.
    """
    if is_inside(settings):
        return settings
    from kubernetes.config import ConfigException, list_kube_config_contexts

    named = str(settings.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep)
    files = [file for one in named if one and (file := Path(one).expanduser().resolve()).exists()]
    if len(files) != 1:
        raise ConfigError(
            f"{' and '.join(named)}: one kubeconfig is wanted. Nothing was changed. Next: --kubeconfig FILE"
        )
    try:
        known, current = list_kube_config_contexts(str(files[0]))  # type: ignore[no-untyped-call]
    except ConfigException as error:
        raise _leads_nowhere(files[0], error) from error
    context = settings.context or current["name"]
    if context not in {one["name"] for one in known}:
        raise _leads_nowhere(files[0], f"it has no context {context}")
    return settings.model_copy(update={"kubeconfig": files[0], "context": context})


def _leads_nowhere(where: object, why: object) -> ConfigError:
    return ConfigError(
        f"{where} does not say how to reach a cluster: {why}. Nothing was started.\n"
        "Next: set cluster.kubernetes.kubeconfig and .context, or check `kubectl config get-contexts`."
    )


class NotFoundError(ConfigError):
    """404."""


class DeniedError(ConfigError):
    """403: a permission is missing."""


class _GoneError(ExternalError):
    """410: the server has forgotten this version."""


_DENIED: Final = re.compile(r'cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)"(?: in API group "(?P<group>[^"]*)")?')
_OWNED: Final = re.compile(r'conflict with "(?P<manager>[^"]+)"')


def refusal(status: int, body: bytes, asked: str, manager: str) -> KhetError:
    """What the API server's answer means to us; `manager` is our own name as owner of fields."""
    answer = _status(body)
    message = str(answer.get("message") or body[:500].decode("utf-8", "replace"))
    if status == 401:
        return ConfigError(f"the cluster refused the credentials ({asked}). Nothing was changed. Next: log in again.")
    if status == 403:
        return DeniedError(_denied(message))
    if status == 404:
        return NotFoundError(f"{message}. Nothing was changed. Next: check cluster.kubernetes.namespace.")
    if status == 409:
        return _conflict(answer, message, manager)
    if status == 410:
        return _GoneError(message)
    if status == 429 or status >= 500:
        return ExternalError(f"the API server answered {status} to {asked}: {message}")
    return ConfigError(f"the API server did not accept {asked} ({status}): {message}. Nothing was changed.")


def _denied(message: str) -> str:
    found = _DENIED.search(message)
    if found is None:  # an admission policy, a quota
        return f"the cluster does not allow it: {message}. Nothing was changed."
    group = f".{found['group']}" if found["group"] else ""
    return (
        f"the permission to {found['verb']} {found['resource']}{group} is missing: {message}. Nothing was changed.\n"
        "Next: add this verb and resource to the Role of the pipelines; `khet doctor` lists all that are needed."
    )


def _conflict(answer: Mapping[str, Any], message: str, manager: str) -> SafetyError:
    causes: Iterable[Mapping[str, str]] = (answer.get("details") or {}).get("causes") or ()
    owned = [cause for cause in causes if cause.get("reason") == "FieldManagerConflict"]
    if not owned:
        return StaleError(f"{message} Nothing was changed.")
    names = sorted({found["manager"] for cause in owned if (found := _OWNED.search(cause.get("message", "")))})
    fields = ", ".join(cause.get("field", "?") for cause in owned)
    return SafetyError(
        f"{' and '.join(names) or 'somebody'} set {fields} by other means; nothing was overwritten.\n"
        f"Next: keep that change in the settings of cluster.kubernetes, or give the fields back with "
        f"`kubectl apply --server-side --force-conflicts --field-manager={manager}`."
    )


def _status(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
