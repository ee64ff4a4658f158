"""Steps of the UNet that read and write memory once: a norm, a gate or an attention, and the product that follows it.

n norm instances, c o channels, i j positions of a sequence, s sequences side by side, d head width; `...` are
positions. Channels are the last axis.

Each step is a plain function, and on a GPU an autograd function of t2v/recompute.py, which keeps the step's inputs and
computes what lies between them and the product once more in the backward pass. Two habits save passes over memory:

- A product leaves its bias to whoever reads its result next: to a norm (`shift`), a gate, or `add`.
- What goes on beside a norm, as a residual, is given back by the norm, which then adds up its gradient.
"""

import functools
import importlib.util
import logging

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_HEADS = 65_535  # of a CUDA grid axis; a video of 256 x 256 pixels has 8,192 in the initial block, over time
MAX_FRAMES, MAX_KEYS, HEAD_DIMS = 64, 128, (16, 32, 64)  # that the kernels for attention take
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def product(x: Tensor, kernel: Tensor) -> Tensor:
    """x [..., c] times a matrix [o, c], or images x [n, h, w, c] convolved with [o, c, kh, kw], zeros beyond."""
    if kernel.ndim == 2:
        return F.linear(x, kernel)
    padding = [size // 2 for size in kernel.shape[2:]]
    return F.conv2d(x.movedim(-1, 1), kernel, padding=padding).movedim(1, -1)


def norm_product(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    kernel: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """product(dropout(silu(group_norm(x + shift))), kernel), and x to go on with.

    x [n, ..., c] has one norm for each of n; shift [c], or [b, c] where n is a multiple of b.
    """
    shift = shift if shift is None else shift.view(-1, x.shape[-1])
    if _on_gpu(x):
        from t2v.recompute import NormProduct

        seed = torch.randint(2**31, (), device=x.device) if dropout else None  # the GPU's own, so that graphs draw anew
        return NormProduct.apply(x, shift, weight, bias, kernel, groups, eps, silu, dropout, seed)
    y = x
    if shift is not None:
        y = (x.unflatten(0, (shift.shape[0], -1)) + shift.view(-1, *[1] * (x.ndim - 1), x.shape[-1])).flatten(0, 1)
    y = y.reshape(y.shape[0], -1, 1, y.shape[-1]).movedim(-1, 1)  # [n, c, positions, 1], channels-last
    y = F.group_norm(y, groups, weight, bias, eps).movedim(1, -1).reshape(x.shape)
    return product(F.dropout(F.silu(y) if silu else y, dropout), kernel), x


def layer_norm_products(
    x: Tensor, h: Tensor | None, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, *kernels: Tensor
) -> tuple[Tensor, ...]:
    """product(layer_norm(x + h + shift), kernel) for each kernel, and x + h + shift to go on with.

    x, h [..., c], shift [c].
    """
    if _on_gpu(x):
        from t2v.recompute import LayerNormProducts

        return LayerNormProducts.apply(x, h, shift, weight, bias, eps, *kernels)
    x = x + shift if h is None else x + h + shift
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return *(product(y, kernel) for kernel in kernels), x


def feed_forward_product(
    x: Tensor,
    h: Tensor,
    shift: Tensor,
    norm: tuple[Tensor, Tensor, float],
    widen: tuple[Tensor, Tensor],
    kernel: Tensor,
    beside: Tensor,
    keep: bool,
) -> Tensor:
    """product(value * gelu(gate), kernel) + product(x', beside), of x' = x + h + shift [..., c].

    `norm` is a layer norm's weight, bias and eps, `widen` the weight [2 w, c] and bias [2 w] of the layer that makes
    value and gate of it, side by side. Unless `keep`, that layer too is computed once more in the backward pass.
    """
    if _on_gpu(x):
        from t2v.recompute import FeedForwardProduct

        return FeedForwardProduct.apply(x, h, shift, *norm, *widen, kernel, beside, keep)
    x = x + h + shift
    value, gate = F.linear(F.layer_norm(x, x.shape[-1:], *norm), *widen).chunk(2, dim=-1)
    return product(x, beside) + product(value * F.gelu(gate), kernel)


def add(x: Tensor, h: Tensor, shift: Tensor) -> Tensor:
    """x + h + shift: [..., c], shift [c]."""
    if _on_gpu(x):
        from t2v.recompute import Add

        return Add.apply(x, h, shift)
    return x + h + shift


def temporal_attention_product(qkv: Tensor, head_dim: int, kernel: Tensor) -> Tensor:
    """product(softmax attention along axis 1, kernel), each sequence s its own: qkv [n, i, s, 3 c] -> [n, i, s, o].

    The sequences count as further heads, which leaves q, k and v where they are.
    """
    n, i, s, _ = qkv.shape
    if _attends(qkv, head_dim) and i <= MAX_FRAMES:
        from t2v.recompute import TemporalAttentionProduct

        return TemporalAttentionProduct.apply(qkv, head_dim, kernel)
    q, k, v = (x.reshape(n, i, -1, head_dim).transpose(1, 2) for x in qkv.chunk(3, dim=-1))  # [n, s*heads, i, d]
    return product(attention(q, k, v).transpose(1, 2).reshape(n, i, s, -1), kernel)


def cross_attention_product(q: Tensor, k: Tensor, v: Tensor, head_dim: int, kernel: Tensor) -> Tensor:
    """product(softmax attention of all of q [b, ..., c] to k and v [b, l, c], kernel)."""
    if _attends(q, head_dim) and k.shape[1] <= MAX_KEYS:
        from t2v.recompute import CrossAttentionProduct

        return CrossAttentionProduct.apply(q, torch.stack([k, v]), head_dim, kernel)
    heads = (x.reshape(x.shape[0], -1, x.shape[-1] // head_dim, head_dim).transpose(1, 2) for x in (q, k, v))
    return product(attention(*heads).transpose(1, 2).reshape(q.shape), kernel)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [n, heads, i, d] to k and v [n, heads, j, d]."""
    if q.shape[1] > MAX_HEADS:
        calls = zip(*(x.split(MAX_HEADS, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*call) for call in calls], dim=1)
    if not q.is_cuda or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and _has_triton() and not torch.compiler.is_compiling()


def _attends(x: Tensor, head_dim: int) -> bool:
    """Whether the kernels for attention take it; tiles of fp32 would not fit a smaller card's shared memory."""
    return _on_gpu(x) and x.element_size() == 2 and head_dim in HEAD_DIMS


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logging.getLogger(__name__).warning("triton is missing: the UNet runs without its kernels, at half the speed")
    return found
