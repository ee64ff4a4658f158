"""Triton kernels for what lies between the UNet's products: each pass over memory does all that it can.

n norm instances, p positions of an instance, c channels, g groups; m rows; i gated width; b f s d as in t2v/blocks.py.
Arithmetic is fp32 whatever the storage. t2v/fused.py says what each is for and has the plain twins.
"""

import triton
import triton.language as tl


@triton.jit
def _silu_dropped(x, keep, scale, SILU: tl.constexpr):
    """What follows a group norm, and its derivative."""
    if SILU:
        s = tl.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    else:
        value, slope = x, tl.full(x.shape, 1.0, tl.float32)
    return tl.where(keep, value * scale, 0.0), tl.where(keep, slope * scale, 0.0)


@triton.jit
def _keep(row, col, seed, threshold, DROP: tl.constexpr):
    """Which elements dropout leaves: a hash of (row, column, *seed), so that the backward pass finds the same ones."""
    if DROP:
        h = (row.to(tl.uint32) + tl.load(seed).to(tl.uint32)) * 0x9E3779B1
        h = ((h ^ (h >> 15)) * 0x85EBCA77)[:, None] + (col.to(tl.uint32) * 0xC2B2AE3D)[None]
        keep = (h ^ (h >> 15)) * 0x2C1B3C6D >= threshold.to(tl.uint32)
    else:
        keep = tl.full([row.shape[0], col.shape[0]], 1, tl.int1)
    return keep


@triton.jit
def column_sums(x, sums, P, C, rows, R: tl.constexpr, K: tl.constexpr):
    """sums [chunk, 2, n, c]: of x and of its square over the positions of a chunk."""
    n, chunk, cols = tl.program_id(0), tl.program_id(1), tl.program_id(2) * K + tl.arange(0, K)
    one, two = tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32)
    for start in range(chunk * rows, min((chunk + 1) * rows, P), R):
        pos = start + tl.arange(0, R)
        at = (n.to(tl.int64) * P + pos)[:, None] * C + cols[None]
        v = tl.load(x + at, mask=(pos < P)[:, None] & (cols < C)[None], other=0.0).to(tl.float32)
        one += v
        two += v * v
    to = sums + (chunk * 2 * tl.num_programs(0) + n) * C + cols
    tl.store(to, tl.sum(one, 0), mask=cols < C)
    tl.store(to + tl.num_programs(0) * C, tl.sum(two, 0), mask=cols < C)


@triton.jit
def _summed(sums, n, N, cols, mask, C, chunks, Q: tl.constexpr):
    """Both columns of sums [chunk, 2, n, c], added over chunks."""
    one, two = tl.zeros([Q, cols.shape[0]], tl.float32), tl.zeros([Q, cols.shape[0]], tl.float32)
    for start in range(0, chunks, Q):
        q = start + tl.arange(0, Q)
        at = sums + ((q[:, None] * 2 * N) + n) * C + cols[None]
        inside = (q < chunks)[:, None] & mask[None]
        one += tl.load(at, mask=inside, other=0.0)
        two += tl.load(at + N * C, mask=inside, other=0.0)
    return tl.sum(one, 0), tl.sum(two, 0)


