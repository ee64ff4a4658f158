"""Batches come in the order of t2v/order.py, whatever the ranks, from any step on, and errors reach the trainer."""

from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from t2v import storage
from t2v.config import DiffusionConfig, Stream
from t2v.diffusion import Diffusion
from t2v.epochs import Epochs
from t2v.feed import Batch, Feed, held_out_batches
from t2v.groups import BadShard
from t2v.job import STREAMS, TrainJob
from tests.t2v.latents import add_shards, draw, make_job


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    """Seven shards a stream: 35 images, nearly six steps, and 35 videos, nearly four."""
    add_shards(tmp_path, 0, 7)
    return make_job(tmp_path)


def steps(job: TrainJob, rank: int, world: int, count: int, first: int = 0) -> list[list[Batch]]:
    with closing(Feed(job, rank, world, first, draw)) as feed:
        return [list(batches) for batches in islice(feed, count)]


def by_sample(batches: list[list[Batch]]) -> dict[tuple[Stream, int], str]:
    """The caption of every numbered sample."""
    return {
        (batch.slot.stream, number): caption
        for step in batches
        for batch in step
        for number, caption in zip(batch.sample, batch.captions, strict=True)
    }


def shared(job: TrainJob, world: int, count: int, first: int = 0) -> dict[tuple[Stream, int], str]:
    """The same, of all ranks."""
    samples: dict[tuple[Stream, int], str] = {}
    for rank in range(world):
        samples |= by_sample(steps(job, rank, world, count, first))
    return samples


def videos(samples: dict[tuple[Stream, int], str]) -> Counter[int]:
    return Counter(int(caption) for (stream, _), caption in samples.items() if stream == "videos")


def test_latents_belong_to_their_captions(job: TrainJob) -> None:
    (images, clips, *_), *_ = steps(job, 0, 1, 1)
    assert images.mean.shape == (6, 4, 1, 2, 2) and clips.mean.shape == (3, 4, 2, 2, 2)
    for batch in (images, clips):
        numbers = [int(caption) for caption in batch.captions]
        assert batch.mean[:, 0, 0, 0, 0].tolist() == numbers
        assert batch.logvar is not None and batch.logvar[:, 0, 0, 0, 0].tolist() == [-number for number in numbers]


def test_batches_carry_the_draws_of_their_samples(job: TrainJob) -> None:
    diffusion = Diffusion(DiffusionConfig())
    with closing(Feed(job, 0, 1, 4, diffusion.draw)) as feed:
        images, clips, *_ = next(iter(feed))
    for batch in (images, clips):
        expected = diffusion.draw(f"{job.seed} {batch.slot.stream}", batch.sample, batch.mean.shape[1:])
        for part, whole in zip(batch.draw, expected, strict=True):
            torch.testing.assert_close(part, whole, rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_ranks_share_what_one_rank_reads(job: TrainJob, world: int) -> None:
    """Three and five ranks do not divide the four slots: they cut through lanes."""
    assert shared(job, world, 10) == shared(job, 1, 10)


def test_resuming_on_three_ranks_and_then_two_equals_one_uninterrupted(job: TrainJob) -> None:
    resumed = shared(job, 1, 3) | shared(job, 3, 4, first=3) | shared(job, 2, 5, first=7)
    assert resumed == shared(job, 1, 12)


def test_samples_are_numbered_without_gaps(job: TrainJob) -> None:
    batches = steps(job, 0, 1, 5)
    for stream, per_step in job.step.samples.items():
        seen = [number for step in batches for batch in step if batch.slot.stream == stream for number in batch.sample]
        assert seen == list(range(5 * per_step))


@pytest.mark.parametrize("first", [1, 4, 23])
def test_a_feed_that_starts_later_continues_exactly(job: TrainJob, first: int) -> None:
    assert shared(job, 1, 5, first).items() <= shared(job, 1, first + 5).items()


def test_every_sample_is_read_once_an_epoch(job: TrainJob) -> None:
    """In 35 steps one lane of images reads six epochs of 35 rows, and three of videos share nine."""
    samples = shared(job, 1, 35)
    assert set(Counter(caption for (stream, _), caption in samples.items() if stream == "images").values()) == {6}
    assert set(videos(samples)) == set(range(35)) and samples.keys() == {
        (stream, number) for stream in STREAMS for number in range(35 * job.step.samples[stream])
    }


def test_a_closed_feed_has_ended(job: TrainJob) -> None:
    feed = Feed(job, 0, 1, 0, draw)
    iterator = iter(feed)
    list(next(iterator))
    feed.close()
    assert list(iterator) == []


def test_shards_that_are_added_join_at_the_next_epoch_and_resuming_finds_the_same(job: TrainJob) -> None:
    for stream in STREAMS:
        Epochs(job, stream)  # the first begins
    add_shards(Path(job.run_dir), 7, 14)
    after = shared(job, 1, 20)
    images = [int(after["images", number]) for number in range(20 * 6)]
    assert sorted(images[:35]) == list(range(35))
    assert sorted(images[35 : 35 + 70]) == list(range(70))
    add_shards(Path(job.run_dir), 14, 20)
    assert shared(job, 1, 3) | shared(job, 3, 4, first=3) | shared(job, 2, 13, first=7) == after


def test_shards_of_another_shape_cannot_join(job: TrainJob) -> None:
    for stream in STREAMS:
        Epochs(job, stream)
    add_shards(Path(job.run_dir), 0, 7, shape=(4, 4))
    with pytest.raises(ValueError, match=r"0\.parquet cannot join epoch 1: .*\(4, ., 4, 4\).*\(4, ., 2, 2\)"):
        shared(job, 1, 8)


def damage(job: TrainJob, number: int, how: str) -> None:
    """A shard of videos is lost, cut short, or one of its bits turns."""
    path = Path(job.run_dir) / f"data/latents/videos/{number}.parquet"
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "turned":
        content[content.index(torch.full((32,), 5.0 * number).half().numpy().tobytes())] ^= 1  # its first row's mean
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "reason"), [("lost", "No such file"), ("cut", "not a Parquet file"), ("turned", "CRC checksum")]
)
def test_a_bad_shard_stops_training_by_name(job: TrainJob, how: str, reason: str) -> None:
    damage(job, 4, how)
    with pytest.raises(BadShard, match=rf"videos/4\.parquet: row group [01] cannot be read \(.*{reason}"):
        shared(job, 1, 5)


