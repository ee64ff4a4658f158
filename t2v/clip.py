"""CLIP's text tower as open_clip's checkpoints and transformers' CLIPTextModel folders hold it, and back.

Tensors have the names of frozen.TextEncoder; the tokenizer is always open_clip's, which ModelScope trained with, and a
folder's own must agree with it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from t2v import keys, storage
from t2v.weights import TRANSFORMERS_STEMS, fitted, part, read_folder, read_tensors, under

if TYPE_CHECKING:
    from torch import Tensor

    from t2v.frozen import TextEncoder

PAD = "!"  # id 0, with which a prompt is filled up to the context
_SPECIAL = {
    "<start_of_text>": "<|startoftext|>",
    "<end_of_text>": "<|endoftext|>",
}  # open_clip's names to transformers'
_NOT_TEXT = ("visual.", "logit_scale", "logit_bias", "text_projection")


@dataclass(frozen=True)
class TextShape:
    """What a text tower is built from, beside its weights."""

    width: int
    heads: int
    layers: int
    context: int = 77
    vocabulary: int = 49_408
    mlp_ratio: float = 4.0
    quick_gelu: bool = False


def open_clip_shape(model: Mapping[str, Any] | None, architecture: str) -> TextShape:
    """The text half of an open_clip model's configuration; ValueError if it is no plain CLIP text tower."""
    if model is None:
        raise ValueError(f"model.text.architecture {architecture!r} is none of open_clip's")
    names = {"width": "width", "heads": "heads", "layers": "layers", "context_length": "context",
             "vocab_size": "vocabulary", "mlp_ratio": "mlp_ratio"}  # fmt: skip
    if other := sorted(model["text_cfg"].keys() - names.keys()):
        raise ValueError(f"model.text.architecture {architecture!r} has {', '.join(other)}; a plain CLIP is wanted")
    values = {names[name]: value for name, value in model["text_cfg"].items()}
    return TextShape(**values, quick_gelu=model.get("quick_gelu", False))


