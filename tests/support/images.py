"""The real serving image, where images can be assembled: root, debootstrap and the package registries."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from configs.errors import ConfigError
from deployments.images.archive import write_archive
from deployments.images.assemble import assemble
from deployments.images.dockerfile import ImageConfig
from deployments.images.rootfs import Downloads, check_machine
from tests.support.kube import kubeconfig, one_at_a_time, tools

_LOADED = "docker.io/khet-guard/serving:test"
_LOAD_S = 600


def serving_image(folder: Path) -> tuple[Path, ImageConfig]:
    """Its root filesystem below `folder`, two minutes the first time; else the test is skipped."""
    try:
        check_machine()
    except ConfigError as error:
        pytest.skip(f"cannot assemble images here: {error}")
    trust = os.environ.get("PIP_CERT")
    root = folder / "serving"
    return root, assemble("serving", root, downloads=Downloads(trust=Path(trust) if trust else None))


@functools.lru_cache(maxsize=1)
def loaded_serving_image() -> str:
    """The name under which the cluster under test has the serving image; else the test is skipped.

    KHET_TEST_SERVING_IMAGE names one that the cluster has, or can pull.
    """
    if named := os.environ.get("KHET_TEST_SERVING_IMAGE"):
        return named
    folder = tools()
    if folder is None:
        pytest.skip("the cluster has no serving image: set KHET_TEST_SERVING_IMAGE to one, or KHET_TEST_CLUSTER")
    kubeconfig()
    with one_at_a_time(), tempfile.TemporaryDirectory(prefix="khet-image-") as made:
        root, config = serving_image(Path(made))
        archive = Path(made) / "serving.tar"
        write_archive(root, _LOADED, config.to_oci(), config.labels["org.opencontainers.image.created"], archive)
        subprocess.run([folder / "cluster", "load", archive], check=True, capture_output=True, timeout=_LOAD_S)
    return _LOADED
