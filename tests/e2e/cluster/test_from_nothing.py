"""The README's way from an empty cluster to a served model, command by command as it is printed there."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from configs.areas import KubernetesSettings
from configs.settings import PROJECT_ROOT
from deployments.kubernetes.checks.build import kubectl
from tasks.audit import audit
from tasks.cluster.kubernetes.client import SERVICE, Kube
from tasks.cluster.kubernetes.inspection import CONFIG_MAP, NAMESPACE
from tests.e2e.conftest import GOOD, QUICK
from tests.support.cluster_stack import reachable_address
from tests.support.images import loaded_serving_image
from tests.support.kube import kubeconfig
from tests.support.local_stack import LocalStack
from tests.support.node import eventually
from tests.support.replica import photo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
# What a person replaces: the context, and the address that pods reach.
CONTEXT, ADDRESS = "kind-kind", "172.18.0.1"


def printed() -> list[list[str]]:
    """The commands of the section "On Kubernetes"."""
    section = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8").partition("\n## On Kubernetes\n")[2]
    block = re.findall(r"(?m)^    (\S.*)$", section.partition("\n## ")[0])
    return [shlex.split(line) for line in block]


@dataclass
class Person(LocalStack):
    """Somebody with a kubeconfig, a machine that pods reach, and nothing else."""

    kube: Kube
    address: str

    def types(self, command: list[str], *more: str, code: int = 0) -> str:
        """What is printed, with this cluster's names; `more` is what makes it quick enough for a test."""
        names = {CONTEXT: self.context, ADDRESS: self.address}
        done = self.khet(*(names.get(word, word) for word in command[1:]), *more, code=code, timeout_s=600)
        return done.stdout + done.stderr

    @property
    def context(self) -> str:
        return str(yaml.safe_load(kubeconfig().read_text())["current-context"])

    def kubectl(self, *arguments: str) -> str:
        command = [kubectl(), "--kubeconfig", kubeconfig(), "-n", self.kube.namespace, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    namespace, home = f"khet-test-{secrets.token_hex(4)}", tmp_path / "khet"
    area = KubernetesSettings(kubeconfig=kubeconfig(), namespace=namespace)
    kube = Kube.connect(area, 10)
    environment = {**os.environ, **QUICK, "KHET_HOME": str(home), "KUBECONFIG": str(kubeconfig())}
    environment.pop("PREFECT_HOME", None)
    someone = Person(home, environment, home / "faults.json", kube, reachable_address(kube))
    try:
        yield someone
    finally:
        someone.khet("down", code=None)
        name = f"khet-pipelines-capacity-{namespace}"
        someone.kubectl("delete", "clusterrole,clusterrolebinding", name, "--ignore-not-found")
        kube.delete(NAMESPACE, namespace)


def answering(url: str) -> str | None:
    """The version that answers users; None while the node's own proxy does not know the new Service."""
    try:
        answer = httpx.post(f"{url}/predict", content=photo(), headers={"content-type": "image/jpeg"}, timeout=20)
        answer.raise_for_status()
    except httpx.HTTPError:  # refused, or answered by whatever has that address outside of the node
        return None
    return str(answer.json()["model_version"])


def test_from_an_empty_cluster_to_a_served_model(person: Person, tmp_path: Path) -> None:
    build, up, init, data, release = printed()
    assert build[:2] == ["make", "images"]  # here it is assembled, without a container engine
    image, namespace = loaded_serving_image(), person.kube.namespace
    config = tmp_path / "good.yaml"
    config.write_text(GOOD)

    person.types(up)
    own = ("--namespace", namespace, "--image", image)
    shown = person.types(init, *own, "--dry-run")
    assert "+++ planned/Role/khet-pipelines" in shown
    assert person.kube.get(NAMESPACE, namespace) is None

    shown += person.types(init, *own)
    store = person.settings()["object_store"]
    assert store["secret_access_key"] not in shown
    assert person.settings()["database"]["dsn"].split("@")[0] not in shown
    assert person.kubectl("get", "pods") == ""  # the doctor's is gone, and no other is there yet
    person.types(data, "--count", "1200")
    person.types(release, "--config", str(config))

    version = person.production()
    assert version is not None
    service = person.kube.get(SERVICE, "ml-service")
    assert service is not None
    url = f"http://{service['spec']['clusterIP']}"
    eventually(lambda: answering(url) == version, 60, f"an answer of {version}")
    assert image in person.kubectl("get", "deployment", "ml-service", "-o", "wide")

    checks = {check["name"]: check for check in person.json("doctor")}
    assert f"{version} is there, signed by a key that is trusted here" in checks["cluster: pod: object store"]["detail"]
    for name in ("cluster: permissions of pods", "cluster: pod: database", "cluster: service", "cluster: watchdog"):
        assert checks[name]["state"] == "ok", checks[name]

    assert person.json(*init[1:3], *own, "--dry-run")["changed"] == []
    records = [record for record in audit(person.typed()).tail(500) if record.action == "cluster init"]
    assert [record.outcome for record in records] == ["intended", "done"]

    mine = {"data": {"settings.yaml": "registry: {trusted_keys: [/etc/khet/mine.pub]}"}}
    person.kube.written_by("kubectl-edit").merge(CONFIG_MAP, "ml-service", mine)
    said = person.types(init, *own, code=6)
    assert "kubectl-edit set .data.settings.yaml by other means; nothing was overwritten" in said
