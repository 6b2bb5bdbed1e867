"""`khet cluster init`: everything that people own in a cluster, from an overlay and this machine's settings.

Objects are applied server-side under a field manager of their own, one after the other, and only where they differ: run
again after whatever stopped it, it goes on. What the flows move (Deployments, weights) is not touched.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from configs.errors import ConfigError, KhetError
from configs.settings import Settings, check_areas, profile_name
from deployments.kubernetes.checks import policy
from deployments.kubernetes.checks.build import ENVIRONMENTS, ROOT, Object, build
from tasks.cluster.kubernetes import objects
from tasks.cluster.kubernetes.addresses import for_pods
from tasks.cluster.kubernetes.client import SERVICE, Kind, Kube
from tasks.cluster.kubernetes.inspection import FLOW_RUNS, NAMESPACE, SECRET, SIGNING_KEY, SIGNING_SECRET, STORE_KEYS
from tasks.cluster.kubernetes.procedures import comparable
from tasks.cluster.procedures import diff

MANAGER: Final = "khet-cluster-init"
_BASE: Final = "khet-guard"  # the namespace that the manifests name
_PUBLIC: Final = "release.pub"
_PROFILES: Final = {"local-cluster": "local", "staging": "production", "production": "production"}
_STORE: Final = ("endpoint_url", "region", "models_bucket", "data_bucket")


@dataclass(frozen=True, slots=True)
class Change:
    """One object that differs, or is not there. Its manifest may hold secrets; its diff never does."""

    name: str
    kind: Kind
    manifest: Object = field(repr=False)
    diff: str = field(repr=False)
    manager: str = MANAGER


@dataclass(frozen=True, slots=True)
class Setup:
    """What init would do. `cluster` is what the settings of this machine have to say of the cluster afterwards."""

    changes: tuple[Change, ...]
    unchanged: tuple[str, ...]
    unserved: tuple[str, ...]
    left_out: tuple[str, ...]
    missing: tuple[str, ...]
    cluster: Mapping[str, Any]


def plan_setup(settings: Settings, kube: Kube, overlay: str, image: str | None = None) -> Setup:
    """Compare an overlay, filled in for this machine, with the cluster. Nothing is changed.

    `kube` must write as `MANAGER`; `image` is run instead of the overlay's.

    Raises:
        ConfigError: no such overlay, not one for this profile, or an address that no pod reaches.
        ExternalError: the API server does not answer.
    """
    built = [in_namespace(one, kube.namespace) for one in build(_folder(overlay))]
    wanted, left_out = _chosen(built, settings)
    cluster = _cluster(wanted, settings, image)
    wanted = [_filled(one, settings, cluster) for one in wanted] + list(_secrets(settings, cluster))
    kinds = _Kinds(kube)
    served = [one for one in wanted if kinds.of(one) is not None]
    is_there = kube.get(NAMESPACE, kube.namespace) is not None
    planned = [_change(kube, kind, one, is_there) for one in served if (kind := kinds.of(one)) is not None]
    planned += _users(kube, cluster, is_there)
    return Setup(
        changes=tuple(change for change in planned if change.diff),
        unchanged=tuple(change.name for change in planned if not change.diff),
        unserved=tuple(f"{policy.name(one)} ({one['apiVersion']})" for one in wanted if one not in served),
        left_out=tuple(policy.name(one) for one in left_out),
        missing=tuple(_missing(kube, served, is_there)),
        cluster=cluster,
    )


def apply(kube: Kube, changes: Sequence[Change]) -> None:
    """Make the changes.

    Raises:
        SafetyError: somebody else owns a field with another value.
        ConfigError: a permission is missing, or an object is not valid.
        ExternalError: the API server does not answer.
    """
    done: list[str] = []
    for change in changes:
        try:
            kube.written_by(change.manager).apply(change.kind, change.manifest["metadata"]["name"], change.manifest)
        except KhetError as error:
            before = f"Applied before it: {', '.join(done)}; the same command goes on from there." if done else ""
            raise type(error)("\n".join(filter(None, (f"{change.name}: {error}", before)))) from error
        done.append(change.name)


def address(kube: Kube, settings: Settings) -> str | None:
    """Base URL of the users' Service inside the cluster; None where it has no address of its own."""
    found = kube.get(SERVICE, settings.cluster.kubernetes.service)
    at = found["spec"].get("clusterIP") if found else None
    return f"http://{at}" if found and at and at != "None" else None


def default_overlay() -> str:
    """The overlay of this profile."""
    return next(overlay for overlay, profile in reversed(_PROFILES.items()) if profile == profile_name())


