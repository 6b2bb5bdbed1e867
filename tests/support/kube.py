"""A real Kubernetes for tests: the one that KHET_TEST_KUBECONFIG names, or a node that a neighbouring tool starts.

KHET_TEST_CLUSTER names the tool's folder (`cluster up | load`, `image`); without it `../shared/kubernetes` is looked
for. Without any the tests are skipped, and say so. Each test has a namespace of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shutil
import socket
import socketserver
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from configs.areas import ClusterSettings
from tasks.cluster.kubernetes import KubernetesCluster
from tasks.cluster.kubernetes.client import SERVICE, Kind
from tests.support.node import STUB, eventually

PROJECT = Path(__file__).resolve().parents[2]
IMAGE = "docker.io/library/khet-stub:1"
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
ROLE = Kind("rbac.authorization.k8s.io/v1", "Role", "roles")
BINDING = Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "khet-stub-image"
_KUBECONFIG = _CACHE / "kubeconfig"
_START_S = 900


def tools() -> Path | None:
    """The folder with `cluster` and `image`."""
    places = [os.environ.get("KHET_TEST_CLUSTER"), PROJECT.parent / "shared" / "kubernetes"]
    found = (Path(place) for place in places if place)
    return next((place for place in found if (place / "cluster").exists() and (place / "image").exists()), None)


@functools.lru_cache(maxsize=1)
def kubeconfig() -> Path:
    """The kubeconfig of the cluster under test, which runs and has the stub's image; else the test is skipped."""
    if named := os.environ.get("KHET_TEST_KUBECONFIG"):
        return Path(named)
    folder = tools()
    if folder is None:
        pytest.skip("no cluster: set KHET_TEST_KUBECONFIG, or KHET_TEST_CLUSTER to a tool that starts one")
    with one_at_a_time():
        found = _running(folder) or _started(folder)
        archive = stub_image(folder)
        subprocess.run([folder / "cluster", "load", archive], check=True, capture_output=True, timeout=_START_S)
    return found


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """While one session starts the cluster or loads an image, another one waits."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _running(folder: Path) -> Path | None:
    """The kubeconfig of a cluster that runs whole. It is not started once more: that would write the configuration of
    its kube-proxy anew, over which that one exits."""
    parts = subprocess.run([folder / "cluster", "status"], check=False, capture_output=True, text=True, timeout=60)
    if " down" in parts.stdout or not _KUBECONFIG.exists():
        return None
    found = Path(_KUBECONFIG.read_text())
    return found if found.exists() else None


def _started(folder: Path) -> Path:
    started = subprocess.run([folder / "cluster", "up"], check=False, capture_output=True, text=True, timeout=_START_S)
    if started.returncode:
        pytest.skip(f"the test cluster does not start: {started.stderr[-500:]}")
    found = Path(started.stdout.strip().splitlines()[-1])
    _KUBECONFIG.write_text(str(found))
    return found


def stub_image(folder: Path) -> Path:
    """An archive with the stub replica and this Python, written anew where either has changed."""
    archive, stamp = _CACHE / "stub.tar", _CACHE / "stamp"
    wanted = f"{sys.version}\n{STUB.read_text()}"
    if archive.exists() and stamp.exists() and stamp.read_text() == wanted:
        return archive
    with tempfile.TemporaryDirectory(dir=_CACHE) as made:
        root = Path(made) / "root"
        _assemble(root)
        entry = [_interpreter(), "/app/stub_replica.py", "--behaviour", "/etc/khet/behaviour.json"]
        subprocess.run([folder / "image", IMAGE, root, archive, *entry], check=True, timeout=_START_S)
    stamp.write_text(wanted)
    return archive


def _interpreter() -> str:
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")


def _assemble(root: Path) -> None:
    """A root filesystem of this Python, two of its packages, `sleep` and the libraries they need."""
    for folder in ("app", "tmp", "etc/khet", "var/cache/khet", "proc", "sys", "dev"):
        (root / folder).mkdir(parents=True)
    standard = Path(sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}))
    unneeded = shutil.ignore_patterns("test", "tests", "idlelib", "tkinter", "site-packages", "__pycache__", "config-*")
    shutil.copytree(standard, root / standard.relative_to("/"), ignore=unneeded)
    for name in ("uvloop", "httptools"):
        shutil.copytree(Path(sysconfig.get_path("purelib")) / name, root / "app" / name)
    shutil.copy(STUB, root / "app" / STUB.name)
    sleep = shutil.which("sleep")
    assert sleep is not None
    programs = [Path(_interpreter()), Path(sleep)]
    for program in programs:
        _copy(program, root)
    for binary in [*programs, *root.rglob("*.so")]:
        for library in _libraries(binary):
            _copy(library, root)


def _copy(file: Path, root: Path) -> None:
    target = root / file.relative_to("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.resolve(), target)


def _libraries(binary: Path) -> list[Path]:
    listed = subprocess.run(["ldd", binary], check=False, capture_output=True, text=True, timeout=30).stdout
    return [Path(word) for line in listed.splitlines() for word in line.split() if word.startswith("/")]


class Forwarder:
    """A door to a server that a test can close: for the clients behind it the server is gone."""

    def __init__(self, host: str, port: int, listen: str = "127.0.0.1") -> None:
        self._connections: set[socket.socket] = set()
        self._listen = listen
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError), socket.create_connection((host, port)) as upstream:
                    outer._connections |= {self.request, upstream}
                    back = threading.Thread(target=_pump, args=(upstream, self.request), daemon=True)
                    back.start()
                    _pump(self.request, upstream)
                    back.join()

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        self._make = lambda port: Server((listen, port), Handler)
        self.port = 0
        self.open()

    @property
    def address(self) -> str:
        """Where it listens: host:port."""
        return f"{self._listen}:{self.port}"

    def open(self) -> None:
        """Let connections through, at the port that it had before."""
        self._server = self._make(self.port)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Refuse new connections and cut those there are. Twice is fine."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@dataclass
class KubeNamespace:
    """A namespace of its own, a client for it, and a door in between."""

    home: Path
    settings: dict[str, Any] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"khet-test-{secrets.token_hex(4)}"
        loaded = yaml.safe_load(kubeconfig().read_text())
        server = httpx.URL(loaded["clusters"][0]["cluster"]["server"])
        self.door = Forwarder(server.host, server.port or 443)
        loaded["clusters"][0]["cluster"] |= {"server": f"https://127.0.0.1:{self.door.port}"}
        self.kubeconfig = self.home / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(loaded))
        self.kubeconfig.chmod(0o600)
        self.client = KubernetesCluster.from_settings(self.cluster_settings())
        direct = self.cluster_settings(kubeconfig=kubeconfig())
        self.admin = KubernetesCluster.from_settings(direct).kube  # goes on when the door is closed

    def cluster_settings(self, **changes: Any) -> ClusterSettings:
        """Settings that work on a small node."""
        small = {"requests": {"cpu": "20m", "memory": "32Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}}
        base = {"kubeconfig": self.kubeconfig, "namespace": self.name, "image": IMAGE, "pull_policy": "Never"}
        kubernetes = {**base, **small, "pre_stop_s": 2, "config_map": "stub", **self.settings, **changes}
        cluster = {"ready_timeout_s": 60.0, **self.cluster}
        return ClusterSettings(backend="kubernetes", kubernetes=kubernetes, **cluster)

    def account(self, name: str) -> Path:
        """A kubeconfig of this service account, as a pod of it has it."""
        from kubernetes.client import CoreV1Api
        from kubernetes.config import new_client_from_config

        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 7200}}
        core = CoreV1Api(new_client_from_config(str(self.kubeconfig)))
        answer = core.create_namespaced_service_account_token(name, self.name, asked)
        config = yaml.safe_load(self.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": answer.status.token}
        file = self.home / f"{name}.kubeconfig"
        file.write_text(yaml.safe_dump(config))
        file.chmod(0o600)
        return file

    def behave(self, **versions: dict[str, Any]) -> None:
        """Set how versions behave that start from now on: behave(v1_1_0={"answer": "rust"})."""
        named = {version.replace("_", "."): how for version, how in versions.items()}
        self.admin.apply(CONFIG_MAP, "stub", {"data": {"behaviour.json": json.dumps(named)}})

    def limited(self, rules: list[dict[str, Any]]) -> Path:
        """A kubeconfig of an account that may do just this."""
        subject = {"kind": "ServiceAccount", "name": "limited", "namespace": self.name}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "limited"}
        self.admin.apply(ACCOUNT, "limited", {})
        self.admin.apply(ROLE, "limited", {"rules": rules})
        self.admin.apply(BINDING, "limited", {"roleRef": reference, "subjects": [subject]})
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        path = f"/api/v1/namespaces/{self.name}/serviceaccounts/limited/token"
        loaded = yaml.safe_load(kubeconfig().read_text())
        loaded["users"][0]["user"] = {"token": self.admin._json("POST", path, asked)["status"]["token"]}
        file = self.home / "limited"
        file.write_text(yaml.safe_dump(loaded))
        file.chmod(0o600)
        return file

    def users_url(self) -> str:
        """Where users' Service answers; the Service is made where it is missing, so that there is an address."""
        from tasks.cluster.kubernetes import objects

        settings = self.cluster_settings().kubernetes
        if self.admin.get(SERVICE, settings.service) is None:
            self.admin.apply(SERVICE, settings.service, objects.service(settings))
        found = self.admin.get(SERVICE, settings.service)
        assert found is not None
        return f"http://{found['spec']['clusterIP']}:{found['spec']['ports'][0]['port']}"

    def answers(self, body: bytes = b"leaf") -> bool:
        """Whether a user of the Service gets an answer. The node's own proxy learns of a new Service seconds later."""
        try:
            return httpx.post(f"{self.users_url()}/predict", content=body, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def start(self) -> KubeNamespace:
        """Make the namespace."""
        self.admin.create(NAMESPACE, {"metadata": {"name": self.name}})
        eventually(lambda: self.admin.get(ACCOUNT, "default"), 30)
        self.behave()
        return self

    def stop(self) -> None:
        """Take everything away; what ends, ends later."""
        self.door.close()
        self.admin.delete(NAMESPACE, self.name)


@contextlib.contextmanager
def running_namespace(home: Path, **options: Any) -> Iterator[KubeNamespace]:
    """A namespace, deleted afterwards."""
    namespace = KubeNamespace(home, **options)
    try:
        yield namespace.start()
    finally:
        namespace.stop()
