"""Predictions against what a card measured (tests/benchmarks/results/unet_h200.txt), and how ZeRO divides them."""

import pytest

from t2v.cards import GIB
from t2v.config import DiffusionConfig, MixConfig, ModelConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig
from t2v.frozen import load_text
from t2v.job import TrainJob
from t2v.memory import activation_bytes, count_text_weights, count_weights, predict
from t2v.mix import Slot
from t2v.unet import UNet

STATE = 18  # bytes a weight in the measured step: bf16, and in fp32 master, gradient and moments


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
