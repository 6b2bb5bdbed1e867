"""Assemble an image's root filesystem from its Dockerfile without a container engine.

    sudo python -m deployments.images.assemble serving OUT_DIR --archive serving.tar --tag khet-guard/serving:v0.1.0

It needs root on a Debian with debootstrap. README.md beside this file says what it is for.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from configs.errors import ConfigError, KhetError
from configs.settings import PROJECT_ROOT
from deployments.images.archive import write_archive
from deployments.images.dockerfile import ImageConfig
from deployments.images.rootfs import Builder, Downloads

IMAGES: Final = ("serving", "pipelines")
_HERE: Final = Path(__file__).resolve().parent
_CREATED: Final = "org.opencontainers.image.created"
logger = logging.getLogger("assemble")


def assemble(
    image: str,
    out: Path,
    *,
    arguments: dict[str, str] | None = None,
    downloads: Downloads | None = None,
    cache: Path | None = None,
) -> ImageConfig:
    """Write the root filesystem of `image` to `out`; returns what the image says about itself.

    Raises:
        ConfigError: not root, a program is missing, or `out` is not empty.
        ExternalError: a step failed; `out` does not exist.
    """
    builder = Builder(
        _HERE / image / "Dockerfile", PROJECT_ROOT, arguments or {}, cache or _cache(), downloads or Downloads()
    )
    return builder.build(image, out)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code is 0, or the KhetError's."""
    given = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if (given.archive is None) != (given.tag is None):
            raise ConfigError("--archive and --tag go together. Nothing was built.")
        arguments = dict(_pair(text) for text in given.build_arg)
        config = assemble(given.image, given.out, arguments=arguments, downloads=_downloads(given), cache=given.cache)
        logger.info("%s: the root filesystem is in %s", given.image, given.out)
        if given.archive is not None:
            identity = write_archive(given.out, given.tag, config.to_oci(), config.labels[_CREATED], given.archive)
            logger.info("%s: %s is in %s", given.tag, identity, given.archive)
    except KhetError as error:
        logger.error("%s", error)
        return error.exit_code
    return 0


def _downloads(given: argparse.Namespace) -> Downloads:
    trusted = given.trust or os.environ.get("PIP_CERT")
    return Downloads(given.mirror, given.security, given.wheels, Path(trusted) if trusted else None)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "khet-guard" / "images"


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--build-arg {text}: wants NAME=VALUE. Nothing was built.")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.images.assemble",
        description="Assemble an image's root filesystem from its Dockerfile, without a container engine. Needs root.",
    )
    parser.add_argument("image", choices=IMAGES, help="which image")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the root filesystem; must not exist")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="write an image archive too (docker load)")
    parser.add_argument("--tag", metavar="NAME:TAG", help="the image's name in that archive")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder that pip looks into as well")
    parser.add_argument("--trust", type=Path, metavar="FILE", help="CA bundle for pip (default: PIP_CERT)")
    parser.add_argument("--mirror", default=Downloads().mirror, help="Debian (default: %(default)s)")
    parser.add_argument("--security", default=Downloads().security, help="its security fixes (default: %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where finished stages are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
