"""The training order: once an epoch, the same for every number of ranks, and continued exactly."""

from collections import Counter
from itertools import islice

import pytest

from t2v.order import lane_groups, lane_windows


def rows(
    group_rows: list[int], lane: int, lanes: int, count: int, skip: int = 0, seed: int = 0
) -> list[tuple[int, int]]:
    """The first `count` (group, row) of a lane after `skip`."""
    windows = lane_windows(group_rows, seed, "videos", lane, lanes, window_rows=20, skip=skip)
    return list(islice(((groups[index], row) for groups, order in windows for index, row in order), count))


@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_lanes_together_read_every_group_once_an_epoch(lanes: int) -> None:
    sequences = [lane_groups(21, 5, "videos", lane, lanes) for lane in range(lanes)]
    merged = [next(sequences[position % lanes]) for position in range(3 * 21)]
    epochs = [merged[start : start + 21] for start in (0, 21, 42)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_more_lanes_than_groups_still_share_them_evenly() -> None:
    seen = Counter(group for lane in range(7) for group in islice(lane_groups(2, 0, "images", lane, 7), 20))
    assert seen == {0: 70, 1: 70}


def test_every_row_of_an_epoch_once() -> None:
    group_rows = [10] * 12
    seen = Counter(row for lane in range(3) for row in rows(group_rows, lane, 3, 40))
    assert seen == {(group, row): 1 for group in range(12) for row in range(10)}


@pytest.mark.parametrize("skip", [1, 19, 20, 137, 1000])
def test_skipping_equals_reading_on(skip: int) -> None:
    group_rows = [10, 7, 10, 3, 10]
    assert rows(group_rows, 1, 2, 50, skip=skip) == rows(group_rows, 1, 2, skip + 50)[skip:]


def test_seeds_and_windows_shuffle() -> None:
    group_rows = [10] * 12
    assert rows(group_rows, 0, 1, 120) != rows(group_rows, 0, 1, 120, seed=1)
    assert rows(group_rows, 0, 1, 20) != sorted(rows(group_rows, 0, 1, 20))
