"""Batches come in the order of t2v/order.py, whatever the ranks, from any step on, and errors reach the trainer."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from t2v.config import MixConfig, Stream
from t2v.feed import Batch, Feed
from t2v.mix import plan_step
from t2v.shards import LatentInfo, Shard, write_shard

STEP = plan_step(MixConfig(slots=4, image_every=4, frames_per_slot=6), frames=2)


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> dict[Stream, list[Shard]]:
    """Seven shards a stream; each latent holds its row's number, which is its caption too."""
    folder = tmp_path_factory.mktemp("latents")
    return {"images": shards(folder, "images", 1), "videos": shards(folder, "videos", 2)}


def shards(folder: Path, stream: Stream, frames: int) -> list[Shard]:
    info = LatentInfo(stream, (4, frames, 2, 2), "vae", 1.0, "settings")
    made = []
    for index in range(7):
        rows = np.arange(index * 5, index * 5 + 5)
        mean = np.broadcast_to(rows[:, None, None, None, None], (5, *info.shape)).astype(np.float16)
        names = [str(row) for row in rows]
        path = str(folder / f"{stream}-{index}.parquet")
        made.append(write_shard(path, info, names, names, mean, -mean, [3.0] * 5, [0.0] * 5, rows_per_group=3))
    return made


def steps(inventory: dict[Stream, list[Shard]], rank: int, world: int, count: int, first: int = 0) -> list[list[Batch]]:
    feed = Feed(inventory, STEP, STEP.of_rank(rank, world), seed=3, window_rows=4, first_step=first)
    taken = list(islice(feed, count))
    feed.close()
    return taken


def captions(batches: list[list[Batch]]) -> list[list[list[str]]]:
    return [[batch.captions for batch in step] for step in batches]


def by_sample(batches: list[list[Batch]]) -> dict[tuple[Stream, int], str]:
    """The caption of every numbered sample."""
    return {
        (batch.slot.stream, number): caption
        for step in batches
        for batch in step
        for number, caption in zip(batch.sample, batch.captions, strict=True)
    }


def test_latents_belong_to_their_captions(inventory: dict[Stream, list[Shard]]) -> None:
    (images, videos, *_), *_ = steps(inventory, 0, 1, 1)
    assert images.mean.shape == (6, 4, 1, 2, 2) and videos.mean.shape == (3, 4, 2, 2, 2)
    for batch in (images, videos):
        numbers = [int(caption) for caption in batch.captions]
        assert batch.mean[:, 0, 0, 0, 0].tolist() == numbers
        assert batch.logvar is not None and batch.logvar[:, 0, 0, 0, 0].tolist() == [-number for number in numbers]


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_ranks_share_what_one_rank_reads(inventory: dict[Stream, list[Shard]], world: int) -> None:
    """Three and five ranks do not divide the four slots: they cut through lanes."""
    alone = by_sample(steps(inventory, 0, 1, 10))
    shared: dict[tuple[Stream, int], str] = {}
    for rank in range(world):
        shared |= by_sample(steps(inventory, rank, world, 10))
    assert shared == alone


def test_samples_are_numbered_without_gaps(inventory: dict[Stream, list[Shard]]) -> None:
    batches = steps(inventory, 0, 1, 5)
    for stream, per_step in STEP.samples.items():
        seen = [number for step in batches for batch in step if batch.slot.stream == stream for number in batch.sample]
        assert seen == list(range(5 * per_step))


@pytest.mark.parametrize("first", [1, 4, 23])
def test_a_feed_that_starts_later_continues_exactly(inventory: dict[Stream, list[Shard]], first: int) -> None:
    later = steps(inventory, 0, 1, 5, first)
    reference = steps(inventory, 0, 1, first + 5)[first:]
    assert captions(later) == captions(reference)
    assert [batch.sample for step in later for batch in step] == [batch.sample for step in reference for batch in step]


def test_a_shard_that_is_gone_stops_the_trainer_by_name(inventory: dict[Stream, list[Shard]]) -> None:
    gone = [Shard(shard.path + ".gone", shard.row_groups, shard.info) for shard in inventory["videos"]]
    feed = Feed(inventory | {"videos": gone}, STEP, STEP.of_rank(0, 1), seed=0, window_rows=4)
    with pytest.raises(FileNotFoundError, match="parquet.gone"):
        next(iter(feed))
