"""Serve one model version over HTTP (runbook: Model Deployment).

MODEL_VERSION=v1.3.0 python -m ml.serve --port 8080
"""

from __future__ import annotations

import os

# Before numpy or onnxruntime: spinning threads starve everything else on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, KhetError
from configs.settings import Settings, settings
from ml.version import Version

if TYPE_CHECKING:
    from ml.serving.server import Load
    from ml.serving.service import LoadedModel, PredictionSink, Service

logger = logging.getLogger("ml.serve")
Wrap = Callable[[Any], Any]


def main(argv: Sequence[str] | None = None, wrap: Wrap | None = None) -> int:
    """Run a replica until SIGTERM; the exit code is 0, or the KhetError's. `wrap` puts a layer around the ASGI app."""
    arguments = _parser().parse_args(argv)
    _log_to_stderr()
    try:
        _serve(arguments, settings(), wrap)
    except KhetError as error:
        logger.error("%s", " ".join(str(error).split()))
        return error.exit_code
    logger.info("Stopped.")
    return 0


def _serve(arguments: argparse.Namespace, config: Settings, wrap: Wrap | None) -> None:
    from ml.serving.app import build_app
    from ml.serving.server import Server, listen
    from ml.serving.service import Identity, Service

    version = _version(arguments)
    listener = listen(arguments.host, arguments.port)
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    replica = arguments.name or f"{socket.gethostname()}-{listener.getsockname()[1]}"
    service = Service(Identity(version, replica), config.serving)
    app = build_app(service)
    logger.info("%s listens on %s; loading %s.", replica, address, version)
    Server(wrap(app) if wrap else app, service, _loader(arguments, config, service)).serve_on(listener)
    service.close(timeout_s=1.0)


def _loader(arguments: argparse.Namespace, config: Settings, service: Service) -> Load:
    from ml.serving.loading import load_folder, load_version, open_log
    from ml.serving.service import NoSink

    def load() -> tuple[LoadedModel, PredictionSink]:
        if arguments.model is None:
            model = load_version(config, Version.parse(service.identity.version))
        else:
            model = load_folder(arguments.model, config.serving)
        logged = arguments.model is None or arguments.log_predictions
        return model, open_log(config, service.identity, model, service.metrics) if logged else NoSink()

    return load


def _version(arguments: argparse.Namespace) -> str:
    named = os.environ.get("MODEL_VERSION", "")
    if not named and arguments.model is not None:
        return "local"
    if not named:
        raise ConfigError(
            "MODEL_VERSION is not set. Nothing was started. Next: MODEL_VERSION=v1.3.0 python -m ml.serve, "
            "or --model FOLDER for an exported model."
        )
    return str(Version.parse(named))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ml.serve",
        description="Serve one model version over HTTP. MODEL_VERSION names it.",
        epilog="example: MODEL_VERSION=v1.3.0 python -m ml.serve --port 8080",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--name", help="this replica's name in logs and files (default: host name and port)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="serve this exported folder, without the registry")
    parser.add_argument("--log-predictions", action="store_true", help="with --model: write the prediction log as well")
    return parser


def _log_to_stderr() -> None:
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)sZ %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("uvicorn", "botocore", "boto3", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
