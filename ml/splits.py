"""Which images train, which validate, which test: by group, by class, and the same way every time."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

SplitName = Literal["train", "validation", "test"]
SPLITS: Final[tuple[SplitName, ...]] = ("train", "validation", "test")
_BLOCK_PAIRS: Final = 4_000_000  # pairs compared at once: 32 MB of 64-bit words

Ints = npt.NDArray[np.int64]


def group_images(phashes: npt.NDArray[np.uint64], explicit: Sequence[str | None], hamming: int) -> Ints:
    """Number each image's group, shape [N]: images within `hamming` bits, or with the same explicit group, are one.

    Single linkage: a chain of near-duplicates is one group, so no near pair is ever in two. All pairs of distinct
    hashes are compared (N^2 / 2 words; 54,000 images take a few seconds).
    """
    unique, owner = np.unique(phashes, return_inverse=True)
    parents = np.arange(len(unique), dtype=np.int64)
    for left, right in _near_pairs(unique, hamming):
        parents = _join(parents, left, right)
    roots = parents[owner]
    first: dict[str, int] = {}
    for index, name in enumerate(explicit):
        if name is not None and (other := first.setdefault(name, index)) != index:
            parents = _join(parents, roots[[other]], roots[[index]])
    return np.asarray(parents[owner], dtype=np.int64)


def _near_pairs(unique: npt.NDArray[np.uint64], hamming: int) -> Iterator[tuple[Ints, Ints]]:
    rows = max(1, _BLOCK_PAIRS // max(1, len(unique)))
    for start in range(0, len(unique), rows):
        block = unique[start : start + rows]
        distance = np.bitwise_count(block[:, None] ^ unique[None, start:])
        left, right = np.nonzero(distance <= hamming)
        apart = left < right
        yield left[apart] + start, right[apart] + start


def _join(parents: Ints, left: Ints, right: Ints) -> Ints:
    """Union of the pairs' sets; every entry of the result points straight at its set's smallest member."""
    while True:
        low, high = np.minimum(parents[left], parents[right]), np.maximum(parents[left], parents[right])
        open_pairs = low != high
        if not open_pairs.any():
            return parents
        parents = parents.copy()
        np.minimum.at(parents, high[open_pairs], low[open_pairs])
        while not np.array_equal(parents, flatter := parents[parents]):
            parents = flatter


def assign(
    groups: Sequence[str], labels: Sequence[str], shares: Mapping[SplitName, float], seed: int
) -> list[SplitName]:
    """Give every image a split so that each class has about its share in each, and groups stay whole.

    `groups[i]` names image i's group (its smallest content hash). Within a class, groups come in the order of a hash of
    seed and name and fill test, then validation, as far as they fit; the rest trains. So a group larger than a holdout
    trains, and adding images moves only groups near the edges.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for group, label in zip(groups, labels, strict=True):
        members[group].append(label)
    by_class: dict[str, list[str]] = defaultdict(list)
    for group, its_labels in members.items():
        by_class[_majority(its_labels)].append(group)
    chosen: dict[str, SplitName] = {}
    for its_groups in by_class.values():
        sizes = {group: len(members[group]) for group in sorted(its_groups, key=lambda g: _lot(seed, g))}
        chosen.update(_fill(sizes, shares))
    return [chosen[group] for group in groups]


def _majority(labels: Sequence[str]) -> str:
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _lot(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()


def _fill(sizes: Mapping[str, int], shares: Mapping[SplitName, float]) -> dict[str, SplitName]:
    """Fill the holdouts of one class from its groups, in order. With three groups or more no split stays empty."""
    total = sum(sizes.values())
    chosen: dict[str, SplitName] = dict.fromkeys(sizes, "train")
    holdouts: tuple[SplitName, ...] = ("test", "validation")
    for still_to_fill, split in zip((2, 1), holdouts, strict=True):
        free = [group for group in sizes if chosen[group] == "train"]
        fitting = _fitting(sizes, free, max(1, round(shares[split] * total)), leave=still_to_fill)
        if not fitting and len(free) > 1:
            fitting = [min(free, key=lambda group: sizes[group])]
        chosen.update(dict.fromkeys(fitting, split))
    return chosen


def _fitting(sizes: Mapping[str, int], free: Sequence[str], quota: int, *, leave: int) -> list[str]:
    """Groups of `free`, in order, that fit into `quota` images together; `leave` groups remain for other splits."""
    taken: list[str] = []
    for group in free:
        if sizes[group] <= quota and len(taken) + leave < len(free):
            taken.append(group)
            quota -= sizes[group]
    return taken
