"""Which weights of the UNet a run trains, and low-rank updates of chosen ones (LoRA, Hu et al., 2106.09685).

The steps of t2v/fused.py read a layer's `weight` and never call the layer, so an update is a parametrization of that
weight, W + alpha / rank * B A, and not a layer beside it as in peft. Their files are the same.

o i rows and columns of a weight (a convolution's columns are its inputs at all taps), r rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2v.config import LoraConfig, TrainConfig
from t2v.keys import is_temporal

_OWN = ".parametrizations.weight."  # between a layer's name and those of its weight W and of A and B
_BASE, _A, _B = f"{_OWN}original", f"{_OWN}0.lora_A", f"{_OWN}0.lora_B"


class LowRank(nn.Module):
    """W -> W + alpha / rank * B A, which begins as W.

    Training in 16 bits casts W; `rest` keeps what that leaves of it, and the sum is rounded once. Added to a rounded W,
    updates smaller than its steps would be lost wholly, and most are.
    """

    rest: Tensor | None

    def __init__(self, weight: Tensor, config: LoraConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(torch.empty(config.rank, *weight.shape[1:]))
        self.lora_B = nn.Parameter(torch.zeros(len(weight), config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        low = weight.detach().to(dtype)
        self.register_buffer("rest", None if dtype == weight.dtype else (weight.detach() - low).to(dtype))

    def forward(self, weight: Tensor) -> Tensor:
        base = weight if self.rest is None else weight.float() + self.rest
        return torch.add(base, _product(self.lora_B, self.lora_A), alpha=self.scale).to(weight.dtype)


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B [o, r] times A [r, ...] -> [o, ...]."""
    return (b @ a.flatten(1)).unflatten(1, a.shape[1:])


def choose_trained(unet: nn.Module, train: TrainConfig, dtype: torch.dtype = torch.float32) -> None:
    """Freezes what `train.trained` leaves as it is; for `lora` it gives the chosen layers their updates.

    `dtype` is what the weights will be cast to. ValueError, naming the config key, for a name of no such layer.
    """
    if train.trained == "all":
        return
    for name, weight in unet.named_parameters():
        weight.requires_grad_(train.trained == "temporal" and is_temporal(name))
    if train.trained == "lora":
        for layer in _targets(unet, train.lora.targets):
            update = LowRank(layer.weight, train.lora, dtype)
            parametrize.register_parametrization(layer, "weight", update, unsafe=True)


def _targets(unet: nn.Module, endings: list[str]) -> list[nn.Linear | nn.Conv2d | nn.Conv3d]:
    found = []
    for ending in endings:
        layers = [(name, layer) for name, layer in unet.named_modules() if f".{name}".endswith(f".{ending}")]
        if not layers:
            raise ValueError(f"train.lora.targets: the UNet has no layer {ending}")
        for name, layer in layers:
            if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
                raise ValueError(f"train.lora.targets: {name} is no linear layer and no convolution")
            found.append(layer)
    return list(dict.fromkeys(found))


def trained_shapes(unet: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of what is trained."""
    return {name: weight.shape for name, weight in unet.named_parameters() if weight.requires_grad}


def adapted_weights(unet: nn.Module) -> int:
    """Elements of all the weights that have an update."""
    return sum(weight.numel() for name, weight in unet.named_parameters() if name.endswith(_BASE))


@dataclass(frozen=True)
class Adapter:
    """Trained updates: A [r, ...] and B [o, r] of every layer, under the names that their parameters have."""

    config: LoraConfig
    tensors: Mapping[str, Tensor]
    base: str  # the model that they were trained for

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that they were trained for, with the updates added; in fp32 where they have one."""
        merged, scale = dict(weights), self.config.alpha / self.config.rank
        for layer, (a, b) in self._layers().items():
            name = f"{layer}.weight"
            merged[name] = merged[name].float() + scale * _product(b.float(), a.float())
        return merged

    def write(self, folder: Path) -> None:
        """Makes a folder that peft's PeftModel.from_pretrained loads into diffusers' UNet3DConditionModel of `base`."""
        from peft import LoraConfig as PeftConfig  # it takes seconds, and only an export needs it

        config, tensors = self.config, {}
        for layer, (a, b) in self._layers().items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = b.reshape(*b.shape, *[1] * (a.ndim - 2)).contiguous()
        PeftConfig(
            base_model_name_or_path=self.base,
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it, whole or not
            target_modules=list(config.targets),
            inference_mode=True,
        ).save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        names = [name.removesuffix(_A) for name in self.tensors if name.endswith(_A)]
        return {name: (self.tensors[name + _A], self.tensors[name + _B]) for name in names}
