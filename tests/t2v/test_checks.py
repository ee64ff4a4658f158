"""What is wrong with a run is told at once, in one line that names the key; what it will do is told too."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from t2v import shards, storage
from t2v.checks import _bytes_of_checkpoints, _memory, _storage, check, dry_run
from t2v.config import MixConfig, TextConfig
from t2v.job import STREAMS, TrainJob
from t2v.shards import LatentInfo, write_shard
from tests.t2v.test_memory import online, published
from tests.t2v.train_ranks import job as tiny_job

TWO_CPUS = {"CPU": 2.0}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE and latents of both streams, of 2 frames of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "vae").mkdir()
    save_file({"weight": np.zeros(3, np.float32)}, folder / "vae" / shards.WEIGHTS)
    for stream, frames in (("images", 1), ("videos", 2)):
        info = LatentInfo(stream, (4, frames, 4, 4), shards.encoder_id(str(folder / "vae")), 1.0, "settings")  # type: ignore[arg-type]
        mean, names = np.zeros((20, *info.shape), np.float16), [f"{stream} {row}" for row in range(20)]
        path = str(folder / "data/latents" / stream / "0.parquet")
        write_shard(path, info, names, names, mean, mean, [3.0] * 20, [0.0] * 20, rows_per_group=5)
    return folder


@pytest.fixture
def job(run_dir: Path) -> TrainJob:
    return changed(tiny_job(str(run_dir), 2), gpus_per_worker=0, cpus_per_worker=1)


def changed(job: TrainJob, **train: object) -> TrainJob:
    return replace(job, train=replace(job.train, **train))  # type: ignore[arg-type]


def test_a_good_run_is_described_in_seconds(job: TrainJob) -> None:
    begun = time.monotonic()
    told = "\n".join(check(job, TWO_CPUS))
    assert time.monotonic() - begun < 5
    assert "6 steps of 4 images and 6 videos" in told
    assert "20 videos to train on in 1 shards, each seen 1.8 times" in told
    assert "idle" in told and "checkpoint takes" in told
    assert not (Path(job.run_dir) / "train/writable").exists()


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"workers": 4}, "train.workers: 4 workers of train.cpus_per_worker 1 need 4 CPUs, the cluster has 2"),
        ({"gpus_per_worker": 1}, "train.workers: 2 workers of train.gpus_per_worker 1 need 2 GPUs, the cluster has 0"),
        ({"workers": 5}, "train.mix: 4 images a step cannot be shared by 5 ranks (with 5 of train.workers)"),
        ({"workers": 8, "min_workers": 3}, "(with 5 of train.workers)"),
        ({"workers": 8, "min_workers": 4, "mix": MixConfig(slots=8, image_every=4)}, "train.min_workers: 4 workers"),
        ({"held_out_rows": 20}, "train.held_out_rows: 20 are all images that there are"),
        ({"keep_checkpoints": 10**9}, "train.keep_checkpoints: 1000000000 and the next one take"),
    ],
)
def test_what_keeps_a_run_from_training_names_its_key(job: TrainJob, train: dict, said: str) -> None:
    with pytest.raises(ValueError) as raised:
        check(changed(job, **train), TWO_CPUS)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_shards_and_weights_must_be_the_configurations(job: TrainJob) -> None:
    for changes, said in (
        (
            {"size": 64},
            "data/latents/images has latents of 32 pixels; jobs/prepare_data.py makes those of data.size",
        ),
        ({"frames": 4}, "videos: shards hold latents of (4, 2, 4, 4)"),
        ({"model": replace(job.model, text=TextConfig())}, "model.text.weights is not set"),
        ({"model": replace(job.model, text=TextConfig("/nowhere.pt"))}, "no file or folder /nowhere.pt"),
        ({"run_dir": "/nowhere"}, "/nowhere/data/latents/images"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            check(replace(job, **changes), TWO_CPUS)  # type: ignore[arg-type]
        assert said in str(raised.value)


def test_a_folder_that_cannot_be_written_is_told(job: TrainJob) -> None:
    with pytest.raises(ValueError, match="run_dir: /dev/null/run/train cannot be written: "):
        _storage(replace(job, run_dir="/dev/null/run"), TWO_CPUS)


def test_milestones_that_are_there_are_no_room_for_checkpoints_and_those_to_come_are_told(
    job: TrainJob, tmp_path: Path
) -> None:
    long = changed(replace(job, run_dir=str(tmp_path)), samples=10**6, milestone_every_samples=10**5)
    (line,) = _storage(long, TWO_CPUS)
    assert "10 milestones, of which 10 are to come, add 80.0 MB by the end" in line
    for place in ("checkpoint_1", "milestones/000000100000/checkpoint"):
        storage.write_json(f"{long.folder}/{place}/rank-00000.json", "x" * 1_000_000)
    assert 1_000_000 <= _bytes_of_checkpoints(long.folder) < 1_900_000
    assert "of which 9 are to come" in _storage(long, TWO_CPUS)[0]
    _, warning = _storage(changed(long, samples=10**12, milestone_every_samples=10**5), TWO_CPUS)
    assert "warning: " in warning and "no room for all of them" in warning


def test_the_published_model_must_fit_the_smallest_card() -> None:
    large = published(mix=MixConfig())
    h100, both = {"accelerator_type:H100": 10.0}, {"accelerator_type:H100": 1.0, "accelerator_type:A100-40G": 1.0}
    with pytest.raises(ValueError, match=r"train.mix.micro_frames: None has a rank need 9\d.* one H100 has 79.1"):
        _memory(large, h100)
    small = published(mix=MixConfig(micro_frames=160))
    assert "of the 79.1 of one H100" in _memory(small, h100)[0]
    with pytest.raises(ValueError, match="one A100 has 39.4"):
        _memory(small, both)
    shared = online(0.1, gpus_per_worker=0.8, mix=MixConfig(micro_frames=160))
    named = "2 x an encoder of train.feed online on its GPU 10.0)"
    assert f"{named} of the 79.1 of one H100" in _memory(shared, h100)[0]
    with pytest.raises(ValueError, match="lower it or data.encode.batch_frames, set train.recompute") as raised:
        _memory(replace(shared, train=replace(shared.train, workers=1)), h100)
    assert f"{named}, one H100 has 79.1" in str(raised.value)
    growing = published(min_workers=1, graphs=True)
    with pytest.raises(ValueError, match=r"84\.\d GiB .* with 1 workers, one H100 .* or train.min_workers"):
        _memory(growing, h100)
    assert "with 8 workers" in _memory(replace(growing, train=replace(growing.train, min_workers=8)), h100)[0]
    assert "nothing is known" in _memory(large, {"accelerator_type:NEW": 1.0})[0]


def test_a_dry_run_trains_a_step_and_leaves_nothing(
    job: TrainJob, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path(job.run_dir).rglob("*"))
    dry_run(job)
    printed = capsys.readouterr().out
    assert "rehearsed a step of 4 images and 2 videos on random data" in printed
    assert [path for path in sorted(Path(job.run_dir).rglob("*")) if path.is_file()] == [
        p for p in before if p.is_file()
    ]


def test_a_dry_run_of_what_cannot_be_names_all_problems(
    job: TrainJob, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    real = published()
    real = replace(real, run_dir=job.run_dir, model=replace(real.model, vae=job.model.vae))
    with pytest.raises(ValueError, match="[23] problems"):
        dry_run(real)
    printed = capsys.readouterr().out
    assert "problem: train.workers: 80 workers of train.gpus_per_worker 1 need 80 GPUs" in printed
    assert "problem: model.text.weights is not set" in printed
    assert "no step is rehearsed: 160 images and 10 videos are" in printed
    assert set(STREAMS) <= set(printed.split())
