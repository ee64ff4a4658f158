"""What an epoch holds is fixed when it begins, for all who ask, until training begins anew."""

from pathlib import Path

import numpy as np

from t2v import storage
from t2v.epochs import Epochs, begin_anew
from tests.t2v.latents import SHARD_ROWS, add_shards, make_job


def rows(epochs: Epochs, number: int) -> int:
    return int(epochs[number].rows.sum())


def test_whoever_asks_first_fixes_an_epoch_for_all(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    add_shards(tmp_path, 0, 2)
    first = Epochs(job, "videos")
    add_shards(tmp_path, 2, 5)
    second = Epochs(job, "videos")
    assert rows(second, 0) == 2 * SHARD_ROWS and rows(second, 1) == 5 * SHARD_ROWS
    add_shards(tmp_path, 5, 6)
    assert [rows(first, number) for number in range(3)] == [2 * SHARD_ROWS, 5 * SHARD_ROWS, 6 * SHARD_ROWS]
    assert first[1].groups == second[1].groups
    assert storage.listing(f"{tmp_path}/train/epochs") == [f"videos-000{number}.json" for number in range(3)]


def test_held_out_rows_stay_the_same_and_depend_on_the_seed(tmp_path: Path) -> None:
    job = make_job(tmp_path, held_out_rows=7)
    add_shards(tmp_path, 0, 20)
    before = Epochs(job, "images")
    add_shards(tmp_path, 20, 40)
    after = Epochs(job, "images")
    assert before.held_out == after.held_out and sum(group.end for group in after.held_out) == 7
    assert rows(after, 1) == 40 * SHARD_ROWS - 7
    job.seed += 1
    assert Epochs(job, "images").held_out != before.held_out


def test_training_that_begins_anew_lists_the_shards_of_now(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    add_shards(tmp_path, 0, 2)
    Epochs(job, "videos")
    add_shards(tmp_path, 2, 4)
    begin_anew(job)
    add_shards(tmp_path, 4, 6)
    np.testing.assert_array_equal(Epochs(job, "videos")[0].rows, [3, 2] * 4)
