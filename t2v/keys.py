"""The names that others give to the tensors of the same networks (diffusers' names are ours).

A map has names of modules, ours to theirs; `renamed` applies it to names of tensors. Only names are known here: that
two sides match, one to one and in shape, is for weights.fitted to find.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from t2v.config import UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(names: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Each tensor's name with its longest beginning that `modules` knows replaced; without one it stays the same."""

    def one(name: str) -> str:
        head = name
        while head:
            if head in modules:
                return modules[head] + name.removeprefix(head)
            head = head.rpartition(".")[0]
        return name

    return {name: one(name) for name in names}


def is_temporal(name: str) -> bool:
    """Whether a tensor of the UNet is one of those that an image UNet lacks."""
    return "temp_" in name or name.startswith("transformer_in.")


def modelscope_unet(config: UNetConfig) -> dict[str, str]:
    """ModelScope's UNetSD, the layout of text2video_pytorch_model.pth."""
    modules = _ldm_unet(config)
    modules["transformer_in"] = "input_blocks.0.1"
    modules |= _resnet("mid_block", 1, "middle_block.3")
    modules["mid_block.temp_attentions.0"] = "middle_block.2"
    for level in range(len(config.block_out_channels) - 1):
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{_blocks_before(config, level + 1)}.op"
    return modules


def stable_diffusion_unet(config: UNetConfig) -> dict[str, str]:
    """Stable Diffusion's own UNetModel, the spatial part alone: what no temporal module pushes to a later place."""
    modules, layers = _ldm_unet(config), config.layers_per_block
    modules |= _resnet("mid_block", 1, "middle_block.2")
    for level in range(len(config.block_out_channels) - 1):
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{_blocks_before(config, level + 1)}.0.op"
        last = f"output_blocks.{level * (layers + 1) + layers}"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"{last}.{1 if level == 0 else 2}.conv"
    return modules


def _blocks_before(config: UNetConfig, level: int) -> int:
    """Place of a level's step down among the input blocks: before it, `layers` blocks and one step for each level."""
    return level * (config.layers_per_block + 1)


def _ldm_unet(config: UNetConfig) -> dict[str, str]:
    """What both have in common, with ModelScope's places for what follows the spatial attention."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    modules |= _resnet("mid_block", 0, "middle_block.0")
    layers = config.layers_per_block
    for level in range(len(config.block_out_channels)):
        for layer in range(layers):
            block = f"input_blocks.{_blocks_before(config, level) + 1 + layer}"
            modules |= _block(f"down_blocks.{level}", layer, block)
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            modules |= _block(f"up_blocks.{level}", layer, block)
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"{block}.{1 if level == 0 else 3}.conv"
    return modules


def _block(level: str, layer: int, theirs: str) -> dict[str, str]:
    attentions = {f"{level}.attentions.{layer}": f"{theirs}.1", f"{level}.temp_attentions.{layer}": f"{theirs}.2"}
    return _resnet(level, layer, f"{theirs}.0") | attentions


def _resnet(level: str, layer: int, theirs: str) -> dict[str, str]:
    modules = {f"{level}.resnets.{layer}.{ours}": f"{theirs}.{name}" for ours, name in _RESNET.items()}
    return modules | {f"{level}.temp_convs.{layer}": f"{theirs}.temopral_conv"}  # sic


def ldm_vae(levels: int, layers: int) -> dict[str, str]:
    """The autoencoder of Stable Diffusion's own checkpoints; `levels` and `layers` of its encoder."""
    modules: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        attention = {f"{half}.mid_block.attentions.0.{ours}": f"{half}.mid.attn_1.{name}" for ours, name in
                     _VAE_ATTENTION.items()}  # fmt: skip
        resnets = {f"{half}.mid_block.resnets.{index}": f"{half}.mid.block_{index + 1}" for index in (0, 1)}
        modules |= attention | resnets | {f"{half}.conv_norm_out": f"{half}.norm_out"}
    for level in range(levels):
        ours, theirs = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        modules |= {f"{ours}.resnets.{layer}": f"{theirs}.block.{layer}" for layer in range(layers)}
        modules[f"{ours}.downsamplers.0"] = f"{theirs}.downsample"
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        modules |= {f"{ours}.resnets.{layer}": f"{theirs}.block.{layer}" for layer in range(layers + 1)}
        modules[f"{ours}.upsamplers.0"] = f"{theirs}.upsample"
    shortcuts = {
        f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut" for ours, theirs in modules.items() if ".block." in theirs
    }
    return modules | shortcuts


def old_diffusers_vae() -> dict[str, str]:
    """diffusers' own AutoencoderKL before its attention was renamed, as the first released folders have it."""
    attentions = [f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")]
    return {f"{path}.{ours}": f"{path}.{theirs}" for path in attentions for ours, theirs in _OLD_ATTENTION.items()}


def transformers_text(layers: int) -> dict[str, str]:
    """transformers' CLIPTextModel, from the names of frozen.TextEncoder with `split_attention`."""
    modules = {
        "token_embedding": "text_model.embeddings.token_embedding",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final": "text_model.final_layer_norm",
    }
    for layer in range(layers):
        theirs = f"text_model.encoder.layers.{layer}"
        modules |= {f"blocks.{layer}.{ours}": f"{theirs}.{name}" for ours, name in _TEXT_LAYER.items()}
    return modules


def split_attention(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Every `attn.in_proj_*` [3 d, ...] as the q, k and v that it stacks."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, fused, kind = name.partition("attn.in_proj_")
        if fused:
            split |= {
                f"{stem}attn.{letter}_proj.{kind}": third for letter, third in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            split[name] = tensor
    return split


def joined_attention(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """What `split_attention` splits, put together again."""
    import torch

    joined = {}
    for name, tensor in tensors.items():
        stem, q, kind = name.partition("attn.q_proj.")
        if q:
            thirds = [tensors[f"{stem}attn.{letter}_proj.{kind}"] for letter in "qkv"]
            joined[f"{stem}attn.in_proj_{kind}"] = torch.cat(thirds)
        elif "attn.k_proj." not in name and "attn.v_proj." not in name:
            joined[name] = tensor
    return joined
