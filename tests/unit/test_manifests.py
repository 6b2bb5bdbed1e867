"""The Kubernetes manifests: what they promise of themselves, of the flows and of the settings."""

from __future__ import annotations

import ast
import copy
import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.areas import ClusterSettings
from configs.base import read_yaml
from configs.settings import PROFILES, PROJECT_ROOT, Settings
from deployments.kubernetes.checks import __main__ as checks
from deployments.kubernetes.checks import policy, schemas
from deployments.kubernetes.checks.build import ENVIRONMENTS, ROOT, TRAINING, Object
from deployments.kubernetes.checks.pools import TEMPLATES, job, known_to_kubernetes
from ml.train import load_config, parse_arguments
from ml.version import Version
from tasks.cluster import Track
from tasks.cluster.kubernetes import client, inspection, objects
from tasks.cluster.kubernetes.permissions import PERMISSIONS, needed

ADAPTER = PROJECT_ROOT / "tasks" / "cluster" / "kubernetes"
POOLS = ("kubernetes", "gpu")
Change = Callable[[Object], Any]


@pytest.fixture(scope="module")
def checked() -> tuple[list[str], dict[str, list[Object]]]:
    return checks.check()


@pytest.fixture
def production(checked) -> list[Object]:
    return copy.deepcopy(checked[1]["overlays/production"])


def named(found: list[Object], kind: str, name: str) -> Object:
    return next(one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name))


def pod(found: Object) -> Object:
    return found["spec"]["template"]["spec"]


def first(found: Object) -> Object:
    return pod(found)["containers"][0]


def test_everything_builds_is_valid_for_all_versions_and_keeps_the_rules(checked):
    wrong, groups = checked
    assert wrong == []
    kinds = {one["kind"] for one in groups["overlays/production"]}
    assert {"Deployment", "HTTPRoute", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= kinds
    assert schemas.VERSIONS == ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")


BROKEN: dict[str, tuple[policy.Rule, str, Change, str]] = {
    "latest": (policy.pinned_images, "Deployment", lambda d: first(d).update(image="a.b/c:latest"), "not pinned"),
    "no tag": (policy.pinned_images, "Deployment", lambda d: first(d).update(image="a.b:5000/c"), "not pinned"),
    "no image": (policy.pinned_images, "Deployment", lambda d: first(d).pop("image"), "(none) is not pinned"),
    "privileged": (
        policy.privileges, "Deployment", lambda d: first(d)["securityContext"].update(privileged=True), "privileged",
    ),
    "escalation": (
        policy.privileges, "Deployment", lambda d: first(d)["securityContext"].pop("allowPrivilegeEscalation"),
        "allowPrivilegeEscalation is not false",
    ),
    "capability": (
        policy.privileges, "Deployment",
        lambda d: first(d)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]), "or some are added",
    ),
    "writable root": (
        policy.privileges, "Deployment", lambda d: first(d)["securityContext"].pop("readOnlyRootFilesystem"),
        "readOnlyRootFilesystem",
    ),
    "no context": (policy.privileges, "Deployment", lambda d: first(d).pop("securityContext"), "capabilities"),
    "host network": (policy.privileges, "Deployment", lambda d: pod(d).update(hostNetwork=True), "hostNetwork is on"),
    "host path": (
        policy.privileges, "Deployment",
        lambda d: pod(d)["volumes"].append({"name": "node", "hostPath": {"path": "/"}}), "node is a hostPath",
    ),
    "host port": (
        policy.privileges, "Deployment", lambda d: first(d)["ports"][0].update(hostPort=8080), "hostPort 8080",
    ),
    "root": (policy.users, "Deployment", lambda d: pod(d)["securityContext"].update(runAsUser=0), "user of its own"),
    "maybe root": (
        policy.users, "Deployment", lambda d: pod(d)["securityContext"].pop("runAsNonRoot"), "user of its own",
    ),
    "unconfined": (
        policy.users, "Deployment", lambda d: pod(d)["securityContext"].pop("seccompProfile"), "seccompProfile",
    ),
    "default account": (
        policy.accounts, "Deployment", lambda d: pod(d).pop("serviceAccountName"), "no service account of its own",
    ),
    "maybe a token": (
        policy.accounts, "Deployment", lambda d: pod(d).pop("automountServiceAccountToken"), "Token is not said",
    ),
    "service links": (policy.accounts, "Deployment", lambda d: pod(d).pop("enableServiceLinks"), "read as settings"),
    "no limit": (policy.limits, "Deployment", lambda d: first(d)["resources"]["limits"].pop("memory"), "limits.memory"),
    "no request": (policy.limits, "Deployment", lambda d: first(d)["resources"].pop("requests"), "no requests.cpu"),
    "no startup probe": (policy.probes, "Deployment", lambda d: first(d).pop("startupProbe"), "no startupProbe"),
    "no readiness probe": (policy.probes, "Deployment", lambda d: first(d).pop("readinessProbe"), "no readinessProbe"),
    "no liveness probe": (policy.probes, "Deployment", lambda d: first(d).pop("livenessProbe"), "no livenessProbe"),
    "container port": (
        policy.protocols, "Deployment", lambda d: first(d)["ports"][0].pop("protocol"), "has no protocol",
    ),
    "service port": (
        policy.protocols, "Service", lambda s: s["spec"]["ports"][0].pop("protocol"), "Service: port",
    ),
    "policy port": (
        policy.protocols, "NetworkPolicy", lambda n: n["spec"]["ingress"][0]["ports"][0].pop("protocol"),
        "NetworkPolicy: port",
    ),
    "no label": (
        policy.labels, "Service", lambda s: s["metadata"]["labels"].pop("app.kubernetes.io/component"), "no label",
    ),
    "unlabelled pods": (
        policy.labels, "Deployment", lambda d: d["spec"]["template"]["metadata"].pop("labels"),
        "pods have no label",
    ),
    "a secret": (policy.secrets, "Service", lambda s: s.update(kind="Secret"), "no place among the manifests"),
    "a password": (
        policy.secrets, "Deployment",
        lambda d: first(d)["env"].append({"name": "KHET_DATABASE__DSN", "value": "postgres://me:secret@db"}),
        "not taken from a Secret",
    ),
    "any verb": (policy.rights, "Role", lambda r: r["rules"][0].update(verbs=["*"]), "every one of its verbs"),
    "any resource": (policy.rights, "Role", lambda r: r["rules"][0].update(resources=["*"]), "of its resources"),
    "reads secrets": (policy.rights, "Role", lambda r: r["rules"][0].update(resources=["secrets"]), "Secrets"),
    "impersonates": (policy.rights, "Role", lambda r: r["rules"][0].update(verbs=["impersonate"]), "impersonate"),
}  # fmt: skip
SAMPLES = {"Role": "khet-pipelines"}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_a_rule_is_named(production, case):
    rule, kind, change, said = BROKEN[case]
    sample = named(production, kind, SAMPLES.get(kind, "ml-service"))
    assert policy.violations(sample) == []
    change(sample)
    assert any(said in problem for problem in rule(sample)), list(rule(sample))


