"""The steps of t2v/fused.py on a GPU: kernels around products, and backward passes that keep only the steps' inputs.

Activations, which would fill the memory, are computed twice, products once. Letters as in t2v/kernels.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from t2v import attention, kernels
from t2v.fused import product

# Tiles of rows and columns, and warps, as measured on a Hopper card for the published widths.
SUMS = {"R": 32, "K": 64, "num_warps": 4}
NORM, NORM_WIDE = {"R": 64, "K": 64, "num_warps": 4}, {"R": 32, "K": 128, "num_warps": 8}
NORM_BACKWARD = {"R": 16, "K": 64, "num_warps": 4}
NORM_BACKWARD_SUMS = {"R": 16, "K": 64, "num_warps": 4}
GEGLU = {"R": 16, "K": 256, "num_warps": 4}
GEGLU_BACKWARD = {"R": 8, "K": 128, "num_warps": 8}
ADD = {"R": 8, "K": 512, "num_warps": 4}
QUERIES = 64  # of one program; over time, as many sequences side by side as fit
PROGRAMS = 2048  # that share out a sum: a few for each processor of any card


class NormProduct(Function):
    """fused.norm_product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, kernel: Tensor,
        groups: int, eps: float, silu: bool, dropout: float, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x = x.contiguous()
        n, c, p = x.shape[0], x.shape[-1], x[0].numel() // x.shape[-1]
        affine = torch.empty(3, n, c, device=x.device, dtype=torch.float32)
        stats = torch.empty(n, groups, 2, device=x.device, dtype=torch.float32)
        group = c // groups
        ctx.finish = {"SHIFT": shift is not None, "CG": group, "K": _next_power_of_2(group), "Q": 16}
        ctx.per_shift = 1 if shift is None else n // len(shift)
        ctx.chance = (int(dropout * 2**32), 1 / (1 - dropout))
        ctx.switches = {"SILU": silu, "DROP": dropout > 0}
        grid, rows, sums = _shared_out(x, n, SUMS)
        kernels.column_sums[grid](x, sums, p, c, rows, **SUMS)
        kernels.norm_finish[(n, groups)](
            sums, shift, weight, bias, affine, stats, p, c, eps, len(sums), ctx.per_shift, **ctx.finish
        )
        y, tile = torch.empty_like(x), NORM if c % NORM_WIDE["K"] else NORM_WIDE
        kernels.norm_apply[(n, *_tiles(p, c, tile))](x, affine, y, p, c, seed, *ctx.chance, **ctx.switches, **tile)
        ctx.save_for_backward(x, shift, weight, kernel, affine, stats, seed)
        ctx.set_materialize_grads(False)
        return product(y, kernel), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, carried: Tensor | None) -> tuple:
        x, shift, weight, kernel, affine, stats, seed = ctx.saved_tensors
        n, c, p = x.shape[0], x.shape[-1], x[0].numel() // x.shape[-1]
        dy = _by_input(dout, x, kernel).contiguous()
        y = torch.empty_like(x)
        grid, rows, sums = _shared_out(x, n, NORM_BACKWARD_SUMS)
        kernels.norm_backward_sums[grid](
            x, dy, affine, y, sums, p, c, rows, seed, *ctx.chance, **ctx.switches, **NORM_BACKWARD_SUMS
        )
        dkernel = _by_kernel(dout, y, kernel, ctx.needs_input_grad[4])
        found = torch.empty(5, n, c, device=x.device, dtype=torch.float32)
        kernels.norm_backward_finish[(n, stats.shape[1])](
            sums, shift, weight, affine, stats, found, p, c, len(sums), ctx.per_shift, **ctx.finish
        )
        dx, carried = y, carried if carried is None else carried.contiguous()  # y is of no more use
        switches = {"CARRIED": carried is not None, **ctx.switches, **NORM_BACKWARD}
        kernels.norm_backward_apply[(n, *_tiles(p, c, NORM_BACKWARD))](
            x, dy, carried, affine, found, dx, p, c, seed, *ctx.chance, **switches
        )
        dweight, dbias = found[2:4].sum(1).to(weight.dtype)
        dshift = None if shift is None else found[4].view(len(shift), -1, c).sum(1).to(shift.dtype)
        return dx, dshift, dweight, dbias, dkernel, None, None, None, None, None


