"""The UNet's weights in every layout that people have: what a path holds is found out from its content.

    a diffusers folder, the pipeline's or its unet/   UNet3DConditionModel whole, UNet2DConditionModel its spatial part
    a file of tensors                                 ModelScope's text2video_pytorch_model.pth whole, a Stable
                                                      Diffusion 2.1 checkpoint its spatial part, or either of the above

Whole means that every tensor of the UNet is there, spatial that all but the temporal ones are; anything else is an
error that says what is missing, left over or of another shape.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from t2v import keys, storage
from t2v.config import UNetConfig
from t2v.unet import UNet
from t2v.weights import fitted, named, part, read_folder, read_tensors, under

DIFFUSERS = version("diffusers")  # not `import diffusers`, which takes seconds
_OURS_TO_DIFFUSERS = {
    "channels": "in_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "head_dim": "attention_head_dim",
    "text_dim": "cross_attention_dim",
    "norm_groups": "norm_num_groups",
}
_IMAGE_UNET = {  # what a UNet2DConditionModel could be else, without its tensors showing it
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}


def start_weights(path: str, config: UNetConfig, whole: bool = False) -> dict[str, Tensor]:
    """What a training run starts from, by our names: all weights, or the spatial ones (paper 4.1.3: SD 2.1's).

    FileNotFoundError or ValueError, naming the config key, where the path or what it holds does not fit; a `whole`
    model is wanted where nothing but a part of it is trained.
    """
    with named("model.start"):
        weights = unet_weights(path, config)[1]
        if whole and not any(map(keys.is_temporal, weights)):
            raise ValueError(f"{path} is an image model; train.trained lora adapts a text-to-video model")
        return weights


def unet_weights(path: str, config: UNetConfig | None = None) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The UNet's shape, and its tensors by our names, in the precision they are stored in: all, or the spatial ones.

    Without `config` the shape is the folder's own, and a file must hold the published size. FileNotFoundError if there
    is nothing to read, ValueError if it is another network or does not fit `config`.
    """
    if storage.is_file(path):
        config = config or UNetConfig()
        return config, _from_file(path, config)
    folder = part(path, "unet")
    settings = storage.join(folder, "config.json")
    if not storage.exists(settings):
        if not storage.exists(path):
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        raise FileNotFoundError(f"{folder} has no config.json; a diffusers folder or a file of weights is wanted")
    values = storage.read_json(settings)
    found, names = _described(values, folder)
    if config and (other := _differences(found, config)):
        raise ValueError(f"{folder}: {other}")
    return config or found, fitted(read_folder(folder), names, _like(found), folder)


def _described(values: Mapping[str, Any], where: str) -> tuple[UNetConfig, dict[str, str]]:
    if values.get("_class_name") == "UNet2DConditionModel":
        config = image_unet_config(values, where)
        return config, {name: name for name in _like(config) if not keys.is_temporal(name)}
    config = unet_config(values, where)
    return config, {name: name for name in _like(config)}


def _differences(found: UNetConfig, wanted: UNetConfig) -> str:
    """In which fields a shape is not the one wanted; dropout is no part of it."""
    theirs, ours = asdict(replace(found, dropout=wanted.dropout)), asdict(wanted)
    return ", ".join(
        f"{name} is {theirs[name]}, model.unet has {ours[name]}" for name in ours if theirs[name] != ours[name]
    )


def _from_file(path: str, config: UNetConfig) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    tensors = under("model.diffusion_model.", tensors) or tensors
    whole = any(map(keys.is_temporal, tensors)) or any("temopral_conv" in name for name in tensors)
    ours = [name for name in _like(config) if whole or not keys.is_temporal(name)]
    if "conv_in.weight" in tensors:
        names = {name: name for name in ours}
    elif "input_blocks.0.0.weight" in tensors:
        modules = keys.modelscope_unet(config) if whole else keys.stable_diffusion_unet(config)
        names = keys.renamed(ours, modules)
    else:
        raise ValueError(f"{path}: no UNet of a known layout; its first tensors are {', '.join(list(tensors)[:8])}")
    return fitted(tensors, names, _like(config), path)


def _like(config: UNetConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return UNet(config).state_dict()


def diffusers_config(config: UNetConfig, latent_size: int | None = None) -> dict[str, Any]:
    """The config.json of the UNet3DConditionModel with the same shape; dropout has no place in it."""
    deeper = len(config.block_out_channels) - 1
    return {
        "_class_name": "UNet3DConditionModel",
        "_diffusers_version": DIFFUSERS,
        "act_fn": "silu",
        "attention_head_dim": config.head_dim,
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.text_dim,
        "down_block_types": ["CrossAttnDownBlock3D"] * deeper + ["DownBlock3D"],
        "downsample_padding": 1,
        "in_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_groups,
        "num_attention_heads": None,
        "out_channels": config.channels,
        "sample_size": latent_size,
        "time_cond_proj_dim": None,
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * deeper,
    }


def unet_config(values: Mapping[str, Any], where: str = "config") -> UNetConfig:
    """The UNetConfig of a UNet3DConditionModel's config.json; ValueError names what this UNet cannot be.

    Keys unknown to diffusers are ignored, as there: the first published config has some.
    """
    if not isinstance(head_dim := values.get("attention_head_dim", 0), int):
        raise ValueError(f"{where}: attention_head_dim is {head_dim!r}, this UNet has one number for all levels")
    config = _read_shape(values, where)
    _must_be(diffusers_config(config, values.get("sample_size")), values, where)
    return config


def image_unet_config(values: Mapping[str, Any], where: str = "config") -> UNetConfig:
    """The same of a UNet2DConditionModel, whose spatial part this UNet has; its linear layers may be convolutions."""
    widths = values.get("block_out_channels", [])
    heads = values.get("num_attention_heads") or values.get("attention_head_dim")  # in spite of its name
    each = heads if isinstance(heads, list) else [heads] * len(widths)
    head_dims = {width / count for width, count in zip(widths, each, strict=False) if count}
    if len(head_dims) != 1 or len(each) != len(widths) or not all(head_dim.is_integer() for head_dim in head_dims):
        raise ValueError(
            f"{where}: {heads} heads for {widths} channels, this UNet has one width of heads for all levels"
        )
    config = _read_shape({**values, "attention_head_dim": int(head_dims.pop())}, where)
    deeper = len(widths) - 1
    kinds = {
        "down_block_types": ["CrossAttnDownBlock2D"] * deeper + ["DownBlock2D"],
        "out_channels": config.channels,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * deeper,
    }
    _must_be(_IMAGE_UNET | kinds, values, where)
    return config


def _read_shape(values: Mapping[str, Any], where: str) -> UNetConfig:
    if missing := [name for name in _OURS_TO_DIFFUSERS.values() if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    return UNetConfig(**{ours: values[theirs] for ours, theirs in _OURS_TO_DIFFUSERS.items()})


def _must_be(wanted: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    for name, value in wanted.items():
        if name != "_diffusers_version" and values.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {values[name]!r}, this UNet has {value!r}")
