"""Whole batches out of a decoded uint8 set, from a memory map or from the device's own memory.

An item-by-item DataLoader spends more time on Python than on small images; here one step is one fancy index.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]
Index = npt.NDArray[np.int64]
_AHEAD = 3  # batches read in advance for a device that computes by itself


class Source(Protocol):
    """Images uint8 [N, px, px, 3] with labels int64 [N]; `take` gives those of an index."""

    def __len__(self) -> int: ...

    def take(self, index: Index) -> Batch:
        """The images and labels at `index`."""


class HostImages:
    """Images in the host's memory, usually a memory map of the decoded set."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], *, pin: bool = False) -> None:
        self._images = images.view(np.ndarray)  # np.memmap pays for its subclass at every index
        self._labels = labels
        self._pin = pin

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, index: Index) -> Batch:
        """Copy out of the map in ascending order, so that a cold page is read once."""
        index = np.sort(index)
        images, labels = torch.from_numpy(self._images[index]), torch.from_numpy(self._labels[index])
        return (images.pin_memory(), labels.pin_memory()) if self._pin else (images, labels)


class DeviceImages:
    """The whole set in the memory of `device`: an index costs microseconds and no copy crosses the bus."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], device: torch.device) -> None:
        self._images = torch.empty(images.shape, dtype=torch.uint8, device=device)
        for start in range(0, len(images), 4096):  # in pieces: the map need not fit into the host's memory
            self._images[start : start + 4096] = torch.from_numpy(np.array(images[start : start + 4096]))
        self._labels = torch.from_numpy(labels).to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, index: Index) -> Batch:
        """Gather on the device."""
        where = torch.from_numpy(index).to(self._images.device, non_blocking=True)
        return self._images.index_select(0, where), self._labels.index_select(0, where)


class TrainBatches:
    """One iteration is one epoch in an order drawn from (seed, epoch); all ranks draw it and take their share.

    Incomplete batches are left out, so that shapes stay constant and batch norm never sees a handful of images; each
    epoch leaves out others. Lightning saves and restores the position: a run resumes in the middle of an epoch.
    """

    def __init__(
        self, source: Source, batch_size: int, *, seed: int, rank: int = 0, world: int = 1, read_ahead: bool = False
    ) -> None:
        self._source = source
        self._share = len(source) // world
        self._size = max(1, min(batch_size, self._share))
        self._seed, self._rank, self._world = seed, rank, world
        self._read_ahead = read_ahead
        self._epoch = self._position = 0
        self.sampler = self  # Lightning announces the epoch to `.sampler.set_epoch`

    def __len__(self) -> int:
        return self._share // self._size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the iteration that starts next."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Batches of the current epoch that were handed out."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration behind that many batches."""
        self._position = int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        """The body runs at the first `next`, after `set_epoch`."""
        start = self._position if self._position < len(self) else 0
        order = np.random.default_rng((self._seed, self._epoch)).permutation(len(self._source))
        mine = order[self._rank :: self._world]
        pieces = [mine[i * self._size : (i + 1) * self._size] for i in range(start, len(self))]
        batches = _read_ahead(self._source, pieces) if self._read_ahead else map(self._source.take, pieces)
        for self._position, batch in enumerate(batches, start + 1):
            yield batch


class ValidationBatches:
    """All images once, in order. Ranks get equally many batches: the gap is filled with label -1, which counts not."""

    def __init__(self, source: Source, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self._source, self._size = source, batch_size
        self._rank, self._world = rank, world
        self._share = math.ceil(len(source) / world)

    def __len__(self) -> int:
        return math.ceil(self._share / self._size)

    def __iter__(self) -> Iterator[Batch]:
        mine = np.arange(self._rank, self._share * self._world, self._world)
        for start in range(0, self._share, self._size):
            index = mine[start : start + self._size]
            images, labels = self._source.take(index % len(self._source))
            yield images, labels.masked_fill(torch.from_numpy(index >= len(self._source)).to(labels.device), -1)


def _read_ahead(source: Source, pieces: list[Index]) -> Iterator[Batch]:
    """Read the next batches in a thread while the device computes."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[Batch]] = deque(pool.submit(source.take, piece) for piece in pieces[:_AHEAD])
        for piece in [*pieces[_AHEAD:], *[None] * len(waiting)]:
            batch = waiting.popleft().result()
            if piece is not None:
                waiting.append(pool.submit(source.take, piece))
            yield batch
