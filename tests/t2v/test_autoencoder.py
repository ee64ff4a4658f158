"""The encoder against diffusers' own, over what configurations of an AutoencoderKL can differ in."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from t2v.autoencoder import channels_last, encode

LEVELS = {
    "one level": [8],
    "three levels, each wider": [8, 16, 24],
    "three levels, no shortcut": [8, 8, 8],
    "four levels": [8, 8, 16, 16],
}


def make_vae(widths: list[int], down: str = "DownEncoderBlock2D", **settings: object) -> AutoencoderKL:
    blocks = {"down_block_types": [down] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths)}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=widths, norm_num_groups=4, latent_channels=3, **blocks, **settings)
    vae.eval().requires_grad_(False)
    for parameter in vae.parameters():  # norms too, which begin with 1 and 0
        parameter += 0.1 * torch.randn_like(parameter)
    return vae


def compare(vae: AutoencoderKL, height: int = 32, width: int = 48) -> None:
    pixels = torch.rand(3, height, width, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    theirs = vae.encode(pixels.movedim(-1, 1)).latent_dist.parameters.movedim(1, -1)
    ours = encode(vae, pixels)
    assert ours.shape == theirs.shape and theirs.std(dim=(0, 1, 2)).min() > 0.1
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("widths", LEVELS.values(), ids=LEVELS)
def test_every_shape_of_encoder_is_diffusers(widths: list[int]) -> None:
    shortcuts = [resnet.conv_shortcut for level in make_vae(widths).encoder.down_blocks for resnet in level.resnets]
    assert any(shortcuts) == (len(set(widths)) > 1)
    compare(make_vae(widths))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_quant_conv": False},
        {"layers_per_block": 3},
        {"mid_block_add_attention": False},
        {"down": "AttnDownEncoderBlock2D"},
    ],
    ids=str,
)
def test_every_option_of_the_encoder_is_diffusers(settings: dict) -> None:
    vae = make_vae([8, 16], **settings)
    assert (vae.quant_conv is None) == ("use_quant_conv" in settings)
    compare(vae)


def test_sides_that_halve_to_odd_ones_are_diffusers() -> None:
    compare(make_vae([8, 8, 16]), height=20, width=28)


def test_channels_last_turns_the_kernels_and_changes_no_value() -> None:
    vae = make_vae([8, 16])
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    assert channels_last(vae) is vae
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    kernel = vae.encoder.conv_in.weight
    assert kernel.shape == (8, 3, 3, 3) and kernel.stride() == (27, 1, 9, 3)
    convolutions = [module for module in vae.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    compare(vae)


def test_channels_last_of_kernels_over_time() -> None:
    conv = nn.Conv3d(4, 6, (3, 1, 1))
    before = conv.weight.clone()
    channels_last(conv)
    assert torch.equal(conv.weight, before) and conv.weight.stride()[:3] == (12, 1, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_the_same_in_fp16() -> None:
    vae = make_vae([32, 64, 64])
    pixels = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = encode(vae, pixels)
    found = encode(channels_last(vae.half().cuda()), pixels.half().cuda())
    assert found.dtype == torch.float16
    assert (found.float().cpu() - expected).norm() <= 1e-2 * expected.norm()
