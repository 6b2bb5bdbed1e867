"""Experiment tracking with Weights & Biases. Whatever the tracker does, training goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from configs.areas import TrackingSettings

_log = logging.getLogger(__name__)
_PATIENCE_S = 15.0  # for a service that does not answer; wandb's own default is 90


class Tracker(Protocol):
    """Where a run is reported. No method raises."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report values at a step."""

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        """Report the result and close."""


class Silent:
    """Reports nothing."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Ignore."""

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        """Ignore."""


class WandB:
    """One W&B run; the same `run_id` continues it after a resume. Falls back to offline, then to silence."""

    def __init__(self, settings: TrackingSettings, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        if settings.mode == "online":
            self._guard("start online", partial(self._start, settings, "online", folder, run_id, config))
        if self._run is None:
            self._guard("start offline", partial(self._start, settings, "offline", folder, run_id, config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report values at a step."""
        if self._run is not None:
            self._guard("log", lambda: self._run.log(dict(values), step=step))

    def finish(self, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        """Report the result and close."""
        if self._run is not None:
            self._guard("finish", lambda: self._finish(summary, pictures))
            self._run = None

    def _start(
        self,
        settings: TrackingSettings,
        mode: Literal["online", "offline"],
        folder: Path,
        run_id: str,
        config: Mapping[str, Any],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(_environment(settings, folder))
        import wandb

        options = wandb.Settings(
            init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S, silent=True, console="off", x_disable_stats=True
        )
        self._run = wandb.init(
            mode=mode, project=settings.project, entity=settings.entity, dir=str(folder), id=run_id,
            resume="allow" if mode == "online" else None, config=dict(config), settings=options,
        )  # fmt: skip

    def _finish(self, summary: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
        import wandb

        self._run.summary.update(dict(summary))
        self._run.log({name: wandb.Image(str(path)) for name, path in pictures.items()})
        self._run.finish()

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        """The one place that swallows: a tracker has many ways to fail and none may stop a training."""
        try:
            call()
        except Exception:  # noqa: BLE001  (see above)
            self._run = None
            _log.warning("W&B could not %s; training goes on without it.", what, exc_info=True)


def _environment(settings: TrackingSettings, folder: Path) -> dict[str, str]:
    """wandb writes below `folder` only, and gets its key without showing it on a command line."""
    names = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
    values = dict.fromkeys(names, str(folder)) | {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    if settings.mode == "online" and settings.api_key is not None:
        values["WANDB_API_KEY"] = settings.api_key.get_secret_value()
    return values


def tracker(settings: TrackingSettings, folder: Path, run_id: str, config: Mapping[str, Any]) -> Tracker:
    """The configured tracker; its files lie below `folder`."""
    return Silent() if settings.mode == "disabled" else WandB(settings, folder, run_id, config)