def test_every_rule_has_an_example_that_breaks_it():
    assert {rule for rule, *_ in BROKEN.values()} == set(policy.RULES)


UNRESOLVED: dict[str, tuple[str, str, Change, str]] = {
    "account": (
        "Deployment", "ml-service", lambda d: pod(d).update(serviceAccountName="nobody"), "no ServiceAccount nobody",
    ),
    "config map": (
        "Deployment", "ml-service", lambda d: pod(d)["volumes"][0]["configMap"].update(name="gone"), "ConfigMap gone",
    ),
    "role": ("RoleBinding", "khet-pipelines", lambda b: b["roleRef"].update(name="admin"), "there is no Role admin"),
    "subject": ("RoleBinding", "khet-pipelines", lambda b: b["subjects"][0].update(name="me"), "ServiceAccount me"),
    "service": ("Service", "ml-service", lambda s: s["spec"]["selector"].update(app="x"), "selects no pod"),
    "budget": (
        "PodDisruptionBudget", "ml-service", lambda b: b["spec"]["selector"]["matchLabels"].update(app="x"), "no pod",
    ),
    "autoscaler": (
        "HorizontalPodAutoscaler", "ml-service", lambda h: h["spec"]["scaleTargetRef"].update(name="web"),
        "there is no Deployment web",
    ),
    "replicas": ("Deployment", "ml-service", lambda d: d["spec"].update(replicas=3), "belong to the autoscaler"),
    "open": (
        "NetworkPolicy", "default-deny", lambda n: n["spec"].update(policyTypes=["Ingress"]), "denies by default",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNRESOLVED)
def test_objects_that_do_not_fit_together_are_named(production, case):
    kind, name, change, said = UNRESOLVED[case]
    change(named(production, kind, name))
    assert any(said in problem for problem in policy.unresolved(production)), policy.unresolved(production)


@pytest.mark.parametrize("version", schemas.VERSIONS)
def test_a_misspelt_field_is_named_for_every_version(production, version):
    deployment = named(production, "Deployment", "ml-service")
    first(deployment)["readynessProbe"] = first(deployment).pop("readinessProbe")
    problems = schemas.problems(deployment, version)
    assert len(problems) == 1
    assert problems[0].startswith(f"Kubernetes {version}: spec.template.spec.containers.0: ")
    assert "readynessProbe" in problems[0]


def test_a_wrong_type_and_a_kind_that_is_gone_are_named(production):
    scaler = named(production, "HorizontalPodAutoscaler", "ml-service")
    scaler["spec"]["maxReplicas"] = "ten"
    assert schemas.problems(scaler, "1.36") == ["Kubernetes 1.36: spec.maxReplicas: 'ten' is not of type 'integer'"]
    gone = {**scaler, "apiVersion": "autoscaling/v2beta2"}
    assert schemas.problems(gone, "1.36") == ["Kubernetes 1.36 has no HorizontalPodAutoscaler of autoscaling/v2beta2"]


def test_custom_kinds_are_held_against_their_schemas_and_their_pods_against_kubernetes(checked, production):
    route = named(production, "HTTPRoute", "ml-service")
    route["spec"]["rules"] = [{"backendRefs": [{"name": "ml-service-stable", "port": 80, "weight": 1_000_001}]}]
    assert any("1000001 is greater than" in problem for problem in schemas.problems(route, "1.36"))
    training = copy.deepcopy(named(checked[1]["training/pytorchjob"], "PyTorchJob", "khet-train"))
    training["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["restartPolicies"] = "Never"
    assert any("restartPolicies" in problem for problem in schemas.problems(training, "1.36"))


@pytest.mark.parametrize("weights", [{Track.stable: 1.0}, {Track.stable: 0.95, Track.canary: 0.05}])
def test_the_route_that_the_flows_write_is_a_valid_one(weights):
    settings = ClusterSettings.model_validate({"kubernetes": {"gateway": "gateways/public"}}).kubernetes
    route = objects.route(settings, weights)
    whole = {"apiVersion": client.ROUTE.api_version, "kind": client.ROUTE.name, **route}
    assert schemas.problems(whole, "1.36") == []


def settings_of(environment: str, file: str) -> dict[str, Any]:
    """The areas that a process with this file has, over the production profile that the images name."""
    profile = read_yaml(PROFILES / "production.yaml")
    own = read_yaml(ROOT / "overlays" / environment / file)
    return {area: {**profile.get(area, {}), **own.get(area, {})} for area in {*profile, *own}}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("file", ["replicas.yaml", "pipelines.yaml"])
def test_the_settings_in_the_config_maps_are_known_ones(environment, file):
    for area, values in settings_of(environment, file).items():
        model = Settings.model_fields[area].annotation
        assert model.model_validate(values)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_is_applied_by_hand_is_what_the_flows_make(checked, environment):
    """Else the first release after it would report a conflict, or change more than the version."""
    cluster = ClusterSettings.model_validate(settings_of(environment, "pipelines.yaml")["cluster"])
    applied = checked[1][f"overlays/{environment}"]
    made: dict[tuple[str, str], Object] = {
        ("Deployment", "ml-service"): objects.deployment(cluster, Track.stable, Version.parse("v1.0.0")),
        ("Service", "ml-service"): objects.service(cluster.kubernetes),
    }
    for track in Track:
        made["Service", objects.service_name(cluster.kubernetes, track)] = objects.service(cluster.kubernetes, track)
    for (kind, name), wanted in made.items():
        by_hand = named(applied, kind, name)
        assert by_hand["spec"] == wanted["spec"], name
        assert by_hand["metadata"]["labels"] == wanted["metadata"]["labels"]


VERBS = {
    "get": ("get",), "find": ("list",), "list": ("list",), "apply": ("create", "patch"), "merge": ("patch",),
    "create": ("create",), "replace": ("update",), "delete": ("delete",), "wait_change": ("watch",),
    "text": ("get",), "serves": (),
}  # fmt: skip


# The doctor looks as the person who asks, with that person's rights.
DOCTOR = ("inspection.py", "probe.py")


def permissions_used() -> set[tuple[str, str, str]]:
    """(group, resource, verb) of every call of `Kube` in the adapter, read from its source."""
    used = set()
    for file in sorted(file for file in ADAPTER.glob("*.py") if file.name not in DOCTOR):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and (verbs := called(call)) is not None:
                kind = getattr(client, ast.unparse(call.args[0]).removeprefix("client."))
                group = kind.api_version.rpartition("/")[0]
                used |= {(group, kind.plural + below(call), verb) for verb in verbs}
    return used


def called(call: ast.Call) -> tuple[str, ...] | None:
    if not isinstance(call.func, ast.Attribute):
        return None
    whose = ast.unparse(call.func.value).rpartition(".")[2]
    return VERBS[call.func.attr] if whose in ("_kube", "kube") and call.args else None


def below(call: ast.Call) -> str:
    """The subresource: named, or the first part of the path below a pod."""
    for keyword in call.keywords:
        if keyword.arg == "subresource":
            return f"/{ast.literal_eval(keyword.value)}"
    if call.func.attr == "text":  # type: ignore[attr-defined]
        return f"/{ast.literal_eval(call.args[2]).partition('/')[0]}"
    return ""


def granted(found: list[Object], kind: str, name: str) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in named(found, kind, name)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_pipelines_may_do_what_they_do_and_nothing_else(production):
    everywhere = granted(production, "ClusterRole", "khet-pipelines-capacity")
    assert everywhere == {("", "nodes", "list"), ("", "pods", "list")}
    inside = granted(production, "Role", "khet-pipelines")
    assert inside == permissions_used() - {("", "nodes", "list")}
    # What `khet doctor` asks for is what they are granted.
    asked = {(one.group, one.resource, one.verb, one.everywhere) for one in PERMISSIONS}
    assert asked == {(*one, False) for one in inside} | {(*one, True) for one in everywhere}
    assert {one.group for one in PERMISSIONS} - {one.group for one in needed(gateway=False)} == {
        "gateway.networking.k8s.io"
    }


def test_the_doctor_knows_the_versions_that_the_manifests_are_held_against():
    oldest, newest = (f"{major}.{minor}" for major, minor in (inspection.OLDEST, inspection.NEWEST))
    assert (schemas.VERSIONS[0], schemas.VERSIONS[-1]) == (oldest, newest)


def secret_keys(found: Object) -> set[tuple[str, str]]:
    """(Secret, key) that an object's containers read; a volume's key is the name of its file."""
    sources = [v.get("valueFrom", {}) for one in policy.containers(found) for v in one.get("env") or ()]
    used = {(s["secretKeyRef"]["name"], s["secretKeyRef"]["key"]) for s in sources if "secretKeyRef" in s}
    volumes = [v for template in policy.pod_templates(found) for v in template["spec"].get("volumes") or ()]
    return used | {(v["secret"]["secretName"], "release.key") for v in volumes if "secret" in v}


def test_every_secret_that_is_used_is_listed_for_people_to_make(checked, production):
    used = {key for one in production for key in secret_keys(one)}
    used |= {key for pool in POOLS for key in secret_keys(job(TEMPLATES / f"{pool}.json"))}
    used |= {key for folder in TRAINING for one in checked[1][folder] for key in secret_keys(one)}
    listed, name = set(), ""
    for line in (ROOT / "base" / "kustomization.yaml").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"#   (\S*) +((?:[a-z][a-z.-]+(?:, |,$)?)+)", line):
            name = found[1] or name
            listed |= {(name, key) for key in re.split(r",\s*", found[2].strip(", ")) if key}
    assert used == {(secret, key) for secret, key in listed if secret != "kubectl"}


def test_replicas_and_training_have_no_rights_and_no_token(production):
    bound = {
        subject["name"] for one in production if one["kind"].endswith("RoleBinding") for subject in one["subjects"]
    }
    assert bound == {"khet-pipelines", "prefect-worker"}
    assert pod(named(production, "Deployment", "ml-service"))["automountServiceAccountToken"] is False
    assert pod(job(TEMPLATES / "gpu.json"))["automountServiceAccountToken"] is False


@pytest.mark.parametrize("pool", POOLS)
def test_the_job_that_prefect_makes_of_a_template_keeps_the_rules(pool):
    made = prefect_job(pool)
    whole = known_to_kubernetes(made.job_manifest)
    assert policy.violations(whole) == []
    assert [problem for version in schemas.VERSIONS for problem in schemas.problems(whole, version)] == []
    assert first(whole)["args"] == ["prefect", "flow-run", "execute"]
    assert made.namespace == "khet-guard"
    named_ones = {one["name"]: one for one in first(whole)["env"]}
    assert named_ones["PREFECT__FLOW_RUN_ID"]["value"]
    assert named_ones["KHET_DATABASE__DSN"]["valueFrom"]["secretKeyRef"]["name"] == "khet-pipelines"
    # Other than for its name and what a run adds, the Job is the one that `make check` looks at.
    ours = job(TEMPLATES / f"{pool}.json")
    assert {**pod(whole), "containers": None} == {**pod(ours), "containers": None}
    assert first(whole)["volumeMounts"] == first(ours)["volumeMounts"]
    assert first(whole)["resources"] == first(ours)["resources"]


def prefect_job(pool: str) -> Any:
    """As a worker does it, short of asking the server for blocks and variables: the templates name none."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    template = json.loads((TEMPLATES / f"{pool}.json").read_text(encoding="utf-8"))
    properties = template["variables"]["properties"]
    values = {name: one["default"] for name, one in properties.items() if "default" in one}
    made = KubernetesWorkerJobConfiguration(**apply_values(template["job_configuration"], values))
    made.prepare_for_flow_run(FlowRun(flow_id=uuid.uuid4(), name="steady-leaf"))
    return made


def test_the_gpu_pool_asks_for_gpus_where_they_are():
    spec = pod(job(TEMPLATES / "gpu.json"))
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"


@pytest.mark.parametrize(("folder", "kind"), [("training/pytorchjob", "PyTorchJob"), ("training/torchrun", "Job")])
def test_training_on_pods_is_started_with_options_that_the_training_has(checked, folder, kind):
    started = named(checked[1][folder], kind, "khet-train")
    for template in policy.pod_templates(started):
        command = template["spec"]["containers"][0]["command"]
        asked = parse_arguments(command[command.index("ml.train") + 1 :])
        config = load_config(PROJECT_ROOT / asked.config, asked.overrides)
        assert (config.nodes, config.devices, config.strategy) == (2, 1, "ddp")
        assert asked.store == "training/khet-train"
        assert template["spec"]["initContainers"][0]["command"] == ["khet", "data", "fetch", asked.data]


@pytest.mark.parametrize("folder", TRAINING)
def test_training_on_pods_needs_nothing_that_outlives_them_but_the_object_store(checked, production, folder):
    found = checked[1][folder]
    assert {one["kind"] for one in found} <= {"Job", "PyTorchJob", "Service"}
    for template in (template for one in found for template in policy.pod_templates(one)):
        kinds = {kind for volume in template["spec"]["volumes"] for kind in volume if kind != "name"}
        assert kinds == {"emptyDir", "configMap"}
        own = {one["name"] for one in template["spec"]["containers"][0]["env"]}
        assert {"KHET_OBJECT_STORE__ACCESS_KEY_ID", "KHET_OBJECT_STORE__SECRET_ACCESS_KEY"} <= own
    jobs = [one for one in found if one["kind"] != "Service"]  # whose pods get their label from the Job controller
    assert policy.unresolved([*production, *jobs]) == [], "accounts and ConfigMaps are those of the environment"


@pytest.mark.parametrize("environment", ["staging", "production"])
def test_releases_train_in_the_gpu_pool_which_cannot_sign(environment):
    settings = settings_of(environment, "pipelines.yaml")
    assert (settings["training"]["where"], settings["orchestrator"]["train_pool"]) == ("deployment", "gpu")
    assert secret_keys(job(TEMPLATES / "kubernetes.json")) - secret_keys(job(TEMPLATES / "gpu.json")) == {
        ("khet-signing-key", "release.key")
    }


def test_manifests_differ_between_environments_only_where_they_should(checked):
    _, groups = checked
    local = {policy.name(one) for one in groups["overlays/local-cluster"]}
    whole = {policy.name(one) for one in groups["overlays/production"]}
    assert whole - local == {
        "HTTPRoute/ml-service", "HorizontalPodAutoscaler/ml-service", "Deployment/prefect-worker-gpu",
    }  # fmt: skip
    assert not local - whole


def test_a_folder_that_cannot_be_built_is_an_error_with_kustomize_s_words(tmp_path: Path):
    from configs.errors import ConfigError
    from deployments.kubernetes.checks.build import build

    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": ["gone.yaml"]}))
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        build(tmp_path)