def in_namespace(found: Object, namespace: str) -> Object:
    """The same object for another namespace than that of the manifests; what is in none gets a name of its own."""
    if namespace == _BASE:
        return found
    text = yaml.safe_dump(found).replace(f"namespace: {_BASE}\n", f"namespace: {namespace}\n")
    moved: Object = yaml.safe_load(text)
    if moved["kind"] == "Namespace":
        moved["metadata"]["name"] = namespace
    if moved["kind"].startswith("ClusterRole"):
        moved["metadata"]["name"] += f"-{namespace}"
    if moved["kind"] == "ClusterRoleBinding":
        moved["roleRef"]["name"] += f"-{namespace}"
    return moved


def _folder(overlay: str) -> Path:
    if overlay not in ENVIRONMENTS:
        raise ConfigError(f"there is no overlay {overlay} (known: {', '.join(ENVIRONMENTS)}). Nothing was changed.")
    if _PROFILES[overlay] != profile_name():
        raise ConfigError(
            f"the overlay {overlay} belongs to the profile {_PROFILES[overlay]}, this is {profile_name()}. Nothing was "
            f"changed.\nNext: KHET_PROFILE={_PROFILES[overlay]} khet cluster init --overlay {overlay}"
        )
    return ROOT / "overlays" / overlay


def _chosen(built: Sequence[Object], settings: Settings) -> tuple[list[Object], list[Object]]:
    """What is applied, and what is not: where Prefect runs on this machine, its server and workers in the cluster."""
    if settings.stack.orchestrator != "embedded":
        return list(built), []
    ours: list[Object] = []
    prefect: list[Object] = []
    for one in built:
        component = one["metadata"]["labels"]["app.kubernetes.io/component"]
        (prefect if component == "orchestration" else ours).append(one)
    return ours, prefect


# Settings: the overlay says how replicas run, this machine's settings where the systems are


def _cluster(built: Sequence[Object], settings: Settings, image: str | None) -> dict[str, Any]:
    """The area `cluster` of flows that run here, so that they make the same replicas as flows in the cluster do."""
    found = next(one for one in built if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", FLOW_RUNS))
    area: dict[str, Any] = yaml.safe_load(found["data"]["settings.yaml"])["cluster"]
    own, kubernetes = settings.cluster.kubernetes, area["kubernetes"]
    kubernetes |= {"namespace": own.namespace} | ({"image": image} if image else {})
    way = {"kubeconfig": own.kubeconfig, "context": own.context}
    kubernetes |= {name: str(value) for name, value in way.items() if value is not None}
    area = {name: value for name, value in area.items() if name != "gateway_url"}
    check_areas({"cluster": area}, "cluster")
    return area


def _filled(found: Object, settings: Settings, cluster: Mapping[str, Any]) -> Object:
    name = found["metadata"]["name"]
    if found["kind"] != "ConfigMap" or name not in (cluster["kubernetes"].get("config_map", "ml-service"), FLOW_RUNS):
        return found
    values = yaml.safe_load(found["data"]["settings.yaml"])
    reachable, keys = for_pods(settings), _public_keys(settings)
    store = settings.object_store.model_fields_set & set(_STORE)
    given = {one: getattr(reachable.object_store, one) for one in store}
    values["object_store"] = {**values.get("object_store", {}), **given}
    values["registry"] = {**values.get("registry", {}), "trusted_keys": [f"{objects.ETC}/{one}" for one in keys]}
    if name == FLOW_RUNS:
        ours = {one: value for one, value in cluster["kubernetes"].items() if one not in ("kubeconfig", "context")}
        values["cluster"] = {**values["cluster"], "kubernetes": ours}
        if settings.stack.orchestrator == "embedded":
            values["orchestrator"] = {**values["orchestrator"], "api_url": reachable.orchestrator.api_url}
    text = yaml.safe_dump(values, sort_keys=True)
    return {**found, "data": {**found["data"], "settings.yaml": text, **keys}}


def _public_keys(settings: Settings) -> dict[str, str]:
    """The public keys that this machine trusts, by the names of their files in a pod."""
    trusted = settings.registry.trusted_keys
    if not trusted:
        raise ConfigError(
            "registry.trusted_keys is empty: replicas could verify no version. Nothing was changed.\n"
            "Next: name the public key of those who publish (`khet up` makes a pair)."
        )
    names = [_PUBLIC] if len(trusted) == 1 else [f"release-{number}.pub" for number in range(1, len(trusted) + 1)]
    return {name: _read(key) for name, key in zip(names, trusted, strict=True)}


def _read(key: Path) -> str:
    try:
        return key.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}. Nothing was changed. Next: correct registry.*.") from error


# Secrets: from the settings, never shown


