"""Train a model: `python -m ml.train --config configs/training/plant_disease.yaml`.

The output folder holds best.ckpt (what export reads), last.ckpt (what the same command goes on from after a kill),
config.json, progress.jsonl, curves.png and, when the run is complete, train.json.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.base import read_yaml, validate
from configs.errors import ConfigError, KhetError, SafetyError
from configs.settings import home
from configs.training import TrainingConfig
from ml.dataset import Dataset
from ml.hardware import quiet_threads
from ml.results import Record, TrainResult

RESULT, CONFIG = "train.json", "config.json"
_OURS = (RESULT, CONFIG, "last.ckpt", "best.ckpt", "progress.jsonl", "curves.png")


class Run(Record):
    """config.json: what the output folder belongs to. Resuming with anything else is refused."""

    config: TrainingConfig
    dataset_hash: str
    classes: tuple[str, ...]
    run_id: str


def train(config: TrainingConfig, dataset_root: Path, out: Path) -> TrainResult:
    """Train in this process. A killed run goes on from its last epoch; a finished one answers at once.

    Raises:
        ConfigError: `out` belongs to another run, or data and configuration do not fit.
        SafetyError: another process is training in `out`.
        IntegrityError: the dataset or a checkpoint is damaged.
        TrainingInterrupted: SIGTERM or SIGINT; the state is saved and the same call goes on from it.
    """
    quiet_threads()
    data = Dataset.open(dataset_root)
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        run = _claim(out, config, data)
        if (out / RESULT).exists():
            return TrainResult.read(out / RESULT).model_copy(update={"checkpoint": out / "best.ckpt"})
        from ml.fit import fit

        result = fit(config, data, out, run.run_id)
        if _first_rank():
            result.write(out / RESULT)
        return result


def resolve_dataset(name_or_path: str) -> Path:
    """A folder as it is, else <home>/datasets/<name>.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name_or_path)
    if (path / "dataset.json").exists():
        return path
    named = home() / "datasets" / name_or_path
    if not path.is_absolute() and (named / "dataset.json").exists():
        return named
    raise ConfigError(
        f"Dataset {name_or_path!r} is neither a dataset's folder nor in {home() / 'datasets'}. Nothing was started. "
        f"Next: `khet data sample --name {path.name}`, or `khet data import FOLDER --name {path.name}` for own photos."
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a configuration; `overrides` are `key=value` with dots between levels and YAML values.

    Raises:
        ConfigError: naming the file or the override, and the key.
    """
    values = read_yaml(path)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {text!r}: expected key=value, for example budget.seconds=60.")
        _put(values, key.split("."), _parse(text, value))
    return validate(TrainingConfig, values, source=" ".join([str(path), *(f"--set {o}" for o in overrides)]))


def _parse(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from error


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[keys[-1]] = value


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when the process dies. Further DDP ranks belong to the holder."""
    if not _first_rank():
        yield
        return
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SafetyError(
                f"Another process is training in {out}. Nothing was changed. Next: wait, or choose another --out."
            ) from error
        yield


def _claim(out: Path, config: TrainingConfig, data: Dataset) -> Run:
    if not (out / CONFIG).exists():
        leftovers = [name for name in _OURS if (out / name).exists()]
        if leftovers:
            raise ConfigError(
                f"{out} holds {', '.join(leftovers)} but no {CONFIG}: it is unclear what they belong to. "
                "Nothing was changed. Next: choose another --out, or give --fresh to start over in this one."
            )
        run = Run(config=config, dataset_hash=data.manifest_hash, classes=data.classes, run_id=uuid.uuid4().hex[:12])
        run.write(out / CONFIG)
        return run
    run = Run.read(out / CONFIG)
    if differences := _differences(run, config, data):
        raise ConfigError(
            f"{out} belongs to another training run: {'; '.join(differences)}. Nothing was changed. "
            "Next: choose another --out, or give --fresh to start over in this one."
        )
    return run


def _differences(run: Run, config: TrainingConfig, data: Dataset) -> list[str]:
    old = _flat(run.config.model_dump(mode="json")) | {"data": run.dataset_hash[:12]}
    new = _flat(config.model_dump(mode="json")) | {"data": data.manifest_hash[:12]}
    names = sorted(old.keys() | new.keys())
    return [f"{name} was {old.get(name)}, is {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def clear(out: Path) -> None:
    """Remove what a former run left in `out`, and nothing else.

    Raises:
        SafetyError: a process is training there.
    """
    if not out.exists() or not _first_rank():
        return
    with _alone(out):
        for name in _OURS:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "wandb", ignore_errors=True)


def _first_rank() -> bool:
    """Lightning starts the other ranks as copies of this command with LOCAL_RANK set."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ml.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/training/")
    parser.add_argument("--data", help="name below <home>/datasets, or a dataset's folder; default: the config's")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the results (default: outputs)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change one value, e.g. --set optimizer.lr=0.002 or --set 'budget={epochs: 3}'",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget a former run in --out and start over")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 configuration, 4 damaged data, 143 interrupted with the state saved."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.fresh:
            clear(arguments.out)
        result = train(config, resolve_dataset(arguments.data or config.dataset), arguments.out)
    except KhetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if _first_rank():
        _show(result, as_json=arguments.json)
    return 0


def _show(result: TrainResult, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.model_dump(mode="json", exclude={"history"})))
        return
    print(
        f"{result.net} at {result.px} px: validation accuracy {result.best_val_accuracy:.1%} "
        f"after {result.epochs} epochs, {result.elapsed_s:.0f} s, {result.images_per_s:.0f} images/s.\n"
        f"Next: python -m ml.export --checkpoint {result.checkpoint} --output_dir exported_models"
    )


if __name__ == "__main__":
    sys.exit(main())
