"""An image archive of a root filesystem: what `docker load`, `podman load` and `ctr images import` read.

https://github.com/moby/moby/blob/v1.2/image/spec/v1.2.md#combined-image-json--filesystem-changeset-format
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from configs.errors import ConfigError, ExternalError

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_CHUNK_BYTES: Final = 1 << 20


def write_archive(root: Path, tag: str, config: Mapping[str, object], created: str, out: Path) -> str:
    """Write `root` as an image of one layer named `tag`; returns the image's id. `created` is RFC 3339.

    Raises:
        ConfigError: `tag` has no version, or this processor has no name in image archives.
        ExternalError: tar failed; `out` does not exist.
    """
    name, _, version = tag.rpartition(":")
    if not name or "/" in version:
        raise ConfigError(
            f"{tag!r} has no version. Nothing was written. Next: --tag ghcr.io/khet-guard/serving:v0.1.0."
        )
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", suffix=".layer") as layer:
        layer_digest = _write_layer(root, layer)
        image = _json(
            {
                "architecture": _architecture(),
                "os": "linux",
                "created": created,
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
                "history": [{"created": created, "created_by": "deployments/images/assemble.py"}],
            }
        )
        digest = hashlib.sha256(image).hexdigest()
        manifest = _json([{"Config": f"{digest}.json", "RepoTags": [_full(tag)], "Layers": ["layer.tar"]}])
        partial = out.with_name(f".{out.name}.partial")
        with tarfile.open(partial, "w") as archive:
            _add(archive, f"{digest}.json", image)
            _add(archive, "manifest.json", manifest)
            archive.add(layer.name, "layer.tar")
        partial.replace(out)
    return f"sha256:{digest}"


def _write_layer(root: Path, layer: IO[bytes]) -> str:
    """tar with a fixed order and owners by number: two archives of one folder are the same bytes."""
    command = ["tar", "--create", "--sort=name", "--numeric-owner", "--format=gnu", "--directory", str(root), "."]
    digest = hashlib.sha256()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
        assert tar.stdout is not None  # noqa: S101  (for the type checker: PIPE was asked for)
        while chunk := tar.stdout.read(_CHUNK_BYTES):
            digest.update(chunk)
            layer.write(chunk)
    layer.flush()
    if tar.returncode:
        raise ExternalError(f"tar of {root} ended with {tar.returncode}. No archive was written.", retryable=False)
    return digest.hexdigest()


def _full(tag: str) -> str:
    """The name as registries and containerd know it: without a host it means Docker Hub."""
    host, slash, _ = tag.partition("/")
    if slash and ("." in host or ":" in host or host == "localhost"):
        return tag
    return f"docker.io/{tag}" if slash else f"docker.io/library/{tag}"


def _architecture() -> str:
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise ConfigError(f"{machine}: images are made for {', '.join(_ARCHITECTURES)}. Nothing was written.")
    return _ARCHITECTURES[machine]


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