def _secrets(settings: Settings, cluster: Mapping[str, Any]) -> Iterator[Object]:
    """The Secrets whose values this machine's settings have. Flow runs get theirs where they are pods."""
    store = settings.object_store
    keys: dict[str, str] = {}
    if store.access_key_id and store.secret_access_key:
        keys = dict(zip(STORE_KEYS, (store.access_key_id, store.secret_access_key.get_secret_value()), strict=True))
    namespace = settings.cluster.kubernetes.namespace
    name = cluster["kubernetes"].get("object_store_secret", settings.cluster.kubernetes.object_store_secret)
    yield from _secret(name, namespace, keys, "serving")
    if settings.stack.orchestrator == "embedded":
        return
    dsn, wandb, auth = for_pods(settings).database.dsn, settings.tracking.api_key, settings.orchestrator.auth_string
    own = {"database-dsn": dsn, "wandb-api-key": wandb}
    shown = {one: value.get_secret_value() for one, value in own.items() if value}
    yield from _secret(FLOW_RUNS, namespace, {**keys, **shown}, "flow-run")
    key = settings.registry.signing_key
    yield from _secret(SIGNING_SECRET, namespace, {SIGNING_KEY: _read(key)} if key else {}, "flow-run")
    yield from _secret("prefect-api", namespace, {"auth-string": auth.get_secret_value()} if auth else {}, "flow-run")


def _secret(name: str, namespace: str, values: Mapping[str, str], component: str) -> Iterator[Object]:
    if not values:
        return
    labels = {objects.NAME: name, "app.kubernetes.io/component": component, "app.kubernetes.io/part-of": "khet-guard"}
    yield {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": {**labels, objects.MANAGED_BY: objects.MANAGER}},
        "type": "Opaque",
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in values.items()},
    }


def _missing(kube: Kube, wanted: Iterable[Object], is_there: bool) -> Iterator[str]:
    """Secrets that pods of these objects cannot start without, and that nobody has made."""
    made = {one["metadata"]["name"] for one in wanted if one["kind"] == "Secret"}
    named = {
        reference["name"]
        for one in wanted
        for container in policy.containers(one)
        for variable in container.get("env") or ()
        if (reference := variable.get("valueFrom", {}).get("secretKeyRef")) and not reference.get("optional")
    }
    for name in sorted(named - made):
        if not is_there or kube.get(SECRET, name) is None:
            yield name


# What differs


class _Kinds:
    """Where the cluster serves a kind, asked once a group."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._known: dict[str, Mapping[str, Kind]] = {}

    def of(self, found: Object) -> Kind | None:
        """None where this cluster does not have it."""
        group = found["apiVersion"]
        if group not in self._known:
            self._known[group] = self._kube.kinds(group)
        return self._known[group].get(found["kind"])


def _change(kube: Kube, kind: Kind, wanted: Object, is_there: bool, manager: str = MANAGER) -> Change:
    """The difference as the API server works it out; where there is no namespace yet, all of the object."""
    name = wanted["metadata"]["name"]
    live: Object = (kube.get(kind, name) if is_there or not kind.namespaced else None) or {}
    planned = wanted
    if is_there or not kind.namespaced:
        planned = kube.written_by(manager).apply(kind, name, wanted, dry_run=True)
    before, after = _readable(comparable(live), comparable(planned))
    return Change(policy.name(wanted), kind, wanted, diff(before, after, policy.name(wanted)), manager)


def _readable(live: Object, planned: Object) -> tuple[Object, Object]:
    """For a diff: files line by line, and Secrets without their values, only with which of them change."""
    before, after = live.get("data") or {}, planned.get("data") or {}
    if planned.get("kind") == "ConfigMap":
        return _with_data(live, _lines(before)), _with_data(planned, _lines(after))
    if planned.get("kind") == "Secret":
        shown = {key: "(hidden)" if before.get(key) == value else "(hidden, new)" for key, value in after.items()}
        return _with_data(live, dict.fromkeys(before, "(hidden)")), _with_data(planned, shown)
    return live, planned


def _lines(data: Mapping[str, str]) -> dict[str, list[str]]:
    return {file: text.splitlines() for file, text in data.items()}


def _with_data(found: Object, data: Mapping[str, Any]) -> Object:
    return {**found, "data": dict(data)} if found else {}


def _users(kube: Kube, cluster: Mapping[str, Any], is_there: bool) -> list[Change]:
    """The users' Service, which the flows make where it is missing: it has to be there for an address to be known."""
    area = Settings.model_fields["cluster"].annotation.model_validate(cluster)  # type: ignore[union-attr]
    name = area.kubernetes.service
    if is_there and kube.get(SERVICE, name) is not None:
        return []
    whole = {"apiVersion": "v1", "kind": "Service", **objects.service(area.kubernetes)}
    whole["metadata"] = {**whole["metadata"], "name": name, "namespace": kube.namespace}
    return [_change(kube, SERVICE, whole, is_there, objects.MANAGER)]