@triton.jit
def _shift(shift, n, cols, mask, C, per_shift, SHIFT: tl.constexpr):
    if SHIFT:
        return tl.load(shift + (n // per_shift) * C + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.zeros(cols.shape, tl.float32)


@triton.jit
def norm_finish(
    sums, shift, weight, bias, affine, stats, P, C, eps, chunks, per_shift,
    SHIFT: tl.constexpr, CG: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One group: affine [3, n, c] = (a, b, sum of x) with norm(x + shift) = a x + b; stats [n, g, 2] = mean, 1/std."""
    n, g, N = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    k = tl.arange(0, K)
    cols, mask = g * CG + k, k < CG
    one, two = _summed(sums, n, N, cols, mask, C, chunks, Q)
    s = _shift(shift, n, cols, mask, C, per_shift, SHIFT)
    mean = tl.sum(one + P * s, 0) / (P * CG)
    var = tl.sum(two + 2 * s * one + P * s * s, 0) / (P * CG) - mean * mean
    rstd = 1 / tl.sqrt(tl.maximum(var, 0.0) + eps)
    a = rstd * tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32) + (s - mean) * a
    to = affine + n * C + cols
    tl.store(to, a, mask=mask)
    tl.store(to + N * C, b, mask=mask)
    tl.store(to + 2 * N * C, one, mask=mask)
    at = stats + (n * tl.num_programs(1) + g) * 2
    tl.store(at, mean)
    tl.store(at + 1, rstd)


@triton.jit(do_not_specialize=["threshold"])
def norm_apply(
    x, affine, y, P, C, seed, threshold, scale, SILU: tl.constexpr, DROP: tl.constexpr, R: tl.constexpr, K: tl.constexpr
):
    n, pos, cols = tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R), tl.program_id(2) * K + tl.arange(0, K)
    mask, N = cols < C, tl.num_programs(0)
    a = tl.load(affine + n * C + cols, mask=mask, other=0.0)[None]
    b = tl.load(affine + (N + n) * C + cols, mask=mask, other=0.0)[None]
    at = (n.to(tl.int64) * P + pos)[:, None] * C + cols[None]
    inside = (pos < P)[:, None] & mask[None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * a + b
    v, _ = _silu_dropped(v, _keep(n * P + pos, cols, seed, threshold, DROP), scale, SILU)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def norm_backward_sums(
    x, dy, affine, y, sums, P, C, rows, seed, threshold, scale,
    SILU: tl.constexpr, DROP: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Recomputes y, and sums [chunk, 2, n, c] of dz and x dz, where z = norm(x + shift)."""
    n, chunk, cols = tl.program_id(0), tl.program_id(1), tl.program_id(2) * K + tl.arange(0, K)
    mask, N = cols < C, tl.num_programs(0)
    a = tl.load(affine + n * C + cols, mask=mask, other=0.0)[None]
    b = tl.load(affine + (N + n) * C + cols, mask=mask, other=0.0)[None]
    one, two = tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32)
    for start in range(chunk * rows, min((chunk + 1) * rows, P), R):
        pos = start + tl.arange(0, R)
        at = (n.to(tl.int64) * P + pos)[:, None] * C + cols[None]
        inside = (pos < P)[:, None] & mask[None]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        value, slope = _silu_dropped(v * a + b, _keep(n * P + pos, cols, seed, threshold, DROP), scale, SILU)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
        one += d * slope
        two += d * slope * v
    to = sums + (chunk * 2 * N + n) * C + cols
    tl.store(to, tl.sum(one, 0), mask=mask)
    tl.store(to + N * C, tl.sum(two, 0), mask=mask)


@triton.jit
def norm_backward_finish(
    sums, shift, weight, affine, stats, out, P, C, chunks, per_shift,
    SHIFT: tl.constexpr, CG: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One group: out [5, n, c] = k2, k3, dweight, dbias, dshift, with dx = a dz + k2 x + k3."""
    n, g, N = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    k = tl.arange(0, K)
    cols, mask = g * CG + k, k < CG
    dbias, xdz = _summed(sums, n, N, cols, mask, C, chunks, Q)
    s = _shift(shift, n, cols, mask, C, per_shift, SHIFT)
    at = stats + (n * tl.num_programs(1) + g) * 2
    mean, rstd = tl.load(at), tl.load(at + 1)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = rstd * (xdz + (s - mean) * dbias)
    k2 = -rstd * rstd * tl.sum(w * dweight, 0) / (P * CG)
    k3 = -rstd * tl.sum(w * dbias, 0) / (P * CG) + k2 * (s - mean)
    total = tl.load(affine + (2 * N + n) * C + cols, mask=mask, other=0.0)
    to = out + n * C + cols
    tl.store(to, tl.zeros([K], tl.float32) + k2, mask=mask)
    tl.store(to + N * C, k3, mask=mask)
    tl.store(to + 2 * N * C, dweight, mask=mask)
    tl.store(to + 3 * N * C, dbias, mask=mask)
    tl.store(to + 4 * N * C, rstd * w * dbias + k2 * total + P * k3, mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def norm_backward_apply(
    x, dy, carried, affine, k, dx, P, C, seed, threshold, scale,
    SILU: tl.constexpr, DROP: tl.constexpr, CARRIED: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    n, pos, cols = tl.program_id(0), tl.program_id(1) * R + tl.arange(0, R), tl.program_id(2) * K + tl.arange(0, K)
    mask, N = cols < C, tl.num_programs(0)
    a = tl.load(affine + n * C + cols, mask=mask, other=0.0)[None]
    b = tl.load(affine + (N + n) * C + cols, mask=mask, other=0.0)[None]
    k2 = tl.load(k + n * C + cols, mask=mask, other=0.0)[None]
    k3 = tl.load(k + (N + n) * C + cols, mask=mask, other=0.0)[None]
    at = (n.to(tl.int64) * P + pos)[:, None] * C + cols[None]
    inside = (pos < P)[:, None] & mask[None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    _, slope = _silu_dropped(v * a + b, _keep(n * P + pos, cols, seed, threshold, DROP), scale, SILU)
    d = d * slope * a + v * k2 + k3
    if CARRIED:
        d += tl.load(carried + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm(
    x, h, shift, weight, bias, total, stats, y, M, C, eps, ADD: tl.constexpr, R: tl.constexpr, K: tl.constexpr
):
    """total = x + h + shift, y = norm(total), stats [m, 2] = mean, 1/std."""
    row, col = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, K)
    at, mask = row.to(tl.int64)[:, None] * C + col[None], col < C
    inside = (row < M)[:, None] & mask[None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(shift + col, mask=mask, other=0.0).to(tl.float32)[None]
    v = v.to(total.dtype.element_ty)
    tl.store(total + at, v, mask=inside)
    v = v.to(tl.float32)
    mean = tl.sum(v, 1) / C
    v = tl.where(inside, v - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(v * v, 1) / C + eps)
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)[None]
    v = v * rstd[:, None] * w + tl.load(bias + col, mask=mask, other=0.0).to(tl.float32)[None]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)
    tl.store(stats + 2 * row, mean, mask=row < M)
    tl.store(stats + 2 * row + 1, rstd, mask=row < M)


@triton.jit
def layer_norm_backward(
    x, dy, carried, weight, bias, stats, dx, y, sums, M, C, rows,
    CARRIED: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dx with the carried gradient, y again, and sums [program, 3, c]: dweight, dbias, dshift."""
    program, col = tl.program_id(0), tl.arange(0, K)
    mask = col < C
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)[None]
    b = tl.load(bias + col, mask=mask, other=0.0).to(tl.float32)[None]
    dw, db, ds = tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32)
    for start in range(program * rows, min((program + 1) * rows, M), R):
        row = start + tl.arange(0, R)
        at = row.to(tl.int64)[:, None] * C + col[None]
        inside = (row < M)[:, None] & mask[None]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats + 2 * row, mask=row < M, other=0.0)[:, None]
        rstd = tl.load(stats + 2 * row + 1, mask=row < M, other=0.0)[:, None]  # beyond m all is zero
        v = (v - mean) * rstd
        tl.store(y + at, (v * w + b).to(y.dtype.element_ty), mask=inside)
        dw += d * v
        db += d
        d *= w
        d = rstd * (d - (tl.sum(d, 1) / C)[:, None] - v * (tl.sum(d * v, 1) / C)[:, None])
        if CARRIED:
            d += tl.load(carried + at, mask=inside, other=0.0).to(tl.float32)
        ds += d
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    to = sums + program * 3 * C + col
    tl.store(to, tl.sum(dw, 0), mask=mask)
    tl.store(to + C, tl.sum(db, 0), mask=mask)
    tl.store(to + 2 * C, tl.sum(ds, 0), mask=mask)


