"""The training order: once an epoch, the same for every number of ranks, and continued exactly."""

from collections import Counter
from itertools import islice

import pytest

from t2v.order import lane_epochs, lane_windows, shard_order

GROUPS = [10] * 12


def rows(
    epochs: list[list[int]], lane: int, lanes: int, count: int, skip: int = 0, seed: int = 0
) -> list[tuple[int, int, int]]:
    """The first `count` (epoch, group, row) of a lane after `skip`; the last of `epochs` is repeated."""
    windows = lane_windows(
        lambda epoch: epochs[min(epoch, len(epochs) - 1)], seed, "videos", lane, lanes, window_rows=20, skip=skip
    )
    places = ((window.epoch, window.groups[index], row) for window in windows for index, row in window.rows)
    return list(islice(places, count))


@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_lanes_together_read_every_group_once_an_epoch_and_take_turns(lanes: int) -> None:
    sizes = [[10] * 21, [10] * 22, [10] * 21]
    sequences = [lane_epochs(lambda epoch: sizes[epoch], 5, "videos", lane, lanes) for lane in range(lanes)]
    epochs = [[next(sequence) for sequence in sequences] for _ in range(3)]
    for epoch, groups in zip(epochs, sizes, strict=True):
        assert sorted(sum(epoch, [])) == list(range(len(groups)))
    read = [sum(len(epoch[lane]) for epoch in epochs) for lane in range(lanes)]
    assert max(read) - min(read) <= 1
    assert epochs[0] != epochs[2]


def test_more_lanes_than_groups_still_share_them_evenly() -> None:
    seen = Counter(group for lane in range(7) for _, group, _ in rows([[1, 1]], lane, 7, 20))
    assert seen == {0: 70, 1: 70}


def test_every_row_of_an_epoch_once() -> None:
    seen = Counter(row for lane in range(3) for row in rows([GROUPS], lane, 3, 40))
    assert seen == {(0, group, row): 1 for group in range(12) for row in range(10)}


def test_an_epoch_does_not_change_with_those_after_it() -> None:
    longer = [*GROUPS, 10, 10, 10]
    assert rows([GROUPS, longer], 0, 3, 40) == rows([GROUPS], 0, 3, 40)
    seen = Counter(row for lane in range(3) for row in rows([GROUPS, longer], lane, 3, 90) if row[0] == 1)
    assert seen == {(1, group, row): 1 for group in range(15) for row in range(10)}


@pytest.mark.parametrize("skip", [1, 19, 20, 137, 1000])
def test_skipping_equals_reading_on(skip: int) -> None:
    epochs = [[10, 7, 10, 3, 10], [10, 7, 10, 3, 10, 25]]
    assert rows(epochs, 1, 2, 50, skip=skip) == rows(epochs, 1, 2, skip + 50)[skip:]


def test_seeds_and_windows_shuffle() -> None:
    assert rows([GROUPS], 0, 1, 120) != rows([GROUPS], 0, 1, 120, seed=1)
    first = rows([GROUPS], 0, 1, 20)
    assert len({group for _, group, _ in first}) == 2 and first != sorted(first)


def test_raw_shards_come_once_an_epoch_each_time_in_another_order_and_resume_within_one() -> None:
    order = list(islice(shard_order(0, "videos", 7, 0), 30))
    assert [number for number, _ in order] == list(range(30))
    epochs = [[shard for _, shard in order[first : first + 7]] for first in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    for begun in (1, 7, 13, 14):
        assert list(islice(shard_order(0, "videos", 7, begun), 16)) == order[begun : begun + 16]
    assert [shard for _, shard in islice(shard_order(0, "images", 7, 0), 30)] != [shard for _, shard in order]