class LayerNormProducts(Function):
    """fused.layer_norm_products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, *after: Tensor
    ) -> tuple[Tensor, ...]:
        total, stats, y = _layer_norm(x, h, shift, weight, bias, eps)
        ctx.save_for_backward(total, weight, bias, stats, *after)
        ctx.added = h is not None
        ctx.set_materialize_grads(False)
        return *(product(y, kernel) for kernel in after), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, weight, bias, stats, *after = ctx.saved_tensors
        *douts, carried = grads
        dy = _by_input(douts[0], x, after[0]).flatten(0, -2)
        for dout, kernel in zip(douts[1:], after[1:], strict=True):
            dy.addmm_(dout.flatten(0, -2), kernel)
        dx, y, dparameters = _layer_norm_backward(x, dy, carried, weight, bias, stats)
        wanted = ctx.needs_input_grad[6:]
        dafter = (_by_kernel(dout, y, *rest) for dout, *rest in zip(douts, after, wanted, strict=True))
        return dx, dx if ctx.added else None, *dparameters, None, *dafter


class FeedForwardProduct(Function):
    """fused.feed_forward_product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float,
        widen: Tensor, widen_bias: Tensor, kernel: Tensor, beside: Tensor, keep: bool,
    ) -> Tensor:  # fmt: skip
        total, stats, y = _layer_norm(x, h, shift, weight, bias, eps)
        p = product(y, widen)
        m, width = p.numel() // p.shape[-1], kernel.shape[1]
        gated = p.new_empty(m, width)
        kernels.geglu[_tiles(m, width, GEGLU)](p, widen_bias, gated, m, width, **GEGLU)
        ctx.eps = eps
        ctx.save_for_backward(total, weight, bias, stats, widen, widen_bias, kernel, beside, p if keep else None)
        out = product(total, beside)
        out.view(m, -1).addmm_(gated, kernel.t())
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        x, weight, bias, stats, widen, widen_bias, kernel, beside, p = ctx.saved_tensors
        if p is None:
            _, _, y = _layer_norm(x, None, torch.zeros_like(bias), weight, bias, ctx.eps)
            p = product(y, widen)
        dgated = _by_input(dout, x, kernel)
        dp, gated, width = torch.empty_like(p), torch.empty_like(dgated), kernel.shape[1]
        (_, *grid), rows, sums = _shared_out(dgated, 1, GEGLU_BACKWARD)
        kernels.geglu_backward[tuple(grid)](
            p, widen_bias, dgated, dp, gated, sums, dgated.numel() // width, width, rows, **GEGLU_BACKWARD
        )
        del p, dgated
        dkernel = _by_kernel(dout, gated, kernel, ctx.needs_input_grad[8])
        del gated
        dx, y, dparameters = _layer_norm_backward(
            x, dp.flatten(0, -2) @ widen, _by_input(dout, x, beside), weight, bias, stats
        )
        dwiden = _by_kernel(dp, y, widen, ctx.needs_input_grad[6])
        dbeside = _by_kernel(dout, x, beside, ctx.needs_input_grad[9])
        dwiden_bias = sums.sum(0).flatten().to(widen_bias.dtype)
        return dx, dx, *dparameters, None, dwiden, dwiden_bias, dkernel, dbeside, None