@triton.jit
def _normal(x):
    """Distribution function and density of the normal distribution, to 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    e = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.231641888 * tl.abs(x))
    tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * e
    return tl.where(x > 0, 1 - tail, tail), 0.3989422804014327 * e


@triton.jit
def _gated(p, bias, row, col, M, W):
    """value and gate of p + bias, p [m, 2 w]; and where in p they lie."""
    at = row.to(tl.int64)[:, None] * (2 * W) + col[None]
    mask = col < W
    inside = (row < M)[:, None] & mask[None]
    value = tl.load(p + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(p + at + W, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + col, mask=mask, other=0.0).to(tl.float32)[None]
    gate += tl.load(bias + W + col, mask=mask, other=0.0).to(tl.float32)[None]
    return value, gate, at, inside


@triton.jit
def geglu(p, bias, y, M, W, R: tl.constexpr, K: tl.constexpr):
    row, col = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * K + tl.arange(0, K)
    value, gate, _, inside = _gated(p, bias, row, col, M, W)
    cdf, _ = _normal(gate)
    at = row.to(tl.int64)[:, None] * W + col[None]
    tl.store(y + at, (value * gate * cdf).to(y.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward(p, bias, dy, dp, y, sums, M, W, rows, R: tl.constexpr, K: tl.constexpr):
    """dp, y again, and sums [chunk, 2 w] of dp."""
    chunk, col = tl.program_id(0), tl.program_id(1) * K + tl.arange(0, K)
    one, two = tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32)
    for start in range(chunk * rows, min((chunk + 1) * rows, M), R):
        row = start + tl.arange(0, R)
        value, gate, at, inside = _gated(p, bias, row, col, M, W)
        narrow = row.to(tl.int64)[:, None] * W + col[None]
        d = tl.load(dy + narrow, mask=inside, other=0.0).to(tl.float32)
        cdf, density = _normal(gate)
        gelu = gate * cdf
        tl.store(y + narrow, (value * gelu).to(y.dtype.element_ty), mask=inside)
        dvalue, dgate = d * gelu, d * value * (cdf + gate * density)
        tl.store(dp + at, dvalue.to(dp.dtype.element_ty), mask=inside)
        tl.store(dp + at + W, dgate.to(dp.dtype.element_ty), mask=inside)
        one += dvalue
        two += dgate
    to = sums + chunk * 2 * W + col
    tl.store(to, tl.sum(one, 0), mask=col < W)
    tl.store(to + W, tl.sum(two, 0), mask=col < W)


@triton.jit
def add(x, h, shift, y, M, C, R: tl.constexpr, K: tl.constexpr):
    row, col = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * K + tl.arange(0, K)
    at = row.to(tl.int64)[:, None] * C + col[None]
    inside = (row < M)[:, None] & (col < C)[None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(shift + col, mask=col < C, other=0.0).to(tl.float32)[None]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)
