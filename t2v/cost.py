"""What the UNet computes and what it keeps for its backward pass, in closed form: known before anything is loaded.

A sample is a clip of `frames` latents, or a picture, one frame. Products are counted as torch's FlopCounterMode counts
them, two operations for a multiplication and an addition; norms and activations are not. What is kept is what the steps
of t2v/recompute.py save on a GPU.

n positions of a sample, frames times pixels; c o channels, k inner width of a transformer, l tokens.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

from t2v.config import UNetConfig

HEADS_IN = 8  # of the initial block's attention, as in t2v/unet.py, which loads torch
NARROW, WIDE = 4, 8  # times a transformer's width: what its feed-forward layer narrows, and what its gate reads


@dataclass(frozen=True)
class Cost:
    """Of one sample: FLOPs of the forward pass, and how many numbers the backward pass needs, the gates' apart.

    `once` are numbers that are kept once a pass, whatever its samples: products of weights with each other.
    """

    forward: int = 0
    kept: int = 0
    gates: int = 0
    once: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))

    @property
    def flops(self) -> int:
        """Of a training step: the backward pass multiplies twice, by what went in and by the weights."""
        return 3 * self.forward


def unet_cost(config: UNetConfig, frames: int, size: int, tokens: int) -> Cost:
    """What one sample of `frames` latents, `size` x `size`, and a text of so many tokens costs."""
    return sum(_parts(config, frames, size, tokens), Cost(kept=tokens * config.text_dim))


def widest_tensor(config: UNetConfig, frames: int, size: int) -> int:
    """Numbers that a sample's tensor has at full resolution, where the backward pass begins."""
    return frames * size**2 * config.block_out_channels[0]


def _parts(config: UNetConfig, frames: int, size: int, tokens: int) -> Iterator[Cost]:
    """Walks the UNet as t2v/unet.py builds it."""
    widths, layers = config.block_out_channels, config.layers_per_block
    deepest = len(widths) - 1
    time_width = 4 * widths[0]

    def block(channels_in: int, channels: int, pixels: int, attends: bool) -> Cost:
        cost = _resnet(channels_in, channels, frames * pixels, time_width)
        cost += _temporal_convolutions(channels, frames, pixels)
        if attends:
            cost += _over_space(channels, frames, pixels, tokens, config.text_dim)
            cost += _over_time(channels, channels, frames, pixels)
        return cost

    pixels = [size**2 // 4**level for level in range(len(widths))]
    n = frames * pixels[0]
    yield _convolution(config.channels, widths[0], n) + Cost(kept=config.channels * n)
    yield Cost(_product(widths[0], time_width, 1) + _product(time_width, time_width, 1))
    yield _over_time(widths[0], HEADS_IN * config.head_dim, frames, pixels[0])
    skips = [widths[0]]
    for level, width in enumerate(widths):
        for channels_in in [skips[-1]] + [width] * (layers - 1):
            yield block(channels_in, width, pixels[level], level < deepest)
            skips.append(width)
        if level < deepest:
            kept = Cost(kept=width * frames * pixels[level])
            yield _convolution(width, width, frames * pixels[level + 1]) + kept
            skips.append(width)
    yield block(widths[-1], widths[-1], pixels[-1], True)
    yield _resnet(widths[-1], widths[-1], frames * pixels[-1], time_width)
    yield _temporal_convolutions(widths[-1], frames, pixels[-1])
    below = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for joined in [below] + [width] * layers:
            yield block(joined + skips.pop(), width, pixels[level], level < deepest)
        if level > 0:
            above = frames * pixels[level - 1]
            yield _convolution(width, width, above) + Cost(kept=width * above)
        below = width
    yield _convolution(widths[0], config.channels, n) + Cost(kept=widths[0] * n)


def _product(channels_in: int, channels: int, positions: int, taps: int = 1) -> int:
    return 2 * channels_in * channels * positions * taps


def _convolution(channels_in: int, channels: int, n: int) -> Cost:
    return Cost(_product(channels_in, channels, n, taps=9))


def _resnet(channels_in: int, channels: int, n: int, time_width: int) -> Cost:
    forward = _product(channels_in, channels, n, 9) + _product(channels, channels, n, 9)
    forward += _product(time_width, channels, 1)
    if channels_in != channels:
        forward += _product(channels_in, channels, n)
    return Cost(forward, n * (channels_in + channels))


def _temporal_convolutions(channels: int, frames: int, pixels: int) -> Cost:
    n = frames * pixels
    return Cost(4 * _product(channels, channels, n, taps=3 if frames > 1 else 1), 4 * n * channels)


def _over_space(c: int, frames: int, pixels: int, tokens: int, text_width: int) -> Cost:
    """Of attention to itself q, k, v and the result are kept, of attention to the text q, and k and v of the text."""
    n = frames * pixels
    attention = _product(c, 4 * c, n) + 2 * _product(c, pixels, n)
    to_text = _product(c, 2 * c, n) + _product(text_width, 2 * c, tokens) + 2 * _product(c, tokens, n)
    return _feed_forward(c, c, n) + Cost(attention + to_text, 5 * n * c + 2 * tokens * c)


def _over_time(c: int, k: int, frames: int, pixels: int) -> Cost:
    """Two attentions over the frames; of a single frame v is the result (t2v/blocks.py)."""
    n, projections = frames * pixels, 3 if frames > 1 else 1
    attention = _product(k, (projections + 1) * k, n)
    if frames > 1:
        attention += 2 * _product(k, frames, n)
    joined = 2 * 3 * k**2  # the weights of q, k and v, of which a single frame needs a part
    return _feed_forward(c, k, n) + Cost(2 * attention, 2 * projections * n * k, once=joined)


def _feed_forward(c: int, k: int, n: int) -> Cost:
    """With the way into the transformer and out of it, and what its four norms read."""
    forward = _product(c, k, n) + _product(k, WIDE * k, n) + _product(NARROW * k, c, n) + _product(k, c, n)
    return Cost(forward, n * (c + 3 * k), WIDE * n * k, NARROW * k * c)