def read_open_clip(path: str, like: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The text half of an open_clip checkpoint, all layers of it; the image half is left where it is.

    `like` is the state dict of the whole tower. ValueError names what does not fit.
    """
    tensors = read_tensors(path)
    tensors = under("module.", tensors) or tensors  # as its own distributed training writes them
    tensors = under("text.", tensors) or tensors  # as newer architectures keep their text half apart
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_TEXT)}
    return fitted(tensors, keys.renamed(like, {"blocks": "transformer.resblocks"}), like, path)


def folder_shape(path: str) -> TextShape:
    """The shape of a CLIPTextModel folder, `path` or its text_encoder/; ValueError if it is another kind of model."""
    folder = part(path, "text_encoder")
    settings = storage.join(folder, "config.json")
    if not storage.exists(settings):
        raise FileNotFoundError(f"{folder} has no config.json; a CLIPTextModel folder or an open_clip file is wanted")
    values = storage.read_json(settings)
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act")
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{settings}: {', '.join(missing)} missing, this is no CLIPTextModel")
    if values["hidden_act"] not in ("gelu", "quick_gelu") or values.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"{settings}: hidden_act and layer_norm_eps must be gelu or quick_gelu, and 1e-5")
    return TextShape(
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        layers=values["num_hidden_layers"],
        context=values.get("max_position_embeddings", 77),
        vocabulary=values.get("vocab_size", 49_408),
        mlp_ratio=values["intermediate_size"] / values["hidden_size"],
        quick_gelu=values["hidden_act"] == "quick_gelu",
    )


def read_transformers(path: str, shape: TextShape, like: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The tensors of a CLIPTextModel folder; with or without the prefix that transformers 5 leaves out.

    `like` is the state dict of the whole tower. ValueError names what does not fit.
    """
    folder, prefix = part(path, "text_encoder"), "text_model."
    tensors = {
        prefix + name.removeprefix(prefix): tensor for name, tensor in read_folder(folder, TRANSFORMERS_STEMS).items()
    }
    tensors.pop(f"{prefix}embeddings.position_ids", None)  # 0, 1, ..., 76, which older versions stored
    like = keys.split_attention(like)
    names = keys.renamed(like, keys.transformers_text(shape.layers))
    return keys.joined_attention(fitted(tensors, names, like, folder))


def check_tokenizer(path: str, text: "TextEncoder") -> None:
    """ValueError unless the tokenizer/ of a released folder pads with id 0 and has the vocabulary of open_clip's."""
    root = path.rstrip("/")
    if part(root, "text_encoder") == root:  # the text encoder's own folder
        root = storage.join(root, "..")
    folder = storage.join(root, "tokenizer")
    vocabulary, pad = _vocabulary(folder), _pad_token(folder)
    if vocabulary.get(pad) != 0:
        raise ValueError(
            f"{folder}: pads with {pad!r}, id {vocabulary.get(pad)}; the UNet was trained with id 0, {PAD!r}"
        )
    ours = _encoder(text)
    if vocabulary != ours:
        other = sorted(token for token, _ in vocabulary.items() ^ ours.items())
        raise ValueError(f"{folder}: its vocabulary is not CLIP's, the first differences are at {', '.join(other[:8])}")


def _vocabulary(folder: str) -> dict[str, int]:
    if storage.exists(path := storage.join(folder, "vocab.json")):
        return storage.read_json(path)
    if storage.exists(path := storage.join(folder, "tokenizer.json")):  # as transformers 5 writes it
        return storage.read_json(path)["model"]["vocab"]
    raise FileNotFoundError(f"{folder} has neither vocab.json nor tokenizer.json; a text encoder's tokenizer is wanted")


def _pad_token(folder: str) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if storage.exists(path := storage.join(folder, name)) and (pad := storage.read_json(path).get("pad_token")):
            return pad["content"] if isinstance(pad, dict) else pad
    return _SPECIAL["<end_of_text>"]  # transformers' default


def _encoder(text: "TextEncoder") -> dict[str, int]:
    return {_SPECIAL.get(token, token): index for token, index in text.tokenizer.encoder.items()}


def text_config(text: "TextEncoder") -> dict[str, Any]:
    """The config.json of the CLIPTextModel that gives the same states: the layers that are used, and no others."""
    mlp = text.blocks[0].mlp
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": text.tokenizer.sot_token_id,
        "eos_token_id": text.tokenizer.eot_token_id,
        "hidden_act": "quick_gelu" if type(mlp.gelu).__name__ == "QuickGELU" else "gelu",
        "hidden_size": text.width,
        "intermediate_size": mlp.c_fc.out_features,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": len(text.positional_embedding),
        "model_type": "clip_text_model",
        "num_attention_heads": text.blocks[0].attn.num_heads,
        "num_hidden_layers": len(text.blocks),
        "pad_token_id": 0,
        "projection_dim": text.width,
        "torch_dtype": "float32",
        "vocab_size": text.token_embedding.num_embeddings,
    }


def text_weights(text: "TextEncoder") -> dict[str, "Tensor"]:
    """The tensors of that CLIPTextModel, on the CPU."""
    tensors = keys.split_attention(text.state_dict())
    names = keys.renamed(tensors, keys.transformers_text(len(text.blocks)))
    return {names[name]: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def tokenizer_files(text: "TextEncoder") -> dict[str, str]:
    """The files, name to content, of a CLIPTokenizer with open_clip's vocabulary, which is OpenAI's.

    It pads with "!", id 0, as Stable Diffusion 2.1's. `split_special_tokens` keeps a "!" in a prompt a word of its
    own, which it is in training; without it transformers would read padding there.
    """
    merges = sorted(text.tokenizer.bpe_ranks, key=text.tokenizer.bpe_ranks.__getitem__)
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": PAD,
        "unk_token": "<|endoftext|>",
    }
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": len(text.positional_embedding),
        "split_special_tokens": True,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "vocab.json": json.dumps(_encoder(text), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(special | config, indent=2) + "\n",
    }
