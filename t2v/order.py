"""The training order: a pure function of (seed, stream, samples seen) and of what each epoch holds, on any ranks.

The row groups of a stream, permuted anew each epoch and put end to end, are one endless sequence. Lane l of L
(t2v/mix.py: one lane a slot) takes the groups l, l + L, l + 2L, ... of it, and shuffles their rows within windows.
So every group is read once an epoch and by one lane, and the order is the same on any number of ranks.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np

EpochRows = Callable[[int], Sequence[int] | np.ndarray]  # the rows of each row group of an epoch


@dataclass(frozen=True)
class Window:
    """What a lane reads next: row groups of an epoch, and their rows (index into `groups`, row) in training order."""

    epoch: int
    groups: list[int]
    rows: list[tuple[int, int]]


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))


def lane_epochs(rows: EpochRows, seed: int, stream: str, lane: int, lanes: int) -> Iterator[list[int]]:
    """The row groups that one lane reads in each epoch, in order."""
    begun = 0  # groups of the epochs before
    for epoch in count():
        groups = len(rows(epoch))
        order = generator(seed, stream, "groups", epoch).permutation(groups)
        yield order[(lane - begun) % lanes :: lanes].tolist()
        begun += groups


def lane_windows(
    rows: EpochRows, seed: int, stream: str, lane: int, lanes: int, window_rows: int, skip: int = 0
) -> Iterator[Window]:
    """Windows of one lane; the first `skip` samples are left out without being drawn.

    A window is the groups that begin within the same `window_rows` of the lane's epoch.
    """
    for epoch, order in enumerate(lane_epochs(rows, seed, stream, lane, lanes)):
        sizes = np.asarray(rows(epoch))[order]
        if skip >= sizes.sum():
            skip -= int(sizes.sum())
            continue
        ends = np.cumsum(sizes)
        starts = np.unique((ends - sizes) // window_rows, return_index=True)[1].tolist()
        for first, end in pairwise([*starts, len(order)]):
            places = [(index, row) for index, size in enumerate(sizes[first:end]) for row in range(size)]
            if skip >= len(places):
                skip -= len(places)
                continue
            shuffled = generator(seed, stream, "rows", epoch, lane, first).permutation(len(places))[skip:]
            skip = 0
            yield Window(epoch, order[first:end], [places[i] for i in shuffled])


def shard_order(seed: int, stream: str, shards: int, begun: int) -> Iterator[tuple[int, int]]:
    """Raw shards for training without latents, `begun` of them left out: (number in the endless order, which shard).

    Every shard is there once an epoch, and each epoch has an order of its own.
    """
    for epoch in count(begun // shards):
        order = generator(seed, stream, "raw shards", epoch).permutation(shards)
        for place in range(max(0, begun - epoch * shards), shards):
            yield epoch * shards + place, int(order[place])
