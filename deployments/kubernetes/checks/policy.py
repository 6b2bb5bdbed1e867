"""This project's rules for manifests. Pure: objects in, sentences out.

They are stricter than the restricted Pod Security Standard, which the namespace enforces as well: what it leaves open
(limits, probes, pinned images, a read-only root filesystem) is said here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

Object = dict[str, Any]
Rule = Callable[[Object], Iterable[str]]
REQUIRED_LABELS: Final = tuple(f"app.kubernetes.io/{name}" for name in ("name", "component", "part-of", "managed-by"))
_SERVERS: Final = frozenset(("Deployment", "StatefulSet", "DaemonSet"))
_HOST: Final = ("hostNetwork", "hostPID", "hostIPC")
_VOLUMES: Final = frozenset(("configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"))
_TAG: Final = re.compile(r".+:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]*)$")
_DIGEST: Final = re.compile(r".+@sha256:[0-9a-f]{64}$")
_CREDENTIAL: Final = re.compile(r"(ACCESS_KEY|PASSWORD|AUTH_STRING|API_KEY|DSN|DATABASE_CONNECTION_URL|_TOKEN)$")
_PROBES: Final = ("startupProbe", "readinessProbe", "livenessProbe")


def violations(found: Object) -> list[str]:
    """What one object does that no object here may."""
    return [problem for rule in RULES for problem in rule(found)]


def pod_templates(found: Object) -> Iterator[Object]:
    """The templates of the pods that an object makes."""
    spec = found.get("spec") or {}
    if found.get("kind") == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if "template" in spec:
        yield spec["template"]
    for replica in (spec.get("pytorchReplicaSpecs") or {}).values():
        yield replica["template"]


def containers(found: Object) -> Iterator[Object]:
    """All its containers, those that run first included."""
    for template in pod_templates(found):
        yield from template["spec"].get("initContainers") or ()
        yield from template["spec"].get("containers") or ()


def pinned_images(found: Object) -> Iterator[str]:
    """An image has a digest, or a tag that is no moving one."""
    for one in containers(found):
        image = one.get("image", "")
        tagged = _TAG.match(image.rpartition("/")[2])
        if not _DIGEST.match(image) and (tagged is None or tagged["tag"] == "latest"):
            yield f"{one['name']}: image {image or '(none)'} is not pinned by a tag or digest"


def privileges(found: Object) -> Iterator[str]:
    """Nothing that reaches the node."""
    for template in pod_templates(found):
        spec = template["spec"]
        yield from (f"{field} is on" for field in _HOST if spec.get(field))
        for volume in spec.get("volumes") or ():
            yield from (f"volume {volume['name']} is a {kind}" for kind in volume.keys() - _VOLUMES - {"name"})
    for one in containers(found):
        context = one.get("securityContext") or {}
        if context.get("privileged"):
            yield f"{one['name']}: privileged"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{one['name']}: allowPrivilegeEscalation is not false"
        if (context.get("capabilities") or {}) != {"drop": ["ALL"]}:
            yield f"{one['name']}: capabilities are not dropped, or some are added"
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{one['name']}: readOnlyRootFilesystem is not true"
        yield from (f"{one['name']}: hostPort {p['hostPort']}" for p in one.get("ports") or () if "hostPort" in p)


def users(found: Object) -> Iterator[str]:
    """Pods are nobody special, under the runtime's seccomp profile."""
    for template in pod_templates(found):
        context = template["spec"].get("securityContext") or {}
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield "the pod does not run as a user of its own (runAsNonRoot, runAsUser)"
        if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
            yield "the pod's seccompProfile is not RuntimeDefault"


def accounts(found: Object) -> Iterator[str]:
    """A pod says who it is, and whether it gets a token; Services do not leak into its environment."""
    for template in pod_templates(found):
        spec = template["spec"]
        if spec.get("serviceAccountName", "default") == "default":
            yield "the pod has no service account of its own"
        if not isinstance(spec.get("automountServiceAccountToken"), bool):
            yield "automountServiceAccountToken is not said"
        if spec.get("enableServiceLinks") is not False:
            yield "enableServiceLinks is not false: a Service's variables would be read as settings"


def limits(found: Object) -> Iterator[str]:
    """CPU and memory: what is promised, and the most."""
    for one in containers(found):
        resources = one.get("resources") or {}
        for side in ("requests", "limits"):
            for resource in ("cpu", "memory"):
                if resource not in (resources.get(side) or {}):
                    yield f"{one['name']}: no {side}.{resource}"


def probes(found: Object) -> Iterator[str]:
    """Whatever serves for ever is asked whether it has started, is ready, and lives."""
    if found.get("kind") not in _SERVERS:
        return
    for template in pod_templates(found):
        for one in template["spec"]["containers"]:
            yield from (f"{one['name']}: no {probe}" for probe in _PROBES if probe not in one)


def protocols(found: Object) -> Iterator[str]:
    """Server-side apply of older servers takes no port without its protocol."""
    ports: list[tuple[str, Mapping[str, Any]]] = [
        (one["name"], port) for one in containers(found) for port in one.get("ports") or ()
    ]
    if found.get("kind") == "Service":
        ports += [("Service", port) for port in found["spec"].get("ports") or ()]
    if found.get("kind") == "NetworkPolicy":
        spec = found["spec"]
        ways = [*(spec.get("ingress") or ()), *(spec.get("egress") or ())]
        ports += [("NetworkPolicy", port) for way in ways for port in way.get("ports") or ()]
    yield from (f"{whose}: port {dict(port)} has no protocol" for whose, port in ports if "protocol" not in port)


