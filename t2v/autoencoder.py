"""The encoder of diffusers' AutoencoderKL, walked through with the steps of t2v/fused.py: same weights, fewer passes.

n images, y x pixels, h w latent size (pixels / 8), c channels. Channels are the last axis.
"""

from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v import fused


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, side by side: pixels in [-1, 1] [n, y, x, 3] -> [n, h, w, 2 c].

    `vae` is an AutoencoderKL in eval mode; `pixels` have the dtype and device of its weights.
    """
    encoder = vae.encoder
    x = _conv(encoder.conv_in, pixels)
    for level in encoder.down_blocks:
        x = _level(level, x)
        for downsampler in level.downsamplers or ():
            x = _conv(downsampler.conv, F.pad(x, (0, 0, 0, 1, 0, 1)))  # a row and a column of zeros at the far ends
    x = _level(encoder.mid_block, x)
    x = _norm_product(encoder.conv_norm_out, x, encoder.conv_out.weight) + encoder.conv_out.bias
    return x if vae.quant_conv is None else _conv(vae.quant_conv, x)


def _level(level: Any, x: Tensor) -> Tensor:
    """Residual blocks, each followed by its attention where the level has one for it."""
    for resnet, attention in zip_longest(level.resnets, getattr(level, "attentions", ())):
        x = _resnet(resnet, x)
        x = x if attention is None else _attention(attention, x)
    return x


def _norm_product(norm: nn.GroupNorm, x: Tensor, kernel: Tensor, shift: Tensor | None = None) -> Tensor:
    return fused.norm_product(x, shift, norm.weight, norm.bias, kernel, norm.num_groups, norm.eps, True, 0.0)[0]


def _resnet(resnet: Any, x: Tensor) -> Tensor:
    y = _norm_product(resnet.norm1, x, resnet.conv1.weight)
    y = _norm_product(resnet.norm2, y, resnet.conv2.weight, resnet.conv1.bias)
    bias = resnet.conv2.bias
    if resnet.conv_shortcut is not None:
        x, bias = fused.product(x, resnet.conv_shortcut.weight.flatten(1)), bias + resnet.conv_shortcut.bias
    return fused.add(x, y, bias)


def _attention(attention: Any, x: Tensor) -> Tensor:
    """One head over all positions of an image."""
    norm, out = attention.group_norm, attention.to_out[0]
    y = F.group_norm(x.flatten(1, 2).mT, norm.num_groups, norm.weight, norm.bias, norm.eps).mT
    q, k, v = (linear(y).unsqueeze(1) for linear in (attention.to_q, attention.to_k, attention.to_v))
    y = fused.product(F.scaled_dot_product_attention(q, k, v).squeeze(1), out.weight)
    return fused.add(x, y.reshape(x.shape), out.bias)


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(x.movedim(-1, 1)).movedim(1, -1).contiguous()


def channels_last(module: nn.Module) -> nn.Module:
    """Stores the kernels of convolutions as these steps read them, in place: what is never trained need not be turned.

    Not for training: DeepSpeed takes contiguous parameters alone.
    """
    for parameter in module.parameters():
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        if parameter.ndim in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.ndim])
    return module
