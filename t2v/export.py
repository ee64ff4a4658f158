"""A trained model as a diffusers folder, and back.

    model_index.json  unet/  vae/  scheduler/    what diffusers reads, in its own layout
    t2v.json                                     what it has no place for: text tower, caption dropout, training

The frozen text tower is not copied; model_index.json lists it as absent, so that diffusers takes it from its caller:
`DiffusionPipeline.from_pretrained(folder, text_encoder=..., tokenizer=...)`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from t2v import storage
from t2v.config import DiffusionConfig, ModelConfig, UNetConfig
from t2v.frozen import make_scheduler
from t2v.unet import UNet

INDEX_NAME = "model_index.json"
DIFFUSERS = version("diffusers")  # not `import diffusers`, which takes seconds
WEIGHTS = "diffusion_pytorch_model.safetensors"
ABSENT = [None, None]
INDEX = {
    "_class_name": "TextToVideoSDPipeline",
    "_diffusers_version": DIFFUSERS,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ABSENT,
    "tokenizer": ABSENT,
    "unet": ["diffusers", "UNet3DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_model(
    folder: str,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    info: dict[str, Any],
    latent_size: int | None = None,
) -> None:
    """Writes the UNet's `weights` and all that belongs to them as a diffusers folder, in place of one that is there.

    `info` goes into t2v.json; `latent_size` is the h and w trained at, which diffusers takes as its default size.
    ValueError if the weights are not those of `model.unet`. A local folder appears whole, by rename; on an object
    store model_index.json comes last.
    """
    if model.vae is None:
        raise ValueError("model.vae is not set: give the path of a diffusers AutoencoderKL folder")
    _check_weights(weights, model.unet, "weights")
    with _replaced(folder) as new:
        (new / "unet").mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, new / "unet" / WEIGHTS, metadata={"format": "pt"})
        _write_json(new / "unet" / "config.json", diffusers_config(model.unet, latent_size))
        (new / "vae").mkdir()
        for name in ("config.json", WEIGHTS):
            shutil.copyfile(Path(model.vae, name), new / "vae" / name)
        make_scheduler(diffusion, "ddim", steps=1).save_pretrained(new / "scheduler")
        _write_json(new / "t2v.json", {"text": asdict(model.text), "diffusion": asdict(diffusion), "info": info})
        _write_json(new / INDEX_NAME, INDEX)


def read_unet(folder: str) -> UNet:
    """The UNet of a diffusers folder, in fp32 and eval mode; only safetensors are read, never pickles.

    FileNotFoundError if there is none, ValueError if it is of another kind or its tensors do not fit its config.
    """
    where = storage.join(folder, "unet")
    for name in ("config.json", WEIGHTS):
        if not storage.exists(storage.join(where, name)):
            raise FileNotFoundError(f"{where} has no {name}; a diffusers folder with safetensors weights is wanted")
    config = unet_config(storage.read_json(storage.join(where, "config.json")), where)
    path = storage.join(where, WEIGHTS)
    weights = load_file(storage.local_path(path)) if storage.is_local(path) else load(storage.read_bytes(path))
    _check_weights(weights, config, path)
    with torch.device("meta"):
        unet = UNet(config)
    unet.load_state_dict(weights, assign=True)
    return unet.float().eval()


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
    names = {
        "channels": "in_channels",
        "block_out_channels": "block_out_channels",
        "layers_per_block": "layers_per_block",
        "head_dim": "attention_head_dim",
        "text_dim": "cross_attention_dim",
        "norm_groups": "norm_num_groups",
    }
    if missing := [name for name in names.values() if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    if not isinstance(head_dim := values["attention_head_dim"], int):
        raise ValueError(f"{where}: attention_head_dim is {head_dim!r}, this UNet has one number for all levels")
    config = UNetConfig(**{ours: values[theirs] for ours, theirs in names.items()})
    for name, value in diffusers_config(config, values.get("sample_size")).items():
        if name != "_diffusers_version" and values.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {values[name]!r}, this UNet has {value!r}")
    return config


def _check_weights(weights: Mapping[str, Tensor], config: UNetConfig, where: str) -> None:
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in UNet(config).state_dict().items()}
    problems = [f"{name} is missing" for name in wanted.keys() - weights.keys()]
    problems += [f"{name} is not in the model" for name in weights.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{where}: {'; '.join(sorted(problems)[:8])}{more}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextmanager
def _replaced(folder: str) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `folder` when it is full, and after an exception it is gone."""
    if not storage.is_local(folder):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            _upload(Path(scratch), folder)
        return
    target = Path(storage.local_path(folder)).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if target.exists():
            target.rename(Path(scratch, "old"))
        new.rename(target)


def _upload(source: Path, folder: str) -> None:
    """Copies all files; without model_index.json, removed first and sent last, the folder is no model."""
    storage.remove(storage.join(folder, INDEX_NAME))
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == INDEX_NAME):
        target = storage.join(folder, *path.relative_to(source).parts)
        with path.open("rb") as data, storage.open_atomic(target) as file:
            shutil.copyfileobj(data, file)
