"""Train a model: `python -m ml.train --config configs/training/plant_disease.yaml`.

The output folder holds best.ckpt (what export reads), last.ckpt (what the same command goes on from after a kill),
config.json, progress.jsonl, curves.png and, when the run is complete, train.json.

With `--store PREFIX` the states and the result are kept in the object store too: the same command on another machine,
in an empty folder, goes on from the newest state, or brings the result.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.base import read_yaml, validate
from configs.errors import ConfigError, ExternalError, IntegrityError, KhetError, SafetyError
from configs.settings import home, settings
from configs.training import TrainingConfig
from ml.checkpoint_courier import PATIENCE_S, Courier
from ml.checkpoint_store import BEST, LAST, LINEAGE, RESULT, TrainingStore, fingerprint
from ml.dataset import Dataset
from ml.hardware import first_rank, quiet_threads
from ml.lineage import collect_lineage
from ml.pixelcache import exclusive
from ml.results import Record, TrainResult

CONFIG = "config.json"
_STORED = (BEST, CONFIG, "progress.jsonl", "curves.png")
_OURS = (RESULT, LINEAGE, LAST, *_STORED)
_log = logging.getLogger(__name__)


class Run(Record):
    """config.json: what the output folder belongs to. Resuming with anything else is refused."""

    config: TrainingConfig
    dataset_hash: str
    classes: tuple[str, ...]
    run_id: str


def train(config: TrainingConfig, dataset_root: Path, out: Path, store: str | None = None) -> TrainResult:
    """Train in this process. A killed run goes on from its last epoch; a finished one answers at once.

    `store` (s3://bucket/prefix, or a prefix in the models bucket): states and result are kept there as well, and found
    again by a process that has nothing but the same configuration and data. An outage while it trains costs states;
    the result has to be stored.

    Raises:
        ConfigError: `out` belongs to another run, or data and configuration do not fit.
        SafetyError: another process is training in `out`.
        IntegrityError: the dataset or a checkpoint is damaged.
        ExternalError: the store did not answer when its states were looked for, or the result was to be stored.
        TrainingInterrupted: SIGTERM or SIGINT; the state is saved and the same call goes on from it.
    """
    quiet_threads()
    data = Dataset.open(dataset_root)
    kept = _training_store(store, config, data) if store is not None else None
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        run = _claim(out, config, data, kept)
        if kept is not None:
            _bring(kept, out, run)
        return _finished_or_trained(config, data, out, run, kept)


def _training_store(address: str, config: TrainingConfig, data: Dataset) -> TrainingStore:
    objects = settings().object_store
    whole = address if "://" in address else f"s3://{objects.models_bucket}/{address}"
    return TrainingStore.at(whole, fingerprint(config, data.manifest_hash), objects)


def _finished_or_trained(
    config: TrainingConfig, data: Dataset, out: Path, run: Run, kept: TrainingStore | None
) -> TrainResult:
    if (out / RESULT).exists():
        result = TrainResult.read(out / RESULT).model_copy(update={"checkpoint": out / BEST})
        _store_result(kept, out, run, result)
        return result
    from ml.fit import fit, wait_for_all

    with _sending(kept, out) as on_saved:
        result = fit(config, data, out, run.run_id, on_saved)
    if first_rank():
        result.write(out / RESULT)
    _store_result(kept, out, run, result)
    wait_for_all()
    return result


def _store_result(kept: TrainingStore | None, out: Path, run: Run, result: TrainResult) -> None:
    """Keep the files of a finished training in the store, unless they are there; the first process does it for all."""
    if kept is None or not first_rank() or kept.finished() is not None:
        return
    lineage = collect_lineage(
        config=run.config.model_dump(mode="json"),
        seed=result.seed,
        dataset=result.dataset,
        dataset_hash=result.dataset_hash,
        trained_on=result.hardware,
    )
    kept.finish(result, lineage, {name: out / name for name in _STORED})
    _log.info("The result is stored in %s.", kept.address)


@contextlib.contextmanager
def _sending(kept: TrainingStore | None, out: Path) -> Iterator[Callable[[int, int], None]]:
    """What a training calls after each state that it wrote."""
    if kept is None or not first_rank():
        yield lambda _step, _epoch: None
        return
    patience_s = min(PATIENCE_S, settings().object_store.patience_s)
    with Courier(kept, out, settings().training.checkpoint_every_s, patience_s) as courier:
        yield courier.offer


def _bring(kept: TrainingStore, out: Path, run: Run) -> None:
    """Put the stored result into `out`, or the state to go on from, where the store knows more than `out` does.

    Each pod of several looks by itself; what is only in one pod's folder does not count then, since the others cannot
    know it. Of the processes in one pod the first to come looks.
    """
    with exclusive(out / ".bring.lock"):
        if not (out / CONFIG).exists():
            run.write(out / CONFIG)
        alone = run.config.nodes == 1
        try:
            if _result_brought(kept, out) or (alone and (out / RESULT).exists()):
                return
            _bring_state(kept, out, alone=alone)
        except ExternalError as error:
            if not alone or not ((out / RESULT).exists() or (out / LAST).exists()):
                raise
            _log.warning("Going on from what is in %s, without having seen what is stored. %s", out, error)


def _result_brought(kept: TrainingStore, out: Path) -> bool:
    if (found := kept.finished()) is None:
        return False
    try:
        kept.bring_result(found, out)
    except IntegrityError as error:
        _log.warning("The stored result is not used, and will be replaced. %s", error)
        kept.withdraw()
        return False
    return True


def _bring_state(kept: TrainingStore, out: Path, *, alone: bool) -> None:
    here = _step_of(out / LAST) if alone else None
    newest = kept.newest()
    if here is not None and (newest is None or newest.step <= here):
        return
    found = kept.bring_newest(out) if newest is not None else None
    if found is not None:
        _log.info("Going on from step %d, as it is stored in %s.", found.step, kept.address)
    if not alone:
        for name in (RESULT,) if found is not None else (RESULT, LAST, BEST):
            (out / name).unlink(missing_ok=True)


def _step_of(state: Path) -> int | None:
    """The step of a state in a folder; None where there is none that can be read."""
    from ml import checkpoint

    try:
        return int(checkpoint.read(state)["global_step"]) if state.exists() else None
    except (IntegrityError, KeyError) as error:
        _log.warning("The state in this folder is passed over: %s", error)
        return None


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
    if not first_rank():
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


def _claim(out: Path, config: TrainingConfig, data: Dataset, kept: TrainingStore | None) -> Run:
    if not (out / CONFIG).exists():
        leftovers = [name for name in _OURS if (out / name).exists()]
        if leftovers:
            raise ConfigError(
                f"{out} holds {', '.join(leftovers)} but no {CONFIG}: it is unclear what they belong to. "
                "Nothing was changed. Next: choose another --out, or give --fresh to start over in this one."
            )
        run_id = uuid.uuid4().hex[:12] if kept is None else kept.run_id
        run = Run(config=config, dataset_hash=data.manifest_hash, classes=data.classes, run_id=run_id)
        if first_rank():  # torchrun starts all ranks at once
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
    if not out.exists() or not first_rank():
        return
    with _alone(out):
        for name in _OURS:
            (out / name).unlink(missing_ok=True)
        for folder in ("wandb", ".sending"):
            shutil.rmtree(out / folder, ignore_errors=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m ml.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/training/")
    parser.add_argument("--data", help="name below <home>/datasets, or a dataset's folder; default: the config's")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the results (default: outputs)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change one value, e.g. --set optimizer.lr=0.002 or --set 'budget={epochs: 3}'",
    )  # fmt: skip
    parser.add_argument(
        "--store", metavar="PREFIX",
        help="keep states and result there, and go on from them: below the models bucket, or s3://BUCKET/PREFIX",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget a former run in --out (and --store), start over")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 configuration, 4 damaged data, 5 the store, 143 interrupted, state saved."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        config = load_config(arguments.config, arguments.overrides)
        data = resolve_dataset(arguments.data or config.dataset)
        if arguments.fresh:
            clear(arguments.out)
            if arguments.store and first_rank():
                _training_store(arguments.store, config, Dataset.open(data)).forget()
        result = train(config, data, arguments.out, arguments.store)
    except KhetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if first_rank():
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