def labels(found: Object) -> Iterator[str]:
    """The recommended labels, on objects and on pods."""
    of_object = found["metadata"].get("labels") or {}
    yield from (f"no label {name}" for name in REQUIRED_LABELS if name not in of_object)
    for template in pod_templates(found):
        of_pod = (template.get("metadata") or {}).get("labels") or {}
        yield from (f"pods have no label {name}" for name in REQUIRED_LABELS if name not in of_pod)


def secrets(found: Object) -> Iterator[str]:
    """Manifests name Secrets and never hold them, nor a password in the environment."""
    if found.get("kind") == "Secret":
        yield "a Secret has no place among the manifests: refer to it by name"
    for one in containers(found):
        for variable in one.get("env") or ():
            if "value" in variable and re.search(
                r"SECRET_ACCESS_KEY|PASSWORD|AUTH_STRING$|API_KEY$|DSN", variable["name"]
            ):
                yield f"{one['name']}: {variable['name']} is written out, not taken from a Secret"


def rights(found: Object) -> Iterator[str]:
    """Roles name what they allow, and none may read Secrets or become somebody else."""
    if found.get("kind") not in ("Role", "ClusterRole"):
        return
    for rule in found.get("rules") or ():
        for field in ("apiGroups", "resources", "verbs"):
            if "*" in (rule.get(field) or ()):
                yield f"a rule allows every one of its {field}"
        yield from (f"a rule allows {verb}" for verb in rule["verbs"] if verb in ("bind", "escalate", "impersonate"))
        if any(resource.partition("/")[0] == "secrets" for resource in rule.get("resources") or ()):
            yield "a rule reads or writes Secrets"


RULES: Final[tuple[Rule, ...]] = (
    pinned_images, privileges, users, accounts, limits, probes, protocols, labels, secrets, rights,
)  # fmt: skip


def unresolved(objects: Sequence[Object]) -> list[str]:
    """What the objects of one environment say of each other and is not so. Secrets are outside, on purpose."""
    return [problem for check in (_references, _selectors, _targets, _denied) for problem in check(objects)]


def _named(objects: Sequence[Object], kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in objects if one["kind"] == kind}


def _references(objects: Sequence[Object]) -> Iterator[str]:
    config_maps, service_accounts = _named(objects, "ConfigMap"), _named(objects, "ServiceAccount")
    for one in objects:
        for template in pod_templates(one):
            spec = template["spec"]
            if spec.get("serviceAccountName") not in service_accounts:
                yield f"{name(one)}: there is no ServiceAccount {spec.get('serviceAccountName')}"
            used = {volume["configMap"]["name"] for volume in spec.get("volumes") or () if "configMap" in volume}
            yield from (f"{name(one)}: there is no ConfigMap {missing}" for missing in sorted(used - config_maps))
    for binding in (one for one in objects if one["kind"].endswith("RoleBinding")):
        role = binding["roleRef"]
        if role["name"] not in _named(objects, role["kind"]):
            yield f"{name(binding)}: there is no {role['kind']} {role['name']}"
        missing = {subject["name"] for subject in binding["subjects"]} - service_accounts
        yield from (f"{name(binding)}: there is no ServiceAccount {one}" for one in sorted(missing))


def _selectors(objects: Sequence[Object]) -> Iterator[str]:
    """Services and disruption budgets that select no pod; a track's pods come and go with the flows."""
    pods = [template["metadata"]["labels"] for one in objects for template in pod_templates(one)]
    for one in objects:
        if one["kind"] == "Service":
            wanted = one["spec"]["selector"]
        elif one["kind"] == "PodDisruptionBudget":
            wanted = one["spec"]["selector"]["matchLabels"]
        else:
            continue
        steady = {label: value for label, value in wanted.items() if label != "khet.guard/track"}
        if not any(steady.items() <= labels_of_pod.items() for labels_of_pod in pods):
            yield f"{name(one)}: selects no pod"


def _targets(objects: Sequence[Object]) -> Iterator[str]:
    for one in (one for one in objects if one["kind"] == "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        scaled = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (target["kind"], target["name"])]
        if not scaled:
            yield f"{name(one)}: there is no {target['kind']} {target['name']}"
        yield from (f"{name(o)}: replicas belong to the autoscaler" for o in scaled if "replicas" in o["spec"])


def _denied(objects: Sequence[Object]) -> Iterator[str]:
    """Every namespace with pods denies traffic by default, both ways."""
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    denying = {
        one["metadata"].get("namespace")
        for one in policies
        if one["spec"].get("podSelector") == {}
        and set(one["spec"].get("policyTypes", ())) == {"Ingress", "Egress"}
        and not one["spec"].get("ingress")
        and not one["spec"].get("egress")
    }
    used = {one["metadata"].get("namespace") for one in objects if any(pod_templates(one))}
    yield from (f"namespace {open_one} has no NetworkPolicy that denies by default" for open_one in used - denying)


def name(found: Object) -> str:
    """Kind and name, as people write them."""
    metadata = found.get("metadata") or {}
    return f"{found.get('kind')}/{metadata.get('name') or metadata.get('generateName')}"
