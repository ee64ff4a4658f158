"""Rows that are encoded meanwhile become batches: of the rank's own streams, shuffled, numbered, and waited for."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

from t2v.config import MixConfig, Stream, TrainConfig
from t2v.job import STREAMS, Source, TrainJob
from t2v.online import OnlineFeed, Tables, numbered
from t2v.shards import LatentInfo, Rows, rows_table
from tests.t2v.latents import SHARD_ROWS, draw, make_job


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    """Two slots, one of 6 images and one of 3 videos: with two ranks an image rank and a video rank."""
    whole = make_job(tmp_path, feed="online", mix=MixConfig(slots=2, image_every=2, frames_per_slot=6))
    infos = [LatentInfo(stream, (4, 1 if stream == "images" else 2, 2, 2), "vae", 1.0, "") for stream in STREAMS]
    return replace(whole, raw={info.stream: Source(info, "", "", 0, 0) for info in infos})


def tables(job: TrainJob, stream: Stream, begun: int = 0) -> Tables:
    """Raw shards, each row's latent and caption its number; no row of every third shard came through."""
    assert job.raw
    info = job.raw[stream].info
    for number in count(begun):
        rows = np.arange(number * SHARD_ROWS, (number + 1) * SHARD_ROWS * (number % 3 < 2))
        mean = np.broadcast_to(rows[:, None, None, None, None], (len(rows), *info.shape)).astype(np.float16)
        names, zeros = [str(row) for row in rows], np.zeros(len(rows), np.float32)
        yield numbered(rows_table("", info, Rows(names, names, mean, -mean, zeros, zeros)), number)
        yield None


def untouched() -> Tables:
    raise AssertionError("this rank trains on no such stream")
    yield


def test_a_rank_takes_its_own_streams_alone_and_no_row_twice(job: TrainJob) -> None:
    for rank, stream in enumerate(STREAMS):
        given = {each: tables(job, each) if each == stream else untouched() for each in STREAMS}
        begun = dict.fromkeys(STREAMS, 0)
        with closing(OnlineFeed(job, rank, 2, 5, draw, given, begun)) as feed:
            batches = [batch for step in islice(feed, 10) for batch in step]
            size = job.step.samples[stream]
            assert [batch.slot.stream for batch in batches] == [stream] * 10
            assert [number for batch in batches for number in batch.sample] == list(range(5 * size, 15 * size))
            numbers = [int(caption) for batch in batches for caption in batch.captions]
            assert len(set(numbers)) == 10 * size and numbers != sorted(numbers)
            assert [value for batch in batches for value in batch.mean[:, 0, 0, 0, 0].tolist()] == numbers
            assert feed.begun == begun | {stream: max(numbers) // SHARD_ROWS + 1}


def test_one_rank_takes_both_and_a_resumed_run_none_of_the_shards_before(job: TrainJob) -> None:
    begun: dict[Stream, int] = {"images": 4, "videos": 7}
    given = {stream: tables(job, stream, begun[stream]) for stream in STREAMS}
    with closing(OnlineFeed(job, 0, 1, 0, draw, given, begun)) as feed:
        batches = [batch for step in islice(feed, 4) for batch in step]
    assert [batch.slot.stream for batch in batches] == ["images", "videos"] * 4
    for batch in batches:
        assert min(int(caption) for caption in batch.captions) >= begun[batch.slot.stream] * SHARD_ROWS


def test_what_goes_wrong_reaches_the_trainer_and_waiting_is_counted_and_can_be_ended(job: TrainJob) -> None:
    def broken() -> Tables:
        yield next(tables(job, "images"))
        time.sleep(0.3)
        raise OSError("an encoder died")

    def silent() -> Iterator[None]:
        while True:
            time.sleep(0.05)
            yield None

    others = {"videos": tables(job, "videos")}
    with closing(OnlineFeed(job, 0, 1, 0, draw, {"images": broken(), **others}, dict.fromkeys(STREAMS, 0))) as feed:
        with pytest.raises(OSError, match="an encoder died"):
            next(iter(feed))
        assert feed.waited_s > 0.2
    begun = time.monotonic()
    OnlineFeed(job, 0, 1, 0, draw, {"images": silent(), **others}, dict.fromkeys(STREAMS, 0)).close()
    assert time.monotonic() - begun < 2


def test_held_out_rows_need_latents() -> None:
    with pytest.raises(ValueError, match="held_out_rows: 5 rows are to be kept as latents, but with feed online"):
        TrainConfig(feed="online", held_out_rows=5)
