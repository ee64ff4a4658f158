"""A replayed graph against the same passes launched kernel by kernel: losses, gradients and dropout's draws."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from t2v.config import TrainConfig, UNetConfig
from t2v.engine import Engine
from t2v.graphs import Graphs
from t2v.unet import UNet
from tests.t2v.conftest import randomise

TINY = UNetConfig(block_out_channels=[32, 64], layers_per_block=1, head_dim=16, norm_groups=8, text_dim=32)


WARM, CALLS = 4, 10  # of two shapes in turn


def learned(engine: Engine, graphs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of two steps of some calls, each with a seed of its own, and the gradient of the second step."""
    device, dtype = engine.device, engine.dtype

    def run(weight: torch.Tensor, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(latents),), 9, device=device)
        losses = engine.unet(latents, timesteps, text).float().square().flatten(1).mean(1)
        engine.backward(losses.mean(), weight)
        return losses.detach()

    passes, generator, losses = Graphs(run, WARM) if graphs else run, torch.Generator().manual_seed(0), []
    for call in range(2 * CALLS):
        if call == CALLS:
            assert engine.update(1e-3, 0.5)
        latents = torch.randn(2, 4, 1 if call % 2 else 4, 8, 8, generator=generator).to(device, dtype)
        text = torch.randn(2, 7, 32, generator=generator).to(device, dtype)
        torch.manual_seed(call)
        losses.append(passes(torch.full((), 0.1 * call, device=device), latents, text).clone())
    return torch.stack(losses).cpu(), torch.cat([gradient.flatten() for gradient in engine._gradients]).cpu()


@pytest.fixture
def world_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_RANK", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_graph_learns_what_kernels_launched_one_by_one_do(world_of_one: None) -> None:
    """On a CPU, where there is nothing to capture, the passes are simply called."""
    on_gpu = torch.cuda.is_available()
    config = TrainConfig(graphs=True, precision="bf16")
    both = [learned(Engine(randomise(UNet(TINY)), config, CALLS), graphs) for graphs in (True, False)]
    (losses, gradient), (expected, wanted) = both
    assert torch.allclose(losses, expected, rtol=1e-2 if on_gpu else 0) and wanted.norm() > 0
    assert (gradient - wanted).norm() <= (1e-2 if on_gpu else 0) * wanted.norm()


@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"zero_stage": 0, "precision": "fp32"}, {"precision": "fp16"}])
def test_settings_that_no_graph_can_have_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="graphs: true needs zero_stage 1 or 2 and precision bf16"):
        TrainConfig(graphs=True, **settings)
