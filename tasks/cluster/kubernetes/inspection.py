"""`khet doctor` on a Kubernetes cluster: can the flows work there, and can pods reach what they need?

It asks as the person who runs it, and for the account of the flow runs where that may be asked. It changes nothing but
one short-lived pod (probe.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from configs.errors import ConfigError, KhetError
from configs.settings import Settings, check_areas
from tasks.cluster import Track
from tasks.cluster.kubernetes import objects, traffic
from tasks.cluster.kubernetes.adapter import KubernetesCluster
from tasks.cluster.kubernetes.addresses import for_pods, host_and_port
from tasks.cluster.kubernetes.client import (
    AUTOSCALER,
    ROUTE,
    SERVICE,
    DeniedError,
    Kind,
    Kube,
    Object,
    is_inside,
    pinned,
)
from tasks.cluster.kubernetes.permissions import Permission, needed
from tasks.cluster.kubernetes.probe import Probed, probe

State = Literal["ok", "warning", "failed", "skipped"]

# The versions whose schemas the manifests are held against (deployments/kubernetes/checks; a test compares the two).
OLDEST, NEWEST = (1, 30), (1, 37)
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SECRET = Kind("v1", "Secret", "secrets")
ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
REVIEW = "authorization.k8s.io/v1"
SELF_REVIEW = Kind(REVIEW, "SelfSubjectAccessReview", "selfsubjectaccessreviews", namespaced=False)
OTHER_REVIEW = Kind(REVIEW, "SubjectAccessReview", "subjectaccessreviews", namespaced=False)
BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
AUTOSCALER_V2 = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
POD_METRICS = Kind("metrics.k8s.io/v1beta1", "PodMetrics", "pods")

# Account, ConfigMap and Secret of the flow runs (deployments/kubernetes/base).
FLOW_RUNS: Final = "khet-pipelines"
DEFAULT_POOL: Final = "default"  # of type process
STORE_KEYS: Final = ("object-store-access-key", "object-store-secret-key")
SIGNING_SECRET, SIGNING_KEY = "khet-signing-key", "release.key"
_CALL_S: Final = 3.0  # a call that is not answered is tried three times
_LIMIT_S: Final = 27.0
_PROBE_S: Final = 20.0
_INIT: Final = "`khet cluster init` makes what is missing; with --dry-run it shows what that is."


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer. A warning or a skipped question is no failure; `fix` says what to do about it."""

    name: str
    state: State
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Ward:
    """What is looked at."""

    settings: Settings
    kube: Kube

    @property
    def area(self) -> Any:
        """cluster.kubernetes."""
        return self.settings.cluster.kubernetes


Question = Callable[[Ward], Iterable[Finding]]


def inspect(settings: Settings) -> list[Finding]:
    """Everything, side by side, in less than half a minute. Whatever does not answer is a finding, never an error."""
    area, over = settings.cluster.kubernetes, time.monotonic() + _LIMIT_S
    names = ["namespace", *QUESTIONS]
    try:
        kube = Kube.connect(area, min(_CALL_S, settings.cluster.call_timeout_s))
        server = f"{kube.host} ({_way(settings)}, namespace {area.namespace})"
        version = kube.version()
    except KhetError as error:
        fix = "Set cluster.kubernetes.kubeconfig and .context, or start the cluster."
        return [Finding("api server", "failed", str(error), fix), *_skipped(names, "the API server did not answer")]
    found = [Finding("api server", "ok", f"{server} answers"), _supported(version)]
    ward = Ward(settings, kube)
    namespace = _ask("namespace", _namespace, ward)
    if namespace[0].state == "failed":
        return [*found, *namespace, *_skipped(QUESTIONS, f"there is no namespace {area.namespace}")]
    return [*found, *namespace, *_side_by_side(ward, over)]


def _side_by_side(ward: Ward, over: float) -> list[Finding]:
    pool = concurrent.futures.ThreadPoolExecutor(len(QUESTIONS))
    asked = {name: pool.submit(_ask, name, question, ward) for name, question in QUESTIONS.items()}
    concurrent.futures.wait(asked.values(), max(0.0, over - time.monotonic()))
    pool.shutdown(wait=False, cancel_futures=True)
    late = f"no answer in time ({_LIMIT_S:g} s for all)"
    answers = [answer.result() if answer.done() else [Finding(name, "failed", late)] for name, answer in asked.items()]
    return [finding for findings in answers for finding in findings]


def _ask(name: str, question: Question, ward: Ward) -> list[Finding]:
    try:
        return list(question(ward))
    except DeniedError as error:
        return [Finding(name, "skipped", f"not allowed to look: {str(error).partition(':')[0]}", "Ask as an admin.")]
    except KhetError as error:
        return [Finding(name, "failed", str(error))]


