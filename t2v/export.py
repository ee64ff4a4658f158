"""A trained model as a diffusers folder, and back.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/    what diffusers reads, in its own layout
    t2v.json                                                                what it has no place for
    lora/                                                                   what peft reads, of a model trained so

The folder is complete: `TextToVideoSDPipeline.from_pretrained(folder)("a red circle moves left")`. Whatever the text
tower was read from, it is written with the layers that are used, as the public folders have it.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from t2v import keys, storage
from t2v.clip import text_config, text_weights, tokenizer_files
from t2v.config import DiffusionConfig, ModelConfig, UNetConfig
from t2v.frozen import TextEncoder, load_text, load_vae, make_scheduler
from t2v.lora import Adapter
from t2v.published import DIFFUSERS, diffusers_config, unet_weights
from t2v.unet import UNet
from t2v.weights import fill, fitted, part

INDEX_NAME = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS = "model.safetensors"
INDEX = {
    "_class_name": "TextToVideoSDPipeline",
    "_diffusers_version": DIFFUSERS,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
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
    text: TextEncoder | None = None,
    adapter: Adapter | None = None,
) -> None:
    """Writes the UNet's `weights` and all that belongs to them as a diffusers folder, in place of one that is there.

    `info` goes into t2v.json; `latent_size` is the h and w trained at, which diffusers takes as its default size;
    `text` is the tower of `model.text`, read anew if it is not given; `adapter`, already part of `weights`, is written
    as lora/.
    ValueError if the weights are not those of `model.unet`. A local folder appears whole, by rename; on an object
    store model_index.json comes last.
    """
    if model.vae is None:
        raise ValueError("model.vae is not set: give the path of an AutoencoderKL")
    _check_weights(weights, model.unet)
    text = text or load_text(model.text)
    with _replaced(folder) as new:
        (new / "unet").mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, new / "unet" / WEIGHTS, metadata={"format": "pt"})
        _write_json(new / "unet" / "config.json", diffusers_config(model.unet, latent_size))
        if adapter:
            adapter.write(new / "lora")
        _write_vae(model.vae, new / "vae")
        _write_text(text, new)
        make_scheduler(diffusion, "ddim", steps=1).save_pretrained(new / "scheduler")
        _write_json(new / "t2v.json", {"text": asdict(model.text), "diffusion": asdict(diffusion), "info": info})
        _write_json(new / INDEX_NAME, INDEX)


def _check_weights(weights: Mapping[str, Tensor], config: UNetConfig) -> None:
    with torch.device("meta"):
        like = UNet(config).state_dict()
    fitted(weights, {name: name for name in like}, like, "weights")


def _write_vae(source: str, target: Path) -> None:
    """The VAE byte for byte where it lies as it is to be written, else read and written anew."""
    folder = part(source, "vae")
    files = {name: storage.join(folder, name) for name in ("config.json", WEIGHTS)}
    if not all(map(storage.exists, files.values())):
        load_vae(source).model.save_pretrained(target)
        return
    target.mkdir()
    for name, path in files.items():
        with storage.open_read(path) as file, (target / name).open("xb") as copy:
            shutil.copyfileobj(file, copy)


def write_modelscope(path: str, weights: Mapping[str, Tensor], config: UNetConfig) -> None:
    """Writes the UNet's `weights` as ModelScope's text2video_pytorch_model.pth, for what reads no diffusers folders.

    Names are UNetSD's, and over time the projections around attention are its one-tap Conv1d. The file appears whole.
    ValueError if the weights are not those of `config`.
    """
    _check_weights(weights, config)
    names = keys.renamed(weights, keys.modelscope_unet(config))
    tensors = {names[name]: _modelscope_shape(name, tensor) for name, tensor in weights.items()}
    with storage.open_atomic(path) as file:
        torch.save(tensors, file)


def _modelscope_shape(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    projection = name.endswith(("proj_in.weight", "proj_out.weight"))
    return tensor.unsqueeze(-1) if projection and keys.is_temporal(name) else tensor


def read_unet(path: str, config: UNetConfig | None = None) -> UNet:
    """The UNet of a folder or file of any layout in t2v/published.py, in fp32 and eval mode.

    Where only the spatial part is there, the temporal part is the identity. `config` tells the shape of files that
    have none, when it is not the published one. FileNotFoundError if there is nothing to read, ValueError if it is of
    another kind or its tensors do not fit.
    """
    config, weights = unet_weights(path, config)
    with torch.device("meta"):
        unet = UNet(config)
    if weights.keys() == unet.state_dict().keys():
        fill(unet, weights)
    else:
        unet = UNet(config)
        unet.load_state_dict(weights, strict=False)
    return unet.eval()


def _write_text(text: TextEncoder, new: Path) -> None:
    """The text tower as transformers' CLIPTextModel, and its vocabulary as the files of a CLIPTokenizer."""
    (new / "text_encoder").mkdir()
    _write_json(new / "text_encoder" / "config.json", text_config(text))
    save_file(text_weights(text), new / "text_encoder" / TEXT_WEIGHTS, metadata={"format": "pt"})
    (new / "tokenizer").mkdir()
    for name, content in tokenizer_files(text).items():
        (new / "tokenizer" / name).write_text(content, encoding="utf-8")


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
    with tempfile.TemporaryDirectory(".part", f".{target.name}.", target.parent) as scratch:
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
