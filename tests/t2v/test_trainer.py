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
from safetensors.torch import load_file

from t2v import storage
from t2v.checkpoint import read_state
from t2v.config import MixConfig, TrainConfig
from t2v.keys import is_temporal
from t2v.trainer import ema_decay, learning_rate
from tests.t2v.train_ranks import STEP_SAMPLES, job

PROJECT = Path(__file__).parents[2]


def train(data: Path, folder: Path, ranks: int, *plan: dict) -> str:
    """Runs tests/t2v/train_ranks.py on so many ranks, and returns what they print."""
    for leg in plan:
        shutil.copytree(data, folder / leg["run"], dirs_exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = ["-m", "tests.t2v.train_ranks", str(folder), json.dumps(plan)]
    done = subprocess.run([*command, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


HALF, WHOLE = 3 * STEP_SAMPLES, 6 * STEP_SAMPLES
KINDS = [(0, "fp32"), (2, "fp32"), (2, "bf16"), (3, "bf16")]  # of ZeRO and precision
STAGES = {0: "plain", 1: "stage 1", 3: "stage 3"}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, of one, and of one that becomes three and then two; each leg goes on from another's middle."""
    folder = tmp_path_factory.mktemp("runs")
    half = [f"straight/checkpoint-{HALF}"]
    legs = [
        {"run": "straight", "samples": WHOLE},
        {"run": "resumed", "samples": WHOLE, "from": half},
        *({"run": name, "samples": WHOLE, "train": {"zero_stage": stage}} for stage, name in STAGES.items()),
        {"run": "stage 3 to 2", "samples": WHOLE, "from": [f"stage 3/checkpoint-{HALF}"]},
        {"run": "2 to stage 3", "samples": WHOLE, "from": half, "train": {"zero_stage": 3}},
        {"run": "2 to plain", "samples": WHOLE, "from": half, "train": {"zero_stage": 0}},
        {"run": "temporal", "samples": HALF, "train": {"trained": "temporal"}},
        {"run": "stopped", "samples": WHOLE, "stop_at": 5 * STEP_SAMPLES, "news_from": STEP_SAMPLES},
    ]
    train(data, folder, 2, *legs)
    train(data, folder, 1, {"run": "one", "samples": WHOLE}, elastic(0, 6) | {"run": "still"}, elastic(0, 2))
    train(data, folder, 3, elastic(2, 4))
    damage(folder)
    from_damaged = {"run": "mended", "samples": WHOLE, "from": ["half", "damaged", *half]}
    said = train(data, folder, 2, elastic(4, 6), from_damaged, *(broken(*kind, n) for kind in KINDS for n in (1, 2)))
    (folder / "said.txt").write_text(said)
    return folder


def damage(folder: Path) -> None:
    """Copies of the last checkpoint: `half` lacks what one rank writes last, in `damaged` one bit is another."""
    for name in ("half", "damaged"):
        shutil.copytree(folder / "straight" / f"checkpoint-{WHOLE}", folder / name)
    (folder / "half/rank-00000.json").unlink()
    part = folder / "damaged/rank-00001-000.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def broken(stage: int, precision: str, steps: int) -> dict:
    changes = {"max_skipped_steps": 2, "zero_stage": stage, "precision": precision}
    return {
        "run": f"broken {stage} {precision} {steps}",
        "samples": WHOLE,
        "train": changes,
        "broken_at": 2,
        "broken": steps,
    }


def elastic(first: int, end: int) -> dict:
    """Without dropout, whose masks are drawn a micro-batch at a time: three ranks cut four slots into other ones."""
    start = {"from": [f"elastic/checkpoint-{first * STEP_SAMPLES}"]} if first else {}
    return {"run": "elastic", "samples": end * STEP_SAMPLES, "dropout": 0.0} | start


def losses(run_dir: Path) -> np.ndarray:
    """Of images and videos, a row a step."""
    lines = storage.read_lines(f"{run_dir}/train/log.jsonl")
    return np.array([(line["loss_images"], line["loss_videos"]) for line in lines])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "average.safetensors")


def furthest(run_dir: Path, other: Path) -> float:
    one, two = weights(run_dir), weights(other)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder: Path) -> None:
    assert (losses(folder / "resumed") == losses(folder / "straight")[3:]).all()
    assert furthest(folder / "resumed", folder / "straight") == 0


@pytest.mark.parametrize("name", ["one", *STAGES.values()])
def test_one_rank_and_every_stage_of_zero_train_alike(folder: Path, name: str) -> None:
    np.testing.assert_allclose(losses(folder / name), losses(folder / "straight"), rtol=1e-6)


@pytest.mark.parametrize("name", ["stage 3 to 2", "2 to stage 3", "2 to plain"])
def test_a_checkpoint_goes_on_at_another_stage(folder: Path, name: str) -> None:
    np.testing.assert_allclose(losses(folder / name), losses(folder / "straight")[3:], rtol=1e-6)
    assert furthest(folder / name, folder / "straight") < 1e-4


def test_ranks_may_be_one_then_three_then_two(folder: Path) -> None:
    np.testing.assert_allclose(losses(folder / "elastic"), losses(folder / "still"), rtol=1e-6)
    ranks = [start["ranks"] for start in storage.read_lines(f"{folder}/elastic/train/starts.jsonl")]
    assert ranks == [1, 3, 2]


def test_a_rank_that_is_asked_to_stop_has_all_write_a_checkpoint(folder: Path) -> None:
    assert read_state(f"{folder}/stopped/checkpoint-{5 * STEP_SAMPLES}")["samples"] == 5 * STEP_SAMPLES
    assert (losses(folder / "stopped") == losses(folder / "straight")[:5]).all()


def test_news_of_the_cluster_has_all_write_one_checkpoint(folder: Path) -> None:
    """Besides those that are due: after three steps, and at the end."""
    found = {int(path.name.split("-")[1]) for path in (folder / "stopped").glob("checkpoint-*")}
    assert found == {STEP_SAMPLES, 3 * STEP_SAMPLES, 5 * STEP_SAMPLES}


def test_the_spatial_part_can_be_left_as_it_is(folder: Path) -> None:
    pieces = read_state_names(folder / "temporal" / f"checkpoint-{HALF}")
    assert pieces and all(is_temporal(name) for name in pieces)
    straight = read_state_names(folder / "straight" / f"checkpoint-{HALF}")
    assert pieces == {name for name in straight if is_temporal(name)}


def read_state_names(checkpoint: Path) -> set[str]:
    shares = [json.loads(path.read_text()) for path in checkpoint.glob("rank-*.json")]
    return {name for share in shares for part in share["parts"] for name in part["pieces"]}


def test_every_weight_is_trained_and_a_fresh_run_starts_from_public_ones(folder: Path) -> None:
    start = load_file(folder / "straight/start/unet/diffusion_pytorch_model.safetensors")
    trained = weights(folder / "straight")
    moved = {name: float((trained[name] - tensor).abs().max()) for name, tensor in start.items()}
    assert min(moved.values()) > 0 and max(moved.values()) < 6 * 2e-3  # six steps of AdamW at a learning rate of 1e-3


def test_a_damaged_or_half_written_checkpoint_is_skipped_for_the_one_before(folder: Path) -> None:
    said = (folder / "said.txt").read_text()
    assert "half: the checkpoint is half-written, 1 of 2 ranks have finished it" in said
    assert "rank-00001-000.safetensors: this part of the checkpoint is damaged" in said
    assert furthest(folder / "mended", folder / "straight") == 0


@pytest.mark.parametrize(("stage", "precision"), KINDS)
def test_steps_without_a_finite_gradient_are_left_out_on_all_ranks_and_too_many_end_the_run(
    folder: Path, stage: int, precision: str
) -> None:
    one = folder / f"broken {stage} {precision} 1"
    skipped = [line["skipped_steps"] for line in storage.read_lines(f"{one}/train/log.jsonl")]
    assert skipped == [0, 0, 1, 1, 1, 1]
    assert np.isfinite(losses(one)[3:]).all()
    assert all(weight.isfinite().all() for weight in weights(one).values())
    said = (folder / "said.txt").read_text()
    assert said.count(
        "Diverged: 2 steps in a row had a gradient that is not finite; the last at 40 samples"
    ) == 2 * len(KINDS)
    assert not (folder / f"broken {stage} {precision} 2/average.safetensors").exists()


def test_a_missing_start_is_told_at_once_and_no_longer_once_there_is_a_checkpoint(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "run")
    good = job(str(tmp_path / "run"), 2)
    lost = replace(good, model=replace(good.model, start="/weights/sd21"))
    with pytest.raises(FileNotFoundError, match="model.start: there is no file or folder /weights/sd21"):
        lost.sources()
    storage.write_json(f"{good.run_dir}/train/checkpoint_1/rank-00000.json", {})
    assert lost.sources().keys() == {"images", "videos"}


def test_what_does_not_fit_is_refused_before_training(data: Path) -> None:
    good = job(str(data), 2)
    assert {stream: found.shards for stream, found in good.sources().items()} == {"images": 3, "videos": 3}
    with pytest.raises(ValueError, match=r"data.size: 64, but .*/latents/images has latents of 32 pixels"):
        replace(good, size=64).sources()
    wide = replace(good.model, unet=replace(good.model.unet, channels=8))
    with pytest.raises(
        ValueError, match=r"shards hold latents of \(4, 1, 4, 4\), the configuration wants \(8, 1, 4, 4\)"
    ):
        replace(good, model=wide).sources()
    with pytest.raises(ValueError, match="4 images a step cannot be shared by 5 ranks"):
        replace(good, train=replace(good.train, workers=5)).sources()
    with pytest.raises(FileNotFoundError, match="run jobs/prepare_data.py first"):
        replace(good, run_dir=str(data / "elsewhere")).sources()
    (data / "other").mkdir()
    (data / "other/diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="shards were encoded by VAE"):
        replace(good, model=replace(good.model, vae=str(data / "other"))).sources()


def test_learning_rate_and_decay_count_samples() -> None:
    config = TrainConfig(learning_rate=1e-3, warmup_samples=100, ema_halflife_samples=1000, mix=MixConfig())
    assert [learning_rate(config, samples) for samples in (50, 100, 10_000)] == [5e-4, 1e-3, 1e-3]
    assert ema_decay(config, 1_000_000, 1000) == 0.5
    assert ema_decay(config, 2000, 100) == 0.5  # a young run's half-life is 5 % of its age
