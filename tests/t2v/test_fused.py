"""The kernels against their plain twins, forward and backward, on Triton's interpreter where there is no GPU."""

import pytest
import torch

from t2v import fused
from t2v.config import UNetConfig
from t2v.unet import UNet
from tests.t2v.conftest import randomise
from tests.t2v.test_unet import inputs, order_of_gradients

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, 5e-2) if DEVICE == "cuda" else (torch.float16, 1e-2)  # the interpreter multiplies no bfloat16
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), HALF])


@pytest.fixture
def kernels(monkeypatch):
    """Makes the functions of t2v.fused take their kernels, also on a CPU."""

    def use() -> None:
        monkeypatch.setattr(fused, "_on_gpu", lambda x: x.dtype != torch.float64)
        monkeypatch.setattr(fused, "_attends", lambda x, head_dim: x.dtype != torch.float64)

    return use


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [one.to(DEVICE, dtype).requires_grad_() for one in made]


def compare(function, kernels, *shapes, tolerance=1e-5, dtype=torch.float32):
    """Values and gradients of the kernels in `dtype` against those of the twin in float64."""
    ours = tensors(*shapes, dtype=dtype)
    theirs = [x.detach().double().requires_grad_() for x in ours]
    expected = as_tuple(function(*theirs))
    weights = [torch.linspace(-1, 1, one.numel(), dtype=torch.float64, device=DEVICE).view_as(one) for one in expected]
    sum((one * weight).sum() for one, weight in zip(expected, weights, strict=True)).backward()
    kernels()
    found = as_tuple(function(*ours))
    sum((one * weight.to(dtype)).sum() for one, weight in zip(found, weights, strict=True)).backward()
    for one, other in zip((*found, *(x.grad for x in ours)), (*expected, *(x.grad for x in theirs)), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@PRECISIONS
@pytest.mark.parametrize(
    ("x", "groups", "kernel", "shifts", "silu"),
    [
        ((2, 9, 8, 64), 8, (16, 64, 3, 3), None, True),  # whole columns of tiles
        ((6, 3, 5, 40), 8, (24, 40, 3, 3), (2, 40), True),  # two clips of three frames; nothing divides a tile
        ((2, 5, 14, 72), 4, (72, 72, 3, 1), (72,), True),  # over time
        ((3, 4, 7, 40), 5, (16, 40), None, False),  # a matrix, without the activation
    ],
)
def test_group_norm_and_product(kernels, x, groups, kernel, shifts, silu, dtype, tolerance):
    def step(x, weight, bias, kernel, shift=None):
        return fused.norm_product(x, shift, weight, bias, kernel, groups, 1e-5, silu, 0.0)

    shapes = [x, x[-1:], x[-1:], kernel] + ([shifts] if shifts else [])
    compare(step, kernels, *shapes, tolerance=tolerance, dtype=dtype)


@PRECISIONS
@pytest.mark.parametrize(("m", "channels"), [(8, 64), (77, 40)])
@pytest.mark.parametrize("added", [True, False])
def test_layer_norm_and_product(kernels, m, channels, added, dtype, tolerance):
    def step(x, shift, weight, bias, kernel, h=None):
        return fused.layer_norm_products(x, h, shift, weight, bias, 1e-5, kernel, kernel[:16])

    shapes = [(m, channels), (channels,), (channels,), (channels,), (24, channels)]
    compare(step, kernels, *shapes, *([(m, channels)] if added else []), tolerance=tolerance, dtype=dtype)


@PRECISIONS
@pytest.mark.parametrize(("m", "width", "keep"), [(64, 64, True), (70, 40, False)])
def test_feed_forward_and_product(kernels, m, width, keep, dtype, tolerance):
    def step(x, h, shift, weight, bias, widen, widen_bias, kernel, beside):
        return fused.feed_forward_product(
            x, h, shift, (weight, bias, 1e-5), (widen / 8, widen_bias), kernel, beside, keep
        )

    x, row = (m, 24), (24,)
    shapes = x, x, row, row, row, (2 * width, 24), (2 * width,), (16, width), (16, 24)
    compare(step, kernels, *shapes, tolerance=tolerance, dtype=dtype)


@PRECISIONS
def test_add(kernels, dtype, tolerance):
    compare(fused.add, kernels, (2, 33, 40), (2, 33, 40), (40,), tolerance=tolerance, dtype=dtype)


@PRECISIONS
@pytest.mark.parametrize(("frames", "sequences", "head_dim"), [(16, 4, 64), (5, 7, 32)])
def test_attention_over_time_and_product(kernels, frames, sequences, head_dim, dtype, tolerance):
    def step(qkv, kernel):
        return fused.temporal_attention_product(qkv, head_dim, kernel)

    shapes = (2, frames, sequences, 3 * 2 * head_dim), (24, 2 * head_dim)
    compare(step, kernels, *shapes, tolerance=tolerance, dtype=dtype)


@PRECISIONS
@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(64, 128, 64), (77, 9, 16)])
def test_attention_to_few_keys_and_product(kernels, queries, keys, head_dim, dtype, tolerance):
    def step(q, k, v, kernel):
        return fused.cross_attention_product(q / 3, k, v, head_dim, kernel)

    width = 2 * head_dim
    shapes = (2, queries, width), (2, keys, width), (2, keys, width), (24, width)
    compare(step, kernels, *shapes, tolerance=tolerance, dtype=dtype)


def test_a_unet_of_kernels_gives_the_same_and_its_gradients_in_one_order(kernels):
    config = UNetConfig(block_out_channels=[16], layers_per_block=1, head_dim=16, text_dim=8, norm_groups=2, dropout=0)
    unet = randomise(UNet(config)).to(DEVICE)
    call = [x.to(DEVICE) for x in inputs(config, b=1, f=2)]
    (expected := unet(*call)).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in unet.parameters()]
    unet.zero_grad()
    kernels()
    (found := unet(*call)).square().sum().backward()
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    for parameter, gradient in zip(unet.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5
    if DEVICE == "cpu":  # where the inputs of test_unet.py lie
        assert order_of_gradients(unet, 1) == order_of_gradients(unet, 2)


def test_dropout_leaves_the_same_elements_in_both_passes(kernels):
    """With an identity for the product, what is dropped shows: those gradients are zero, the others scaled."""
    kernels()
    x, weight, bias = tensors((4, 50, 64), (64,), (64,), dtype=torch.float32)
    torch.manual_seed(3)
    y, _ = fused.norm_product(x, None, weight, bias, torch.eye(64, device=DEVICE), 8, 1e-5, False, 0.25)
    dropped = y == 0
    assert abs(dropped.float().mean() - 0.25) < 0.02
    whole, _ = fused.norm_product(x, None, weight, bias, torch.eye(64, device=DEVICE), 8, 1e-5, False, 0.0)
    assert torch.allclose(y[~dropped], whole[~dropped] / 0.75, atol=1e-5)
    (gradient,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.allclose(gradient, (~dropped).float().sum((0, 1)) / 0.75)
    torch.manual_seed(4)
    other, _ = fused.norm_product(x, None, weight, bias, torch.eye(64, device=DEVICE), 8, 1e-5, False, 0.25)
    assert abs(((other == 0) & dropped).float().mean() - 0.25**2) < 0.02