def _skipped(names: Iterable[str], why: str) -> list[Finding]:
    return [Finding(name, "skipped", f"not asked: {why}") for name in names]


def _way(settings: Settings) -> str:
    """How this process comes to the cluster."""
    area = settings.cluster.kubernetes
    if is_inside(area):
        return "inside the cluster"
    with contextlib.suppress(ConfigError):  # of several files, as kubectl may have it
        return f"context {pinned(area).context}"
    return "as kubectl does"


def _supported(version: str) -> Finding:
    numbers = re.match(r"v(\d+)\.(\d+)", version)
    said = f"{version}; supported are {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        older = numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST
        what = "older than what is supported" if older else "not known here"
        return Finding("kubernetes version", "warning", f"{said}: {what}", "Try a release in a test namespace first.")
    return Finding("kubernetes version", "ok", said)


def _namespace(ward: Ward) -> Iterable[Finding]:
    if ward.kube.get(NAMESPACE, ward.area.namespace) is None:
        yield Finding("namespace", "failed", f"there is no namespace {ward.area.namespace}", _INIT)
    else:
        yield Finding("namespace", "ok", ward.area.namespace)


# What the flows may do, and what the API has


def _permissions(ward: Ward) -> Iterable[Finding]:
    yield _verdict("permissions", "this account", ward, None)


def _permissions_of_pods(ward: Ward) -> Iterable[Finding]:
    """What flow runs in pods may do, where there is an account for them."""
    if ward.kube.get(ACCOUNT, FLOW_RUNS) is not None:
        user = f"system:serviceaccount:{ward.area.namespace}:{FLOW_RUNS}"
        yield _verdict("permissions of pods", f"the account {FLOW_RUNS}", ward, user)


def _verdict(name: str, who: str, ward: Ward, user: str | None) -> Finding:
    wanted = needed(gateway=ward.area.gateway is not None)
    if refused := _refused(ward, wanted, user):
        fix = "Bind the roles of deployments/kubernetes/base/roles.yaml to it; `khet cluster init` applies them."
        return Finding(name, "failed", f"{who} may not {', '.join(map(str, refused))}", fix)
    return Finding(name, "ok", f"{who} may do all {len(wanted)} things that the flows do")


