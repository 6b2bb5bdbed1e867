"""Carry out a Dockerfile of this folder without a container engine: debootstrap for the base, chroot for every RUN.

Each stage is a folder in the cache, named by a hash of everything that went into it, so that a second build only does
what changed. Mounts live in a mount namespace that ends with its step: nothing of the host is left behind in a stage,
and no build can leave a mount on the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from configs.errors import ConfigError, ExternalError
from deployments.images import dockerfile
from deployments.images.dockerfile import ImageConfig, Instruction, Stage

logger = logging.getLogger(__name__)
_DEBIAN: Final = re.compile(r"(?:docker\.io/library/)?debian:([a-z]+)(?:-\d{8})?-slim(?:@sha256:[0-9a-f]{64})?")
_STEP_TIMEOUT_S: Final = 1800
_DEVICES: Final = ("null", "zero", "full", "random", "urandom")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What a proxy between this machine and the registries needs; engines pass the same on to a build.
_PASSED_ON: Final = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_INDEX_URL")
# Debian's slim images leave these out, and keep what licences demand.
_SLIM: Final = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
"""
_SOURCES: Final = """\
deb {mirror} {suite} main
deb {mirror} {suite}-updates main
deb {security} {suite}-security main
"""


@dataclass(frozen=True, slots=True)
class Downloads:
    """Where packages come from. `wheels`: a folder pip looks into first. `trust`: CA bundle that pip believes."""

    mirror: str = "http://deb.debian.org/debian"
    security: str = "http://deb.debian.org/debian-security"
    wheels: Path | None = None
    trust: Path | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder or file that a step sees at `target`."""

    source: Path
    target: str
    mode: str = "ro"


@dataclass(frozen=True, slots=True)
class Built:
    """A finished stage: its root filesystem, and what it says about itself."""

    root: Path
    key: str
    config: ImageConfig


@dataclass(slots=True)
class Builder:
    """Builds targets of one Dockerfile. `arguments` are build arguments; `context` is the repository."""

    file: Path
    context: Path
    arguments: Mapping[str, str]
    cache: Path
    downloads: Downloads = field(default_factory=Downloads)
    _built: dict[str, Built] = field(default_factory=dict)

    def build(self, target: str, out: Path) -> ImageConfig:
        """Write the root filesystem of `target` to `out`, which must not exist yet.

        Raises:
            ConfigError: not root, a program is missing, or the Dockerfile asks for what is not understood.
            ExternalError: a step failed; its last lines are in the message, and `out` does not exist.
        """
        check_machine()
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty. Nothing was built. Next: name a folder that does not exist.")
        stages = dockerfile.parse(self.file.read_text(encoding="utf-8"), self.arguments)
        with _alone(self.cache):
            for stage in dockerfile.needed_by(stages, target):
                self._built[stage.name] = self._stage(stage, out if stage.name == target else None)
        return self._built[target].config

    def _stage(self, stage: Stage, out: Path | None) -> Built:
        """Make a stage at `out`; None: in the cache, where one state of it is kept, the last."""
        base = self._built.get(stage.base) or self._debian(stage.base)
        config, variables = self._configure(stage, base.config)
        key = self._key(stage, base, variables)
        root = out or self.cache / self.file.parent.name / f"{stage.name}-{key[:24]}"
        if out is not None or not root.exists():
            started = time.monotonic()
            with _fresh(root) as unfinished:
                _duplicate(base.root, unfinished)
                for step in stage.instructions:
                    self._step(step, unfinished, config, variables)
            logger.info("%s/%s: %.0f s", self.file.parent.name, stage.name, time.monotonic() - started)
        if out is None:
            _forget_others(root, stage.name)
        return Built(root, key, config)

    def _configure(self, stage: Stage, parent: ImageConfig) -> tuple[ImageConfig, dict[str, str]]:
        """The image's description after this stage, and its build arguments."""
        config = ImageConfig(environment=dict(parent.environment), user=parent.user, workdir=parent.workdir)
        variables: dict[str, str] = {}
        for step in stage.instructions:
            known = {**variables, **config.environment}
            if step.keyword == "ARG":
                name, default = dockerfile.argument(step)
                variables[name] = self.arguments.get(name, default)
            elif step.keyword == "ENV":
                config.environment |= dockerfile.pairs(step, known)
            elif step.keyword == "WORKDIR":
                config.workdir = dockerfile.substitute(step.value, known)
            elif step.keyword not in ("RUN", "COPY"):
                dockerfile.describe(step, config, known)
        return config, variables

    def _key(self, stage: Stage, base: Built, variables: Mapping[str, str]) -> str:
        digest = hashlib.sha256(base.key.encode())
        for step in stage.instructions:
            if step.keyword in ("RUN", "COPY", "WORKDIR", "ARG", "ENV"):
                digest.update(repr((step.keyword, step.value, step.options)).encode())
            for path, name in self._context_files(step):
                digest.update(f"{name} {path.stat().st_mode & 0o111}".encode() + path.read_bytes())
        for name in sorted(dockerfile.sources(stage)):
            digest.update(self._built[name].key.encode())
        digest.update(repr(sorted(variables.items())).encode())
        return digest.hexdigest()

    def _step(self, step: Instruction, root: Path, config: ImageConfig, variables: Mapping[str, str]) -> None:
        if step.keyword == "RUN":
            self._run(step, root, {**config.environment, **variables})
        elif step.keyword == "COPY":
            self._copy(step, root)
        elif step.keyword == "WORKDIR":
            _inside(root, step.value).mkdir(parents=True, exist_ok=True)

    def _run(self, step: Instruction, root: Path, variables: Mapping[str, str]) -> None:
        mounts = list(self._mounts(step))
        environment = {
            "PATH": _PATH,
            "HOME": "/root",
            "DEBIAN_FRONTEND": "noninteractive",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            **variables,
        }
        for variable, source in (("PIP_FIND_LINKS", self.downloads.wheels), ("PIP_CERT", self.downloads.trust)):
            if source is not None:
                mounts.append(Mount(source, f"/run/{variable.lower()}"))
                environment[variable] = f"/run/{variable.lower()}"
        script = _namespace(root, mounts, step.value)
        command = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "/bin/sh", "-c", script]
        _call(command, f"{self.file.parent.name}/Dockerfile, line {step.line}: RUN", environment)

    def _mounts(self, step: Instruction) -> Iterator[Mount]:
        for mount in dockerfile.mounts(step):
            if mount["type"] == "cache":
                folder = self.cache / "mounts" / mount["target"].strip("/").replace("/", "-")
                folder.mkdir(parents=True, exist_ok=True)
                yield Mount(folder, mount["target"], "rw")
            elif "from" in mount:
                yield Mount(_inside(self._built[mount["from"]].root, mount["source"]), mount["target"])
            else:
                yield Mount(self.context / mount["source"], mount["target"])

    def _copy(self, step: Instruction, root: Path) -> None:
        *named, target = shlex.split(step.value)
        if origin := dict(step.options).get("from"):
            for name in named:
                destination = _inside(root, target)
                destination.parent.mkdir(parents=True, exist_ok=True)
                _call(["cp", "-a", "-T", str(_inside(self._built[origin].root, name)), str(destination)], "COPY")
            return
        for path, name in self._context_files(step):
            destination = _inside(root, target + name)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, destination)

    def _context_files(self, step: Instruction) -> list[tuple[Path, str]]:
        """Files that a COPY takes from the context, with what is added to its target for each, in a fixed order."""
        if step.keyword == "RUN":
            bound = [m["source"] for m in dockerfile.mounts(step) if m["type"] == "bind" and "from" not in m]
            return [(self.context / source, source) for source in bound]
        if step.keyword != "COPY" or step.options:
            return []
        *named, target = shlex.split(step.value)
        files = [pair for name in named for pair in self._files_of(name, target)]
        if not files:
            raise dockerfile.refuse(step, "finds none of its files in the context (see Dockerfile.dockerignore)")
        return files

    def _files_of(self, name: str, target: str) -> Iterator[tuple[Path, str]]:
        rules = dockerfile.ignore_rules(self.file.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8"))
        source = self.context / name
        for path in [source] if source.is_file() else sorted(source.rglob("*")):
            if path.is_file() and not dockerfile.ignored(path.relative_to(self.context).as_posix(), rules):
                below = path.relative_to(source).as_posix() if path != source else path.name
                yield path, below if target.endswith("/") else f"/{below}" if path != source else ""

    def _debian(self, image: str) -> Built:
        """The base: Debian's own minimal system, remade every week, as its images are."""
        match = _DEBIAN.fullmatch(image)
        if match is None:
            raise ConfigError(f"FROM {image}: only Debian's slim images can be made here. Nothing was built.")
        key = f"{match[1]}-{time.strftime('%G-%V', time.gmtime())}"
        root = self.cache / f"debian-{key}"
        if not root.exists():
            with _fresh(root) as unfinished:
                self._debootstrap(match[1], unfinished)
            _forget_others(root, f"debian-{match[1]}")
        return Built(root, key, ImageConfig(environment={"PATH": _PATH}))

    def _debootstrap(self, suite: str, root: Path) -> None:
        command = ["debootstrap", "--variant=minbase", suite, str(root), self.downloads.mirror]
        _call(command, f"debootstrap {suite} from {self.downloads.mirror}", {**os.environ, "PATH": _PATH})
        (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(_SLIM, encoding="utf-8")
        sources = _SOURCES.format(mirror=self.downloads.mirror, security=self.downloads.security, suite=suite)
        (root / "etc/apt/sources.list").write_text(sources, encoding="utf-8")
        for leaves in ("doc", "man", "info", "locale"):
            for path in (root / "usr/share" / leaves).rglob("*"):
                if path.is_file() and path.name != "copyright":
                    path.unlink()
        for told_by_host in ("etc/resolv.conf", "etc/hostname"):
            (root / told_by_host).write_text("", encoding="utf-8")
        shutil.rmtree(root / "var/cache/apt/archives")
        (root / "var/cache/apt/archives/partial").mkdir(parents=True)


def check_machine() -> None:
    """Say what is missing before anything begins.

    Raises:
        ConfigError: not root, or a program is not installed.
    """
    missing = [name for name in ("debootstrap", "unshare", "chroot", "tar") if shutil.which(name, path=_PATH) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not installed. Nothing was built. Next: apt-get install debootstrap.")
    if os.geteuid() != 0:
        raise ConfigError("Only root may chroot and make device nodes. Nothing was built. Next: run it with sudo.")


def _namespace(root: Path, mounts: Sequence[Mount], script: str) -> str:
    """A shell script that mounts what a build step needs below `root` and runs `script` there."""
    at = shlex.quote(str(root))
    lines = ["set -eu", "mount --make-rprivate /", f"mount -t proc proc {at}/proc"]
    lines += [f"mount -t tmpfs {name} {at}/{name}" for name in ("dev", "tmp", "run")]
    lines += [f"chmod 1777 {at}/tmp", f"ln -s /proc/self/fd {at}/dev/fd"]  # noqa: S108
    lines += [f"touch {at}/dev/{name}; mount --bind /dev/{name} {at}/dev/{name}" for name in _DEVICES]
    for mount in [Mount(Path("/etc/resolv.conf"), "/etc/resolv.conf"), *mounts]:
        place = shlex.quote(str(root) + mount.target)
        make = f"mkdir -p {place}" if mount.source.is_dir() else f'mkdir -p "$(dirname {place})"; touch {place}'
        bind = f"mount --bind {shlex.quote(str(mount.source.resolve()))} {place}"
        lines += [make, bind, f"mount -o remount,bind,{mount.mode} {place}"]
    return "\n".join([*lines, f"cd /; exec chroot {at} /bin/sh -c {shlex.quote(script)}"])


def _call(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_STEP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExternalError(f"{what}: not done in {_STEP_TIMEOUT_S} s. Nothing was written.") from None
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise ExternalError(f"{what}: ended with {done.returncode}. Nothing was written. It said:\n{tail}")


def _inside(root: Path, path: str) -> Path:
    """`path` of the image below `root`; a link in it must not lead out.

    Raises:
        ConfigError: it would.
    """
    place = root / path.lstrip("/")
    if not place.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{path}: leads out of the root filesystem. Nothing was built.")
    return place


def _duplicate(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _call(["cp", "-a", "-T", "--reflink=auto", str(source), str(target)], f"copying {source}")


@contextlib.contextmanager
def _fresh(root: Path) -> Iterator[Path]:
    """A folder beside `root` that gets its name when all went well, and is removed when not."""
    unfinished = root.with_name(f".{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        if root.exists():  # an empty folder that was asked for by name
            root.rmdir()
        unfinished.rename(root)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _forget_others(root: Path, stem: str) -> None:
    for path in root.parent.glob(f"{stem}-*"):
        if path != root:
            shutil.rmtree(path)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One build at a time in a cache; others wait."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
