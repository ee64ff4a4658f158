"""A training run's latents for tests of its order: each row's latent is its number, which is its caption too."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from t2v.config import MixConfig
from t2v.diffusion import Draw
from t2v.job import STREAMS, TrainJob
from t2v.shards import LatentInfo, Shard, list_shards, write_index, write_shard
from tests.t2v.train_ranks import job as tiny_job

SHARD_ROWS = 5


def make_job(run_dir: Path, **train: object) -> TrainJob:
    """Four slots a step: 6 images, 9 videos of 2 frames; latents of 2 x 2."""
    job = replace(tiny_job(str(run_dir), 1), seed=3, size=16)
    mix = MixConfig(slots=4, image_every=4, frames_per_slot=6)
    return replace(job, train=replace(job.train, **{"shuffle_rows": 12, "mix": mix} | train))  # type: ignore[arg-type]


def add_shards(run_dir: Path, first: int, end: int, shape: tuple[int, int] = (2, 2)) -> None:
    """Shards numbered first to before end, five rows each in row groups of three and two, in both streams."""
    for stream in STREAMS:
        folder = run_dir / "data/latents" / stream
        info = LatentInfo(stream, (4, 1 if stream == "images" else 2, *shape), "vae", 1.0, "settings")
        new = [_shard(folder / f"{number}.parquet", info, number) for number in range(first, end)]
        write_index(str(folder), [*(list_shards(str(folder)) if first else []), *new])


def draw(seed: int | str, indices: Sequence[int], shape: Sequence[int]) -> Draw:
    """Draws that tell what they were made for."""
    numbers = torch.tensor(indices)
    return Draw(numbers, torch.zeros(len(indices), *shape), torch.ones(len(indices), *shape), numbers < 0)


def _shard(path: Path, info: LatentInfo, number: int) -> Shard:
    rows = np.arange(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
    mean = np.broadcast_to(rows[:, None, None, None, None], (SHARD_ROWS, *info.shape)).astype(np.float16)
    names = [str(row) for row in rows]
    zeros = [0.0] * SHARD_ROWS
    return write_shard(str(path), info, names, names, mean, -mean, zeros, zeros, rows_per_group=3)
