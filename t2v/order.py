"""The training order: a pure function of (seed, stream, samples seen), whatever the number of ranks.

The row groups of a stream, permuted anew each epoch and put end to end, are one endless sequence. Lane l of L
(t2v/mix.py: one lane a slot) takes the groups l, l + L, l + 2L, ... of it, and shuffles their rows within windows.
So every group is read once an epoch and by one rank, and the order is the same on any number of ranks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "little")))


def lane_groups(groups: int, seed: int, stream: str, lane: int, lanes: int) -> Iterator[int]:
    """The endless sequence of row groups (numbers below `groups`) that one lane reads."""
    for epoch in count():
        order = generator(seed, stream, "groups", epoch).permutation(groups)
        yield from order[(lane - epoch * groups) % lanes :: lanes].tolist()


def lane_windows(
    group_rows: Sequence[int], seed: int, stream: str, lane: int, lanes: int, window_rows: int, skip: int = 0
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Windows of one lane, each as (its groups, its rows (index into those groups, row) in training order).

    A window is as many groups as reach `window_rows`; the first `skip` samples are left out without being drawn.
    """
    sequence = lane_groups(len(group_rows), seed, stream, lane, lanes)
    for number in count():
        groups: list[int] = []
        rows: list[tuple[int, int]] = []
        while len(rows) < window_rows:
            group = next(sequence)
            rows += [(len(groups), row) for row in range(group_rows[group])]
            groups.append(group)
        if skip >= len(rows):
            skip -= len(rows)
            continue
        shuffled = generator(seed, stream, "rows", lane, number).permutation(len(rows))[skip:]
        skip = 0
        yield groups, [rows[i] for i in shuffled]
