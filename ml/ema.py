"""Exponential moving average of the weights (Polyak and Juditsky, 1992): validated and exported instead of the last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Shadows of a module's float parameters and buffers; other buffers follow the live ones.

    `swap` exchanges the two in place, so compiled and wrapped modules need not know.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {name: value for name, value in _values(module).items() if value.is_floating_point()}
        self._shadow = {name: value.detach().clone() for name, value in self._live.items()}
        self._lists = (list(self._shadow.values()), [v.detach() for v in self._live.values()])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live values; in the first steps faster, so that the random start is forgotten."""
        decay = min(self._decay, (1 + step) / (10 + step))
        move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch annotates nothing here
        move(*self._lists, step)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and live values, exactly."""
        for name, live in self._live.items():
            kept = live.detach().clone()
            live.copy_(self._shadow[name])
            self._shadow[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by the names of the module's state dict."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        for name, value in self._shadow.items():
            value.copy_(state[name])


def _values(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)
