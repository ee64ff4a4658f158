"""Predictions against what a card measured (tests/benchmarks/results/unet_h200.txt), and how ZeRO divides them."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from diffusers.models import AutoencoderKL

from t2v import autoencoder
from t2v.cards import GIB
from t2v.config import DiffusionConfig, MixConfig, ModelConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig
from t2v.frozen import load_text
from t2v.job import Source, TrainJob
from t2v.memory import (
    ENCODER_CONTEXT,
    ENCODER_TENSORS,
    activation_bytes,
    count_text_weights,
    count_weights,
    encoder_bytes,
    encoders_beside,
    predict,
)
from t2v.mix import Slot
from t2v.shards import LatentInfo
from t2v.unet import UNet

STATE = 18  # bytes a weight in the measured step: bf16, and in fp32 master, gradient and moments
SD = {  # Stable Diffusion's VAE
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def published(**train: object) -> TrainJob:
    settings = TrainConfig(**{"mix": MixConfig(micro_frames=160)} | train)  # type: ignore[arg-type]
    return TrainJob("", 0, 256, 16, ModelConfig(), DiffusionConfig(), settings, SampleConfig())


@pytest.mark.parametrize(
    ("stream", "count", "recompute", "peak_gib"),
    [
        ("videos", 12, "activations", 73.6),
        ("videos", 26, "activations", 131.3),
        ("videos", 16, "gates", 67.4),
        ("videos", 32, "gates", 110.8),
        ("images", 384, "activations", 115.0),
        ("images", 512, "gates", 100.1),
    ],
)
def test_a_pass_needs_what_was_measured(stream: str, count: int, recompute: str, peak_gib: float) -> None:
    job = published(recompute=recompute)
    weights, trained, _ = count_weights(job.model.unet)
    assert weights == trained == 1_411_233_860
    slot = Slot(stream, 0, count, 1.0)  # type: ignore[arg-type]
    assert (STATE * weights + activation_bytes(job, slot)) / GIB == pytest.approx(peak_gib, rel=0.02)


def test_zero_divides_what_it_says() -> None:
    alone, shared = published(workers=80, zero_stage=1), published(workers=80, zero_stage=2)
    state = predict(shared)["optimizer and average"]
    assert state == pytest.approx(16 * 1_411_233_860 / 80) == predict(alone)["optimizer and average"]
    assert predict(alone)["gradients"] == 4 * 1_411_233_860 == predict(shared)["gradients"]  # reduced once a step
    assert predict(published(zero_stage=3))["weights"] < predict(shared)["weights"]
    assert predict(published(trained="temporal"))["optimizer and average"] < state


def test_graphs_keep_the_memory_of_activations_while_the_optimizer_steps() -> None:
    mix = MixConfig(slots=8, frames_per_slot=256, micro_frames=128)
    needed = predict(published(workers=1, mix=mix, recompute="gates", graphs=True))
    assert sum(needed.values()) / GIB == pytest.approx(66443 / 1024, rel=0.03)  # what nvidia-smi said of an H100


def test_a_small_batch_on_one_gpu_is_fullest_in_the_optimizers_step() -> None:
    mix = MixConfig(slots=2, image_every=2, frames_per_slot=16, micro_frames=16)
    small = predict(published(workers=1, mix=mix, zero_stage=2))
    large = predict(published(workers=1, mix=MixConfig(slots=2, image_every=2, micro_frames=160)))
    weights, *_ = count_weights(UNetConfig())
    assert small["gradients"] == (4 + 8) * weights and large["gradients"] == 4 * weights  # DeepSpeed's norm is in fp64
    assert sum(small.values()) < sum(large.values())


def test_weights_are_counted_as_the_networks_have_them() -> None:
    unet = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=16, norm_groups=8)
    model = UNet(unet)
    temporal = [weight.numel() for name, weight in model.named_parameters() if "temp_" in name or "_in." in name]
    found = count_weights(unet, TrainConfig(trained="temporal"))
    assert found[0] == sum(weight.numel() for weight in model.parameters())
    assert 0 < found[1] < found[0] and found[1] <= sum(temporal)
    text = TextConfig("random", width=64, heads=4, layers=3)
    real = sum(weight.numel() for weight in load_text(text).parameters())
    assert count_text_weights(text) == pytest.approx(real, rel=0.01)


def online(each: float, **train: object) -> TrainJob:
    """A run whose encoders have so much of a GPU each, and take 5 GiB of its memory."""
    info = LatentInfo("videos", (4, 16, 32, 32), "", 1.0, "")
    source = Source(info, "", "", 1, 1, needs={"CPU": 4.0, "GPU": each}, encoder_bytes=5 * GIB)
    return replace(published(feed="online", **train), raw={"images": source, "videos": source})


@pytest.mark.parametrize(
    ("rank", "each", "count"),
    [(0.9, 0.1, 1), (0.8, 0.1, 2), (0.5, 0.2, 2), (0.7, 0.4, 0), (1, 0.1, 0), (0.9, 1, 0), (0.9, 0, 0)],
)
def test_encoders_are_reserved_for_where_they_share_the_gpu_of_a_rank(rank: float, each: float, count: int) -> None:
    found = encoders_beside(online(each, gpus_per_worker=rank))
    assert list(found.values()) == [5 * GIB * count][:count]
    assert all(name.startswith(f"{count} x an encoder of train.feed online") for name in found)
    assert not encoders_beside(published(gpus_per_worker=rank))


def test_an_encoder_takes_its_weights_and_what_its_widest_level_has_at_once() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**SD)
    weights = 6 * 83_653_863 + ENCODER_CONTEXT
    assert encoder_bytes(vae, 64, 256) == weights + ENCODER_TENSORS * 2 * 64 * 128 * 256 * 256
    assert encoder_bytes(vae, 32, 512) - weights == 2 * (encoder_bytes(vae, 64, 256) - weights)


def test_as_many_tensors_of_the_first_level_are_there_at_once_as_are_counted_for_an_encoder() -> None:
    vae = AutoencoderKL(**SD | {"block_out_channels": [32, 64, 64, 64]}).eval().requires_grad_(False)
    pixels = torch.zeros(4, 64, 64, 3)
    with torch.profiler.profile(profile_memory=True) as profile:
        autoencoder.encode(vae, pixels)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(accumulate(changes)) / (4 * 4 * 32 * 64 * 64) == pytest.approx(ENCODER_TENSORS, rel=0.02)
