"""Training without Ray: resumed equals uninterrupted, one rank equals two, and what does not fit is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from t2v import shards, storage
from t2v.config import MixConfig, TrainConfig
from t2v.shards import LatentInfo, write_shard
from t2v.trainer import ema_decay, learning_rate
from tests.t2v.train_ranks import STEP_SAMPLES, job

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a VAE and latents of both streams, as the preparation leaves them, and an image UNet."""
    folder = tmp_path_factory.mktemp("data")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, **blocks).save_pretrained(folder / "vae")
    rng = np.random.default_rng(0)
    for stream, frames in (("images", 1), ("videos", 2)):
        info = LatentInfo(stream, (4, frames, 4, 4), shards.encoder_id(str(folder / "vae")), 1.0, "settings")
        for index in range(3):
            mean = rng.normal(size=(10, *info.shape)).astype(np.float16)
            names = [f"{stream} {index} {row}" for row in range(10)]
            path = str(folder / "data/latents" / stream / f"{index}.parquet")
            write_shard(path, info, names, names, mean, mean - 3, [3.0] * 10, [0.0] * 10, rows_per_group=5)
    unet = job("", 1).model.unet
    UNet2DConditionModel(
        block_out_channels=unet.block_out_channels, cross_attention_dim=16, attention_head_dim=[2, 4],
        norm_num_groups=8, layers_per_block=1, use_linear_projection=True,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ).save_pretrained(folder / "start" / "unet")  # fmt: skip
    return folder


def train(data: Path, folder: Path, ranks: int, *plan: dict) -> str:
    """Runs tests/t2v/train_ranks.py on so many ranks, and returns what they print."""
    for leg in plan:
        shutil.copytree(data, folder / leg["run"], dirs_exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = ["-m", "tests.t2v.train_ranks", str(folder), json.dumps(plan)]
    done = subprocess.run([*command, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


HALF, WHOLE = 3 * STEP_SAMPLES, 6 * STEP_SAMPLES


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, uninterrupted; resumed; and what other numbers of ranks make of its first half."""
    folder = tmp_path_factory.mktemp("runs")
    straight = {"run": "straight", "samples": WHOLE}
    resumed = {"run": "resumed", "samples": WHOLE, "from": [f"straight/checkpoint-{HALF}"]}
    train(data, folder, 2, straight, resumed)
    return folder


def losses(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss_images"], line["loss_videos"]) for line in storage.read_lines(f"{run_dir}/train/log.jsonl")]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "average.safetensors")


def furthest(run_dir: Path, other: Path) -> float:
    one, two = weights(run_dir), weights(other)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder: Path) -> None:
    assert losses(folder / "resumed") == losses(folder / "straight")[3:]
    assert furthest(folder / "resumed", folder / "straight") == 0


def test_a_missing_start_is_told_at_once_and_no_longer_once_there_is_a_checkpoint(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "run")
    good = job(str(tmp_path / "run"), 2)
    lost = replace(good, model=replace(good.model, start="/weights/sd21"))
    with pytest.raises(FileNotFoundError, match="model.start: there is no file or folder /weights/sd21"):
        lost.inventory()
    storage.write_json(storage.join(good.model_folder, "t2v.json"), {})
    assert lost.inventory().keys() == {"images", "videos"}


def test_what_does_not_fit_is_refused_before_training(data: Path) -> None:
    good = job(str(data), 2)
    assert {stream: len(found) for stream, found in good.inventory().items()} == {"images": 3, "videos": 3}
    with pytest.raises(
        ValueError, match=r"shards hold latents of \(4, 1, 4, 4\), the configuration wants \(4, 1, 8, 8\)"
    ):
        replace(good, size=64).inventory()
    with pytest.raises(ValueError, match="4 images a step cannot be shared by 5 ranks"):
        replace(good, train=replace(good.train, workers=5)).inventory()
    with pytest.raises(FileNotFoundError, match="run jobs/prepare_data.py first"):
        replace(good, run_dir=str(data / "elsewhere")).inventory()
    (data / "other").mkdir()
    (data / "other/diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="shards were encoded by VAE"):
        replace(good, model=replace(good.model, vae=str(data / "other"))).inventory()


def test_learning_rate_and_decay_count_samples() -> None:
    config = TrainConfig(learning_rate=1e-3, warmup_samples=100, ema_halflife_samples=1000, mix=MixConfig())
    assert [learning_rate(config, samples) for samples in (50, 100, 10_000)] == [5e-4, 1e-3, 1e-3]
    assert ema_decay(config, 1_000_000, 1000) == 0.5
    assert ema_decay(config, 2000, 100) == 0.5  # a young run's half-life is 5 % of its age