class Add(Function):
    """fused.add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, shift: Tensor) -> Tensor:
        ctx.dtype = shift.dtype
        x, h = x.contiguous(), h.contiguous()
        y, m, c = torch.empty_like(h), h.numel() // h.shape[-1], h.shape[-1]
        kernels.add[_tiles(m, c, ADD)](x, h, shift, y, m, c, **ADD)
        return y

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        dout = dout.contiguous()
        grid, rows, sums = _shared_out(dout, 1, SUMS)
        c = dout.shape[-1]
        kernels.column_sums[grid](dout, sums, dout.numel() // c, c, rows, **SUMS)
        return dout, dout, sums[:, 0, 0].sum(0).to(ctx.dtype)


class TemporalAttentionProduct(Function):
    """fused.temporal_attention_product."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, head_dim: int, kernel: Tensor) -> Tensor:
        n, f, s, width = qkv.shape
        heads, slots = width // (3 * head_dim), _next_power_of_2(f)
        ctx.call = (head_dim**-0.5, s, f, heads)
        ctx.tile = {"A": QUERIES, "FP": slots, "D": head_dim}
        ctx.grid = (-(-s * slots // QUERIES), heads, n)
        o = qkv.new_empty(n, f, s, width // 3)
        attention.temporal_attention[ctx.grid](qkv, o, *ctx.call, **ctx.tile)
        ctx.save_for_backward(qkv, kernel)
        return product(o, kernel)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        qkv, kernel = ctx.saved_tensors
        do = _by_input(dout, qkv, kernel)
        dqkv, o = torch.empty_like(qkv), torch.empty_like(do)
        attention.temporal_attention_backward[ctx.grid](qkv, do, dqkv, o, *ctx.call, **ctx.tile)
        return dqkv, None, _by_kernel(dout, o, kernel, ctx.needs_input_grad[2])


class CrossAttentionProduct(Function):
    """fused.cross_attention_product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, head_dim: int, kernel: Tensor) -> Tensor:
        q, (_, b, keys, c) = q.contiguous(), kv.shape
        m, heads = q.numel() // (b * c), c // head_dim
        ctx.call = (head_dim**-0.5, m, keys, heads)
        ctx.tile = {"A": QUERIES, "LP": max(16, _next_power_of_2(keys)), "D": head_dim}
        o = torch.empty_like(q)
        attention.short_attention[(-(-m // QUERIES), heads, b)](q, kv, o, *ctx.call, **ctx.tile)
        ctx.save_for_backward(q, kv, kernel)
        return product(o, kernel)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        q, kv, kernel = ctx.saved_tensors
        _, m, _, heads = ctx.call
        do = _by_input(dout, q, kernel)
        dq, o, b = torch.empty_like(q), torch.empty_like(q), kv.shape[1]
        tiles = -(-m // QUERIES)
        rows = -(-tiles // max(1, min(PROGRAMS // 4 // (b * heads), tiles))) * QUERIES
        dkv = torch.empty(-(-m // rows), *kv.shape, device=q.device, dtype=torch.float32)
        attention.short_attention_backward[(len(dkv), heads, b)](
            q, kv, do, dq, o, dkv, *ctx.call, rows, num_warps=8, **ctx.tile
        )
        return dq, dkv.sum(0).to(kv.dtype), None, _by_kernel(dout, o, kernel, ctx.needs_input_grad[3])


def _layer_norm(
    x: Tensor, h: Tensor | None, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + h + shift, its statistics (mean, 1/std) [m, 2], and its norm."""
    x = x.contiguous()
    c, m = x.shape[-1], x.numel() // x.shape[-1]
    tile = _whole_rows(c)
    total, y, stats = torch.empty_like(x), torch.empty_like(x), torch.empty(m, 2, device=x.device, dtype=torch.float32)
    kernels.layer_norm[(-(-m // tile["R"]),)](
        x, h, shift, weight, bias, total, stats, y, m, c, eps, ADD=h is not None, **tile
    )
    return total, stats, y


def _layer_norm_backward(
    x: Tensor, dy: Tensor, carried: Tensor | None, weight: Tensor, bias: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """dx with the carried gradient, the norm again, and the gradients of shift, weight and bias."""
    c, m = x.shape[-1], x.numel() // x.shape[-1]
    tile = _whole_rows(c)
    dx, y = torch.empty_like(x), torch.empty_like(x)
    rows = -(-m // (PROGRAMS // 2 * tile["R"])) * tile["R"]
    sums = torch.empty(-(-m // rows), 3, c, device=x.device, dtype=torch.float32)
    carried = carried if carried is None else carried.contiguous()
    kernels.layer_norm_backward[(len(sums),)](
        x, dy, carried, weight, bias, stats, dx, y, sums, m, c, rows, CARRIED=carried is not None, **tile
    )
    dweight, dbias, dshift = sums.sum(0).to(weight.dtype)
    return dx, y, (dshift, dweight, dbias)


def _by_input(dout: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of product(x, kernel) by x, of which only the shape counts."""
    if kernel.ndim == 2:
        return dout @ kernel
    return _convolution_backward(dout, x, kernel, (True, False, False))[0].movedim(1, -1)


def _by_kernel(dout: Tensor, x: Tensor, kernel: Tensor, wanted: bool) -> Tensor | None:
    """Gradient of product(x, kernel) by the kernel, unless that is frozen."""
    if not wanted:
        return None
    if kernel.ndim == 2:
        return dout.flatten(0, -2).t() @ x.flatten(0, -2)
    return _convolution_backward(dout, x, kernel, (False, True, False))[1]


def _convolution_backward(dout: Tensor, x: Tensor, kernel: Tensor, mask: tuple[bool, ...]) -> tuple[Tensor, ...]:
    padding = [size // 2 for size in kernel.shape[2:]]
    dout, x = dout.movedim(-1, 1), x.movedim(-1, 1)
    return torch.ops.aten.convolution_backward(dout, x, kernel, None, (1, 1), padding, (1, 1), False, (0, 0), 1, mask)


def _tiles(rows: int, columns: int, tile: dict[str, int]) -> tuple[int, int]:
    return -(-rows // tile["R"]), -(-columns // tile["K"])


def _shared_out(x: Tensor, n: int, tile: dict[str, int]) -> tuple[tuple[int, int, int], int, Tensor]:
    """How sums over the positions of x [n, p, c] are shared out: grid, rows of a program, sums [chunk, 2, n, c]."""
    c = x.shape[-1]
    p = x.numel() // (n * c)
    tiles, columns = _tiles(p, c, tile)
    chunks = max(1, min(PROGRAMS // (n * columns), tiles))
    rows = -(-tiles // chunks) * tile["R"]
    chunks = -(-p // rows)
    sums = torch.empty(chunks, 2, n, c, device=x.device, dtype=torch.float32)
    return (n, chunks, columns), rows, sums


def _whole_rows(channels: int) -> dict[str, int]:
    width = _next_power_of_2(channels)
    return {"R": max(1, 1024 // width), "K": width, "num_warps": 1 if width <= 1024 else 4}


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