@pytest.mark.parametrize(("how", "lost"), [("lost", range(20, 25)), ("cut", range(20, 25)), ("turned", range(20, 23))])
def test_other_rows_take_the_place_of_a_skipped_shard_s(job: TrainJob, how: str, lost: range) -> None:
    whole = shared(job, 1, 4)
    damage(job, 4, how)
    skipping = replace(job, train=replace(job.train, bad_shards="skip"))
    skipped = shared(skipping, 1, 4)
    assert skipped.keys() == whole.keys()
    for sample, caption in whole.items():
        if sample[0] == "videos" and int(caption) in lost:
            assert int(skipped[sample]) not in lost
        else:
            assert skipped[sample] == caption
    lines = storage.read_lines(f"{job.run_dir}/train/skipped/0.jsonl")
    told = {(line["epoch"], line["stream"], line["shard"], line["group"]) for line in lines if line["epoch"] == 0}
    assert told == {(0, "videos", "4.parquet", group) for group in range(1 if how == "turned" else 2)}


def test_resuming_skips_the_same_even_if_the_shard_was_mended(job: TrainJob) -> None:
    path = Path(job.run_dir) / "data/latents/videos/4.parquet"
    content = path.read_bytes()
    skipping = replace(job, train=replace(job.train, bad_shards="skip"))
    damage(job, 4, "lost")
    skipped = shared(skipping, 1, 4)
    assert shared(skipping, 1, 1) | shared(skipping, 3, 1, first=1) | shared(skipping, 2, 2, first=2) == skipped
    path.write_bytes(content)
    assert shared(skipping, 2, 4) == skipped


def test_where_no_shard_can_be_read_skipping_stops_too(job: TrainJob) -> None:
    for number in range(7):
        damage(job, number, "lost")
    with pytest.raises(BadShard, match="neither it nor any of 20 groups in its place"):
        shared(replace(job, train=replace(job.train, bad_shards="skip")), 1, 1)


def held_out(job: TrainJob, stream: Stream, size: int = 4) -> list[Batch]:
    return list(held_out_batches(job, stream, size, draw))


def test_held_out_rows_are_never_trained_on_though_shards_are_added(job: TrainJob) -> None:
    job = replace(job, train=replace(job.train, held_out_rows=7))
    first = {stream: held_out(job, stream) for stream in STREAMS}
    add_shards(Path(job.run_dir), 7, 9)
    samples = shared(job, 1, 40)
    for stream, batches in first.items():
        kept = [caption for batch in batches for caption in batch.captions]
        assert len(set(kept)) == 7 and [len(batch.captions) for batch in batches] == [4, 3]
        assert sum(batch.slot.weight for batch in batches) == 1
        assert kept == [caption for batch in held_out(job, stream) for caption in batch.captions]
        trained = {caption for (other, _), caption in samples.items() if other == stream}
        assert trained == {str(row) for row in range(45)} - set(kept)


def test_holding_out_all_rows_is_an_error(job: TrainJob) -> None:
    with pytest.raises(ValueError, match="train.held_out_rows: none of the 35 rows of images are left"):
        Feed(replace(job, train=replace(job.train, held_out_rows=35)), 0, 1, 0, draw)
