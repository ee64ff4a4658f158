import pytest
import torch

from t2v.config import UNetConfig
from t2v.unet import UNet

torch.backends.cudnn.allow_tf32 = False  # a GPU's fp32 is compared to 1e-5


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter, the zero-initialised ones too, random values that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return module


@pytest.fixture
def tiny_unet() -> UNet:
    """A UNet of two levels in eval mode whose every part acts on its output."""
    config = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=24, norm_groups=8)
    return randomise(UNet(config)).eval()