def _refused(ward: Ward, wanted: Sequence[Permission], user: str | None) -> list[Permission]:
    def allowed(one: Permission) -> bool:
        kind, body = review(one, ward.area.namespace, user)
        return bool(ward.kube.create(kind, body)["status"].get("allowed"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(allowed, wanted))
    return [one for one, yes in zip(wanted, answers, strict=True) if not yes]


def review(wanted: Permission, namespace: str, user: str | None) -> tuple[Kind, Object]:
    """The question whether this account, or `user`, may."""
    asked: Object = {"resourceAttributes": wanted.attributes(namespace)}
    return (OTHER_REVIEW, {"spec": {**asked, "user": user}}) if user else (SELF_REVIEW, {"spec": asked})


def _gateway(ward: Ward) -> Iterable[Finding]:
    area, served = ward.area, ward.kube.serves(ROUTE)
    if area.traffic == "gateway-api" and not (served and area.gateway):
        what = "cluster.kubernetes.gateway is not set" if served else f"the cluster serves no {ROUTE.api_version}"
        fix = "Install the Gateway API and name a Gateway, or set cluster.kubernetes.traffic to replica-ratio."
        yield Finding("gateway api", "failed", f"{what}, but cluster.kubernetes.traffic is gateway-api", fix)
        return
    if served and area.gateway and area.traffic != "replica-ratio":
        yield Finding("gateway api", "ok", f"HTTPRoute is served; {area.gateway} splits the traffic by weights")
        return
    why = "HTTPRoute is served but not used" if served else "no HTTPRoute"
    counts = ward.settings.cluster.replicas, ward.settings.cluster.canary_replicas
    least = traffic.reachable(*counts, min(ward.settings.canary.steps))
    ratio = f"the replica ratio splits the traffic: {counts[1]} canary beside {counts[0]} gets {least:.0%} or more"
    yield Finding("gateway api", "ok", f"{why}: {ratio}")


def _disruption(ward: Ward) -> Iterable[Finding]:
    if ward.kube.serves(BUDGET):
        yield Finding("disruption budget", "ok", f"{BUDGET.api_version} is served")
    else:
        said = f"no {BUDGET.api_version}: a drained node may take all replicas at once"
        yield Finding("disruption budget", "warning", said, "Drain nodes one at a time, or upgrade the cluster.")


def _autoscaling(ward: Ward) -> Iterable[Finding]:
    if not ward.kube.serves(AUTOSCALER_V2):
        yield Finding("autoscaling", "ok", f"no {AUTOSCALER_V2.api_version}: `khet scale` decides how many replicas")
        return
    scalers = [one["metadata"]["name"] for one in ward.kube.find(AUTOSCALER)]
    if scalers and not ward.kube.serves(POD_METRICS):
        said = f"{', '.join(scalers)} cannot see any load: no {POD_METRICS.api_version}"
        yield Finding("autoscaling", "warning", said, "Install metrics-server.")
        return
    yield Finding("autoscaling", "ok", f"{AUTOSCALER_V2.api_version} is served; {', '.join(scalers) or 'not used'}")


# What pods read


def _replica_settings(ward: Ward) -> Iterable[Finding]:
    name = f"ConfigMap {ward.area.config_map}"
    found = ward.kube.get(CONFIG_MAP, ward.area.config_map)
    if found is None:
        raise ConfigError(f"there is no {name}: replicas would look for AWS, and trust nobody. Next: {_INIT}")
    data = found.get("data") or {}
    if "settings.yaml" not in data:
        raise ConfigError(f"{name} has no key settings.yaml. Next: {_INIT}")
    values = _values(data["settings.yaml"], name)
    check_areas(values, f"{name}, settings.yaml")
    yield _trusted(ward, name, data, (values.get("registry") or {}).get("trusted_keys") or ())


def _values(text: str, name: str) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(text) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{name}: settings.yaml cannot be read: {error}. Next: {_INIT}") from error


def _trusted(ward: Ward, name: str, data: Mapping[str, str], listed: Sequence[str]) -> Finding:
    files = [Path(one).name for one in listed if Path(one).parent == Path(objects.ETC)]
    if not listed or (missing := [file for file in files if file not in data]):
        what = f"has no {', '.join(missing)}" if listed else "lists no registry.trusted_keys in its settings.yaml"
        return Finding("replica settings", "failed", f"{name} {what}: replicas could not verify any version", _INIT)
    own = {text for key in ward.settings.registry.trusted_keys if (text := _text(key))}
    if own and files and not own & {data[file].strip() for file in files}:
        said = f"{name}: replicas trust other keys than this terminal does, and refuse what is signed here"
        return Finding("replica settings", "failed", said, _INIT)
    return Finding("replica settings", "ok", f"{name}: settings.yaml is valid, {len(files)} public keys are trusted")


def _text(key: Path) -> str:
    try:
        return key.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _replica_secret(ward: Ward) -> Iterable[Finding]:
    name = ward.area.object_store_secret
    found = ward.kube.get(SECRET, name)
    if found is None and ward.settings.object_store.access_key_id is None:
        said = f"there is no Secret {name}: pods find credentials by themselves (workload identity), or none"
        yield Finding("replica secret", "warning", said)
        return
    yield _keys("replica secret", name, found, STORE_KEYS)


def _keys(label: str, name: str, found: Object | None, wanted: Sequence[str]) -> Finding:
    if found is None:
        return Finding(label, "failed", f"there is no Secret {name} ({', '.join(wanted)})", _INIT)
    if missing := [key for key in wanted if not (found.get("data") or {}).get(key)]:
        return Finding(label, "failed", f"Secret {name} has no {', '.join(missing)}", _INIT)
    return Finding(label, "ok", f"Secret {name} has {', '.join(wanted)}")


def _accounts(ward: Ward) -> Iterable[Finding]:
    name = ward.area.service_account or "default"
    if ward.kube.get(ACCOUNT, name) is None:
        yield Finding("service account", "failed", f"there is no ServiceAccount {name}: no replica would start", _INIT)
    else:
        yield Finding("service account", "ok", f"ServiceAccount {name}")
    if (pull := ward.area.pull_secret) is not None and ward.kube.get(SECRET, pull) is None:
        fix = f"kubectl create secret docker-registry {pull} --docker-server=... -n {ward.area.namespace}"
        yield Finding("pull secret", "failed", f"there is no Secret {pull}", fix)


def _flow_runs(ward: Ward) -> Iterable[Finding]:
    """Only where flows run as pods: their account, and what their Jobs' template names."""
    pool = ward.settings.orchestrator.work_pool
    if pool == DEFAULT_POOL:
        yield Finding("flow runs", "ok", f"flows run as processes of the work pool {pool}, not as pods")
        return
    missing = [] if ward.kube.get(CONFIG_MAP, FLOW_RUNS) else [f"ConfigMap {FLOW_RUNS}"]
    missing += [] if ward.kube.get(ACCOUNT, FLOW_RUNS) else [f"ServiceAccount {FLOW_RUNS}"]
    for name, keys in ((FLOW_RUNS, ("database-dsn",)), (SIGNING_SECRET, (SIGNING_KEY,))):
        if (finding := _keys("", name, ward.kube.get(SECRET, name), keys)).state == "failed":
            missing.append(finding.detail)
    if missing:
        yield Finding("flow runs", "failed", f"not there: {'; '.join(missing)}", _INIT)
    else:
        yield Finding("flow runs", "ok", f"account, settings and Secrets of {FLOW_RUNS}")


# What runs there


def _serving(ward: Ward) -> Iterable[Finding]:
    cluster = KubernetesCluster(ward.kube, ward.settings.cluster)
    status = cluster.status()
    if not status.versions:
        yield Finding("replicas", "ok", "no version is served yet", "`khet release` makes the first one.")
        return
    ready = [replica for replica in status.replicas if replica.ready]
    shares = ", ".join(f"{status.versions[track]} {share:.0%}" for track, share in sorted(status.weights.items()))
    said = f"{len(ready)} of {len(status.replicas)} ready; {shares or 'nobody is served'}"
    state: State = "ok" if any(replica.track is Track.stable for replica in ready) else "failed"
    yield Finding("replicas", state, said, "" if state == "ok" else f"kubectl describe pods -n {ward.area.namespace}")


def _room(ward: Ward) -> Iterable[Finding]:
    room = KubernetesCluster(ward.kube, ward.settings.cluster).room()
    said = f"the nodes have room for {room} more replicas"
    if room:
        yield Finding("room", "ok", said)
    else:
        yield Finding("room", "warning", f"{said}: a canary would wait for ever", "Add a node, or ask for less.")


def _users(ward: Ward) -> Iterable[Finding]:
    """Where predictions are asked for; from here, as the replayer and the last check of a release do it."""
    import httpx

    url = ward.settings.cluster.gateway_url
    if url is None:
        said = "cluster.gateway_url is not set: nobody here can ask the service"
        yield Finding("service", "warning", said, "Set it to an address of the Service that this machine reaches.")
        return
    try:
        answer = httpx.get(f"{url.rstrip('/')}/version", timeout=_CALL_S)
    except httpx.HTTPError as error:
        yield _unanswered(ward, url, routed=not isinstance(error, httpx.ConnectTimeout))
    else:
        yield Finding("service", "ok", f"{url}: HTTP {answer.status_code}")


def _unanswered(ward: Ward, url: str, *, routed: bool) -> Finding:
    """Nobody answers: right, before the first release, unless not even a refusal came back."""
    served = bool(KubernetesCluster(ward.kube, ward.settings.cluster).status().versions)
    service = ward.kube.get(SERVICE, ward.area.service)
    whose = f"the Service's own address is {service['spec'].get('clusterIP')}" if service else "there is no Service"
    fix = "Route the Services' addresses to this machine, or set cluster.gateway_url to one that it reaches."
    if not routed:
        return Finding("service", "failed" if served else "warning", f"{url} is not reached from here; {whose}", fix)
    if served:
        return Finding("service", "failed", f"{url} refuses connections; {whose}", fix)
    return Finding("service", "ok", f"{url}: nobody answers, and no version is served yet")


# What pods reach


def _from_a_pod(ward: Ward) -> Iterable[Finding]:
    cluster = ward.settings.cluster
    status = KubernetesCluster(ward.kube, cluster).status()
    version = status.versions.get(Track.stable)
    dsn = for_pods(ward.settings).database.dsn
    database = "{}:{}".format(*host_and_port(dsn)) if dsn else None  # nothing else of it leaves this process
    found = probe(ward.kube, cluster, version, database, _PROBE_S)
    yield from probed(found, ward.area.image)


def probed(found: Probed, image: str) -> Iterable[Finding]:
    """What a probe tells, as findings."""
    if not found.image:
        fix = "Push or load the image, or set cluster.kubernetes.image and .pull_secret."
        yield Finding("image", "failed", f"{image}: {found.problem}", fix)
        yield from _skipped(("pod",), "the image does not start")
        return
    yield Finding("image", "ok", f"{image} starts {found.where}".rstrip())
    if found.problem:
        yield Finding("pod", "failed", found.problem, "The image has to be of this version: python -m ml.reach.")
    for name, answer in found.answers.items():
        state: State = "ok" if answer.get("ok") else "failed"
        fix = "" if state == "ok" else "The address must be one that pods reach: `khet up --listen ADDRESS`."
        yield Finding(f"pod: {name}", state, str(answer.get("detail")), fix)


QUESTIONS: Final[Mapping[str, Question]] = {
    "permissions": _permissions,
    "permissions of pods": _permissions_of_pods,
    "gateway api": _gateway,
    "disruption budget": _disruption,
    "autoscaling": _autoscaling,
    "replica settings": _replica_settings,
    "replica secret": _replica_secret,
    "service account": _accounts,
    "flow runs": _flow_runs,
    "replicas": _serving,
    "room": _room,
    "service": _users,
    "pod": _from_a_pod,
}
