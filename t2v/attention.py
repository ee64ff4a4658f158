"""Triton kernels for attention where one side is short: frames to frames of the same place, pixels to a text.

a rows of a program; b f s d l as in t2v/blocks.py; m queries of a clip. Arithmetic is fp32 whatever the storage.
"""

import triton
import triton.language as tl


@triton.jit
def _attention_rows(S, F, HEADS, A: tl.constexpr, FP: tl.constexpr, D: tl.constexpr):
    """A program's rows: of each a sequence and a frame, and where its first number lies in a tensor [b f s heads d]."""
    r, d = tl.arange(0, A), tl.arange(0, D)
    sequence, frame = tl.program_id(0) * (A // FP) + r // FP, r % FP
    at = (tl.program_id(2) * F + frame).to(tl.int64) * S + sequence
    return sequence, frame, at, tl.program_id(1) * D + d, (frame < F) & (sequence < S)


@triton.jit
def _probabilities(q, k, scale, sequence, frame, F):
    """Each row attends to the frames of its own sequence."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    own = (sequence[:, None] == sequence[None]) & (frame < F)[None]
    scores = tl.where(own, scores, float("-inf"))
    e = tl.exp(scores - tl.max(scores, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def temporal_attention(qkv, o, scale, S, F, HEADS, A: tl.constexpr, FP: tl.constexpr, D: tl.constexpr):
    sequence, frame, at, col, live = _attention_rows(S, F, HEADS, A, FP, D)
    C = HEADS * D
    wide, inside = (at * 3 * C)[:, None] + col[None], live[:, None]
    q = tl.load(qkv + wide, mask=inside, other=0.0)
    k = tl.load(qkv + wide + C, mask=inside, other=0.0)
    v = tl.load(qkv + wide + 2 * C, mask=inside, other=0.0)
    p = _probabilities(q, k, scale, sequence, frame, F)
    y = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    tl.store(o + (at * C)[:, None] + col[None], y.to(o.dtype.element_ty), mask=inside)


@triton.jit
def temporal_attention_backward(
    qkv, do, dqkv, o, scale, S, F, HEADS, A: tl.constexpr, FP: tl.constexpr, D: tl.constexpr
):
    """dq, dk, dv side by side as q, k, v are, and o again."""
    sequence, frame, at, col, live = _attention_rows(S, F, HEADS, A, FP, D)
    C = HEADS * D
    narrow, wide, inside = (at * C)[:, None] + col[None], (at * 3 * C)[:, None] + col[None], live[:, None]
    q = tl.load(qkv + wide, mask=inside, other=0.0)
    k = tl.load(qkv + wide + C, mask=inside, other=0.0)
    v = tl.load(qkv + wide + 2 * C, mask=inside, other=0.0)
    g = tl.load(do + narrow, mask=inside, other=0.0)
    p = _probabilities(q, k, scale, sequence, frame, F)
    p = tl.where(inside, p, 0.0)
    half = p.to(v.dtype)
    tl.store(o + narrow, tl.dot(half, v, input_precision="ieee").to(o.dtype.element_ty), mask=inside)
    dv = tl.dot(tl.trans(half), g, input_precision="ieee")
    dp = tl.dot(g, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - tl.sum(dp * p, 1)[:, None])).to(v.dtype)
    dq = tl.dot(ds, k, input_precision="ieee") * scale
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
    tl.store(dqkv + wide, dq.to(dqkv.dtype.element_ty), mask=inside)
    tl.store(dqkv + wide + C, dk.to(dqkv.dtype.element_ty), mask=inside)
    tl.store(dqkv + wide + 2 * C, dv.to(dqkv.dtype.element_ty), mask=inside)


@triton.jit
def _short_probabilities(q, k, scale, L, LP: tl.constexpr):
    """Each row attends to all of L keys, padded to LP."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((tl.arange(0, LP) < L)[None], scores, float("-inf"))
    e = tl.exp(scores - tl.max(scores, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _keys(kv, L, HEADS, LP: tl.constexpr, D: tl.constexpr):
    """k and v of a program's clip and head from kv [2 b l heads d]."""
    row, d = tl.arange(0, LP), tl.arange(0, D)
    at = ((tl.program_id(2) * L + row) * HEADS + tl.program_id(1))[:, None] * D + d[None]
    size = tl.num_programs(2) * L * HEADS * D
    inside = (row < L)[:, None]
    return tl.load(kv + at, mask=inside, other=0.0), tl.load(kv + size + at, mask=inside, other=0.0)


@triton.jit
def short_attention(q, kv, o, scale, M, L, HEADS, A: tl.constexpr, LP: tl.constexpr, D: tl.constexpr):
    """o [b m heads d] of q [b m heads d] and few keys and values, kv [2 b l heads d]."""
    row, d = tl.program_id(0) * A + tl.arange(0, A), tl.arange(0, D)
    at = ((tl.program_id(2) * M + row).to(tl.int64) * HEADS + tl.program_id(1))[:, None] * D + d[None]
    inside = (row < M)[:, None]
    k, v = _keys(kv, L, HEADS, LP, D)
    p = _short_probabilities(tl.load(q + at, mask=inside, other=0.0), k, scale, L, LP)
    tl.store(o + at, tl.dot(p.to(v.dtype), v, input_precision="ieee").to(o.dtype.element_ty), mask=inside)


@triton.jit
def short_attention_backward(
    q, kv, do, dq, o, dkv, scale, M, L, HEADS, rows, A: tl.constexpr, LP: tl.constexpr, D: tl.constexpr
):
    """dq, o again, and dkv [chunk, 2 b l heads d] of a chunk's queries."""
    chunk, d, key = tl.program_id(0), tl.arange(0, D), tl.arange(0, LP)
    k, v = _keys(kv, L, HEADS, LP, D)
    dk, dv = tl.zeros([LP, D], tl.float32), tl.zeros([LP, D], tl.float32)
    for start in range(chunk * rows, min((chunk + 1) * rows, M), A):
        row = start + tl.arange(0, A)
        at = ((tl.program_id(2) * M + row).to(tl.int64) * HEADS + tl.program_id(1))[:, None] * D + d[None]
        inside = (row < M)[:, None]
        x, g = tl.load(q + at, mask=inside, other=0.0), tl.load(do + at, mask=inside, other=0.0)
        p = _short_probabilities(x, k, scale, L, LP)
        half = p.to(v.dtype)
        tl.store(o + at, tl.dot(half, v, input_precision="ieee").to(o.dtype.element_ty), mask=inside)
        dp = tl.dot(g, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - tl.sum(dp * p, 1)[:, None]) * scale).to(v.dtype)
        tl.store(dq + at, tl.dot(ds, k, input_precision="ieee").to(dq.dtype.element_ty), mask=inside)
        dv += tl.dot(tl.trans(half), g, input_precision="ieee")
        dk += tl.dot(tl.trans(ds), x, input_precision="ieee")
    size = tl.num_programs(2) * L * HEADS * D
    to = dkv + chunk * 2 * size + ((tl.program_id(2) * L + key) * HEADS + tl.program_id(1))[:, None] * D + d[None]
    tl.store(to, dk, mask=(key < L)[:, None])
    tl.store(to + size, dv, mask=(key < L)[:, None])
