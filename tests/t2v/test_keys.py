"""The names of others' layouts at full size, on the meta device: every tensor has its place, one to one."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from t2v import keys
from t2v.config import UNetConfig
from t2v.unet import UNet
from t2v.weights import fitted

# ModelScope's UNetSD block by block: R resnet with temporal convolutions, S spatial and T temporal transformer, D and U
# steps down and up. The first block is a convolution and a temporal transformer.
INPUT = ["", "RST", "RST", "D", "RST", "RST", "D", "RST", "RST", "D", "R", "R"]
OUTPUT = ["R", "R", "RU", "RST", "RST", "RSTU", "RST", "RST", "RSTU", "RST", "RST", "RST"]
Shapes = dict[str, tuple[int, ...]]

STABLE_DIFFUSION = {
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "sample_size": 64,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def resnet(at: str, c_in: int, c: int, e: int) -> Shapes:
    shapes = layer(f"{at}.in_layers.0", c_in) | layer(f"{at}.in_layers.2", c, c_in, 3, 3)
    shapes |= layer(f"{at}.emb_layers.1", c, e)
    shapes |= layer(f"{at}.out_layers.0", c) | layer(f"{at}.out_layers.3", c, c, 3, 3)
    shapes |= layer(f"{at}.skip_connection", c, c_in, 1, 1) if c_in != c else {}
    for number, place in ((1, 2), (2, 3), (3, 3), (4, 3)):
        conv = f"{at}.temopral_conv.conv{number}"
        shapes |= layer(f"{conv}.0", c) | layer(f"{conv}.{place}", c, c, 3, 1, 1)
    return shapes


def transformer(at: str, c: int, inner: int, source: int, taps: tuple[int, ...]) -> Shapes:
    block = f"{at}.transformer_blocks.0"
    shapes = layer(f"{at}.norm", c) | layer(f"{at}.proj_in", inner, c, *taps) | layer(f"{at}.proj_out", c, inner, *taps)
    for attention, width in ((f"{block}.attn1", inner), (f"{block}.attn2", source)):
        shapes |= layer(f"{attention}.to_q", inner, inner, bias=False) | layer(f"{attention}.to_out.0", inner, inner)
        shapes |= layer(f"{attention}.to_k", inner, width, bias=False)
        shapes |= layer(f"{attention}.to_v", inner, width, bias=False)
    shapes |= layer(f"{block}.ff.net.0.proj", 8 * inner, inner) | layer(f"{block}.ff.net.2", inner, 4 * inner)
    return shapes | layer(f"{block}.norm1", inner) | layer(f"{block}.norm2", inner) | layer(f"{block}.norm3", inner)


def modelscope(widths: list[int], head_dim: int = 64, text: int = 1024, channels: int = 4) -> Shapes:
    """All tensors of UNetSD with two blocks a level, written down from its own code's layout."""
    c, e = widths[0], 4 * widths[0]
    shapes = layer("time_embed.0", e, c) | layer("time_embed.2", e, e)
    shapes |= layer("input_blocks.0.0", c, channels, 3, 3)
    shapes |= transformer("input_blocks.0.1", c, 8 * head_dim, 8 * head_dim, (1,))

    def block(at: str, kinds: str, c_in: int, c: int) -> Iterator[Shapes]:
        for place, kind in enumerate(kinds):
            here = f"{at}.{place}"
            if kind == "R":
                yield resnet(here, c_in if place == 0 else c, c, e)
            elif kind == "U":
                yield layer(f"{here}.conv", c, c, 3, 3)
            else:
                yield transformer(here, c, c, text, ()) if kind == "S" else transformer(here, c, c, c, (1,))

    made = [c]
    for index, kinds in enumerate(INPUT[1:], start=1):
        width = widths[(index - 1) // 3]
        if kinds == "D":
            shapes |= layer(f"input_blocks.{index}.op", c, c, 3, 3)
        else:
            for more in block(f"input_blocks.{index}", kinds, c, width):
                shapes |= more
            c = width
        made.append(c)
    for more in block("middle_block", "RSTR", c, c):
        shapes |= more
    for index, kinds in enumerate(OUTPUT):
        width = widths[3 - index // 3]
        for more in block(f"output_blocks.{index}", kinds, c + made.pop(), width):
            shapes |= more
        c = width
    return shapes | layer("out.0", c) | layer("out.2", channels, c, 3, 3)


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def unet() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return UNet(UNetConfig()).state_dict()


def numbers(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def test_modelscopes_tensors_are_ours_one_to_one(unet: dict[str, torch.Tensor]) -> None:
    theirs = on_meta(modelscope([320, 640, 1280, 1280]))
    assert (len(theirs), numbers(theirs)) == (1480, 1_411_233_860)
    names = keys.renamed(unet, keys.modelscope_unet(UNetConfig()))
    assert set(names.values()) == theirs.keys() and len(names) == 1480
    fit = fitted(theirs, names, unet, "modelscope")
    assert {name: tensor.shape for name, tensor in fit.items()} == {name: tensor.shape for name, tensor in unet.items()}


def test_some_of_modelscopes_places_by_name(unet: dict[str, torch.Tensor]) -> None:
    names = keys.renamed(unet, keys.modelscope_unet(UNetConfig()))
    for ours, theirs in {
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "transformer_in.proj_in.weight": "input_blocks.0.1.proj_in.weight",
        "down_blocks.1.resnets.1.conv_shortcut.weight": None,
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.downsamplers.0.conv.weight": "input_blocks.9.op.weight",
        "mid_block.temp_convs.1.conv4.3.bias": "middle_block.3.temopral_conv.conv4.3.bias",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.3.conv.bias",
        "up_blocks.3.temp_attentions.2.norm.bias": "output_blocks.11.2.norm.bias",
    }.items():
        assert names.get(ours) == theirs


def test_stable_diffusions_686_tensors_are_the_spatial_ones(unet: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        published = UNet2DConditionModel.from_config(STABLE_DIFFUSION).state_dict()
    assert (len(published), numbers(published)) == (686, 865_910_724)
    spatial = {name: tensor for name, tensor in unet.items() if not keys.is_temporal(name)}
    assert {name: t.shape for name, t in spatial.items()} == {name: t.shape for name, t in published.items()}


def test_stable_diffusions_own_names_are_those_that_diffusers_converts(unet: dict[str, torch.Tensor]) -> None:
    spatial = [name for name in unet if not keys.is_temporal(name)]
    names = keys.renamed(spatial, keys.stable_diffusion_unet(UNetConfig()))
    assert len(set(names.values())) == 686
    checkpoint = {f"model.diffusion_model.{theirs}": unet[ours] for ours, theirs in names.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, {**STABLE_DIFFUSION, "layers_per_block": 2})
    assert converted.keys() == set(spatial)
    assert all(converted[name] is unet[name] for name in spatial)
    temporal = keys.renamed(spatial, keys.modelscope_unet(UNetConfig()))
    assert sum(names[name] != temporal[name] for name in spatial) == 20  # which loading by name alone would lose


def test_the_vaes_own_names_are_those_that_diffusers_converts() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(VAE).state_dict()
    assert (len(vae), numbers(vae)) == (248, 83_653_863)
    names = keys.renamed(vae, keys.ldm_vae(levels=4, layers=2))
    assert len(set(names.values())) == 248
    checkpoint = {f"first_stage_model.{theirs}": vae[ours] for ours, theirs in names.items()}
    converted = convert_ldm_vae_checkpoint(checkpoint, VAE)
    assert converted.keys() == vae.keys()
    assert all(converted[name] is vae[name] for name in vae)


def test_attention_comes_apart_and_together_again() -> None:
    stacked = {"blocks.0.attn.in_proj_weight": torch.randn(6, 2), "blocks.0.attn.in_proj_bias": torch.randn(6)}
    whole = stacked | {"ln_final.weight": torch.randn(2)}
    apart = keys.split_attention(whole)
    assert torch.equal(apart["blocks.0.attn.k_proj.weight"], stacked["blocks.0.attn.in_proj_weight"][2:4])
    together = keys.joined_attention(apart)
    assert together.keys() == whole.keys() and all(torch.equal(together[name], whole[name]) for name in whole)
