"""Where training finds the latents of its size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t2v import shards, storage
from t2v.epochs import Epochs
from t2v.identity import keep_identity
from t2v.job import STREAMS, TrainJob
from t2v.shards import LatentInfo, write_index, write_shard
from tests.t2v.train_ranks import job as tiny_job


def write_latents(folder: Path, size: int, encoder: str) -> None:
    """Three rows of each stream, as a preparation leaves them."""
    for stream in STREAMS:
        shape = (4, 1 if stream == "images" else 2, size // 8, size // 8)
        info = LatentInfo(stream, shape, encoder, 1.0, "settings")
        mean, names = np.zeros((3, *shape), np.float16), ["a", "b", "c"]
        path = str(folder / stream / "0.parquet")
        write_index(str(folder / stream), [write_shard(path, info, names, names, mean, mean, [3.0] * 3, [0.0] * 3)])


@pytest.fixture
def job(tmp_path: Path, data: Path) -> TrainJob:
    """Of 32 pixels, of which `latents` holds some, and `latents_64` some of 64."""
    whole = tiny_job(str(tmp_path), 1)
    whole = replace(whole, model=replace(whole.model, vae=str(data / "vae"), start=None))
    for folder, size in (("latents", 32), ("latents_64", 64)):
        write_latents(tmp_path / "data" / folder, size, shards.encoder_id(whole.model.vae))
    return whole


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(("size", "folder"), [(32, "latents"), (64, "latents_64")])
def test_a_run_trains_on_the_latents_of_its_size(job: TrainJob, size: int, folder: str, indexed: bool) -> None:
    if not indexed:
        for index in Path(job.run_dir).rglob("index.json"):
            index.unlink()
    job = replace(job, size=size)
    for stream, source in job.sources().items():
        assert source.path == f"{job.run_dir}/data/{folder}/{stream}" and source.info.shape[-1] == size // 8
        assert all(group.path.startswith(f"{source.path}/") for group in Epochs(job, stream)[0].groups)


def test_the_other_folder_is_not_needed_and_not_missed(job: TrainJob) -> None:
    storage.remove_folder(f"{job.run_dir}/data/latents")
    assert replace(job, size=64).sources()["images"].path.endswith("/data/latents_64/images")
    with pytest.raises(FileNotFoundError, match="/data/latents/images: no latent shards with rows"):
        job.sources()


def test_what_was_prepared_last_as_the_size_itself_goes_before_what_was_once_made_beside(job: TrainJob) -> None:
    write_latents(Path(job.run_dir) / "data/latents", 64, shards.encoder_id(job.model.vae))
    assert replace(job, size=64).sources()["images"].path.endswith("/data/latents/images")


def test_a_size_that_was_not_prepared_is_told(job: TrainJob) -> None:
    with pytest.raises(ValueError, match=r"data\.size: 128, but .*/latents/images has .* 32 pixels; .*also_sizes"):
        replace(job, size=128).sources()


def test_a_run_goes_on_at_its_size_alone(job: TrainJob) -> None:
    keep_identity(job)
    with pytest.raises(ValueError, match=r"another size \(was 32\)"):
        keep_identity(replace(job, size=64))
    path = Path(job.run_dir) / "train/identity.json"
    begun = json.loads(path.read_text())
    del begun["size"]  # as runs had it that were begun before there was more than one
    path.write_text(json.dumps(begun))
    keep_identity(job)
