"""A replayed graph against the same passes launched kernel by kernel: losses, gradients and dropout's draws."""

import pytest
import torch

from t2v.config import TrainConfig, UNetConfig
from t2v.graphs import WARM, Graphs
from t2v.unet import UNet
from tests.t2v.conftest import randomise

TINY = UNetConfig(block_out_channels=[32, 64], layers_per_block=1, head_dim=16, norm_groups=8, text_dim=32)


def learned(graphs: bool, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of some calls of two shapes in turn, each with a seed of its own, and the sum of their gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    unet = randomise(UNet(TINY)).to(device, dtype).train()
    for weight in unet.parameters():
        weight.grad = torch.zeros_like(weight)

    def run(weight: torch.Tensor, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        losses = unet(latents, torch.full((len(latents),), 9, device=device), text).float().square().flatten(1).mean(1)
        (losses.mean() * weight).backward()
        return losses.detach()

    passes, generator, losses = Graphs(run) if graphs else run, torch.Generator().manual_seed(0), []
    for call in range(2 * (WARM + 3)):
        frames = 1 if call % 2 else 4
        latents = torch.randn(2, 4, frames, 8, 8, generator=generator).to(device, dtype)
        text = torch.randn(2, 7, 32, generator=generator).to(device, dtype)
        torch.manual_seed(call)
        losses.append(passes(torch.full((), 0.1 * call, device=device), latents, text).clone())
    return torch.stack(losses).cpu(), torch.cat([weight.grad.flatten() for weight in unet.parameters()]).cpu()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_learns_what_kernels_launched_one_by_one_do() -> None:
    (losses, gradient), (expected, wanted) = learned(True, "cuda"), learned(False, "cuda")
    assert torch.allclose(losses, expected, rtol=1e-2) and wanted.norm() > 0
    assert (gradient - wanted).norm() < 1e-2 * wanted.norm()


def test_without_a_gpu_the_passes_are_called() -> None:
    (losses, gradient), (expected, wanted) = learned(True, "cpu"), learned(False, "cpu")
    assert torch.equal(losses, expected) and torch.equal(gradient, wanted) and wanted.norm() > 0


@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"zero_stage": 0, "precision": "fp32"}, {"precision": "fp16"}])
def test_settings_that_no_graph_can_have_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="graphs: true needs zero_stage 1 or 2 and precision bf16"):
        TrainConfig(graphs=True, **settings)
