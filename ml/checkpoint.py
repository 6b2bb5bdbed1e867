"""Weights on disk: atomic writes, `weights_only` reads, SHA-256 checks, and weights to start from."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from configs.errors import ConfigError, IntegrityError
from configs.settings import settings
from configs.training import TrainingConfig
from ml.net import Net
from ml.results import Record

_log = logging.getLogger(__name__)
FORMAT = 1
_READ_ERRORS = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)


class Trained(Record):
    """What best.ckpt says about its weights: enough to build the net, export it and find its data again."""

    config: TrainingConfig
    classes: tuple[str, ...]
    healthy_classes: tuple[str, ...]
    dataset: str
    dataset_root: Path
    dataset_hash: str
    decode_contract: str
    epoch: int
    step: int
    val_accuracy: float
    val_loss: float
    format: int = Field(default=FORMAT)


def write_atomically(path: Path, data: bytes) -> None:
    """Readers, and a crash at any moment, see the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save(path: Path, weights: Mapping[str, Tensor], trained: Trained) -> None:
    """Write the net's weights (state dict of `ml.net.Net`) and what they are."""
    buffer = io.BytesIO()
    contents = {"weights": {k: v.detach().cpu().contiguous() for k, v in weights.items()}}
    torch.save(contents | {"trained": trained.model_dump_json()}, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> tuple[dict[str, Tensor], Trained]:
    """Read what `save` wrote.

    Raises:
        ConfigError: there is no such file.
        IntegrityError: it is damaged, or no checkpoint of ours.
    """
    contents = read(path)
    try:
        return contents["weights"], Trained.model_validate_json(contents["trained"])
    except (KeyError, TypeError, ValidationError) as error:
        raise IntegrityError(
            f"{path} is not a checkpoint that ml.train wrote as best.ckpt: {error}. Nothing was changed."
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Unpickle tensors and plain values only: a checkpoint cannot run code here."""
    if not path.exists():
        raise ConfigError(f"{path}: no such checkpoint. Next: train one with `python -m ml.train`.")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise IntegrityError(f"{path} cannot be read as a checkpoint: {error}. Nothing was changed.") from error
    if not isinstance(contents, dict):
        raise IntegrityError(f"{path} holds a {type(contents).__name__}, expected a checkpoint. Nothing was changed.")
    return contents


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def initialise(net: Net, source: str, expected_sha256: str | None) -> None:
    """Load `source` (a path or s3://bucket/key) into `net`; a head of other classes stays as it is.

    Accepts best.ckpt of the same net, or a plain state dict with its names.

    Raises:
        ConfigError: the file is missing or belongs to another net.
        IntegrityError: its contents are not the expected ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _fetch(source, Path(folder))
        if expected_sha256 is not None and (found := _digest(path)) != expected_sha256:
            raise IntegrityError(
                f"init_weights {source} has sha256 {found[:12]}…, expected {expected_sha256[:12]}…. "
                "Nothing was trained. Next: check where the file comes from, then correct init_weights_sha256."
            )
        contents = read(path)
    weights = contents.get("weights", contents)
    _load_into(net, weights, source)


def _fetch(source: str, folder: Path) -> Path:
    if not source.startswith("s3://"):
        return Path(source)
    from ml.objects import ObjectStore

    bucket, _, key = source.removeprefix("s3://").partition("/")
    ObjectStore(settings().object_store).get_file(bucket, key, folder / "weights")
    return folder / "weights"


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ConfigError(f"init_weights {path} cannot be read ({error.strerror}). Nothing was trained.") from error


def _load_into(net: Net, weights: Mapping[str, Tensor], source: str) -> None:
    own = net.state_dict()
    head = {name for name in own if name.startswith("head.")}
    differs = {name for name in own if name not in weights or weights[name].shape != own[name].shape}
    if not differs <= head or not weights.keys() <= own.keys():
        wrong = sorted((differs - head) | (weights.keys() - own.keys()))
        raise ConfigError(
            f"init_weights {source} belongs to another net: {len(wrong)} tensors do not match "
            f"({', '.join(wrong[:3])}…). Nothing was trained."
        )
    skipped = head if differs else set()
    net.load_state_dict({k: v for k, v in weights.items() if k not in skipped}, strict=not skipped)
    if skipped:
        _log.warning(
            "Started from %s, except the head: it was made for other classes (%d here).",
            source, own["head.1.bias"].numel(),
        )  # fmt: skip
    else:
        _log.info("Started from all weights of %s.", source)
