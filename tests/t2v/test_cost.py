"""Closed forms against torch's counter, and against what a card measured (tests/benchmarks/results/unet_h200.txt)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from t2v.cards import CARDS, find_card, mfu
from t2v.config import UNetConfig
from t2v.cost import unet_cost
from t2v.unet import UNet

SMALL = UNetConfig(block_out_channels=[16, 32, 32], layers_per_block=2, head_dim=8, text_dim=24, norm_groups=8)


def counted(config: UNetConfig, frames: int, size: int, tokens: int) -> int:
    """Forward FLOPs of one sample more, so that what a pass does once, whatever its samples, is left out."""
    with torch.device("meta"):
        unet = UNet(config).eval().requires_grad_(False)
        totals = []
        for b in (1, 2):
            call = torch.empty(b, config.channels, frames, size, size), torch.empty(b), torch.empty(b, tokens, 24)
            with FlopCounterMode(display=False) as counter:
                unet(*call)
            totals.append(counter.get_total_flops())
    return totals[1] - totals[0]


@pytest.mark.parametrize(("frames", "size", "tokens"), [(1, 8, 7), (4, 8, 7), (3, 16, 5)])
def test_flops_of_a_sample_are_those_that_torch_counts(frames: int, size: int, tokens: int) -> None:
    assert unet_cost(SMALL, frames, size, tokens).forward == counted(SMALL, frames, size, tokens)


def test_the_published_size_costs_what_was_counted_and_keeps_what_was_measured() -> None:
    clip, image = unet_cost(UNetConfig(), 16, 32, 77), unet_cost(UNetConfig(), 1, 32, 77)
    assert clip.flops / 1e12 == pytest.approx(14.67, rel=0.02)  # diffusers', with the text's k and v for every frame
    assert image.flops < clip.flops / 16
    for cost, batch, measured in ((clip, 26, 3.982), (image, 384, 0.228)):
        assert 2 * (cost.kept + cost.gates + cost.once / batch) / 2**30 == pytest.approx(measured, rel=0.02)
    for cost, batch, measured in ((clip, 16, 2.488), (clip, 32, 2.478), (image, 512, 0.134)):
        assert 2 * (cost.kept + cost.once / batch) / 2**30 == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("A100-80G", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA RTX A6000", "A6000"),
    ],
)
def test_cards_are_found_by_the_names_that_cuda_and_ray_give(name: str, card: str) -> None:
    found = find_card(name)
    assert found and found.name == card


def test_utilisation_is_of_the_cards_limit() -> None:
    assert find_card("cpu") is None and mfu(1.0, 1.0, "cpu") is None
    assert mfu(989e12, 2.0, "NVIDIA H200") == 0.5
    assert all(card.flops_per_s > 1e13 and card.memory_bytes > 2**33 for card in CARDS)
