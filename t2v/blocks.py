"""The parts of the spatio-temporal block (paper 3.2, Fig. 3): convolution and attention, over space and over time.

b batch, f frames, h w latent height and width, c channels, e time embedding, l text tokens, k text width; where axes
are folded, n is b or b*f, i j positions of a sequence, s sequences side by side.

Between the parts a video is one contiguous buffer [b, f, h, w, c]. It is channels-last for spatial convolutions, as
b*f images of h x w, and for temporal ones, as b images of f x (h*w); so nothing is copied on the way from one to the
other. Attributes are named so that the state dict has the keys and shapes of diffusers' UNet3DConditionModel.

Every convolution and matrix product that follows a norm is one step with it, its bias left to the reader of the
result: t2v/fused.py says why.

Every residual is zero at the start. That the spatial ones are too, as in ModelScope's code, matters only when training
from scratch; diffusers zeroes the last temporal convolution alone.
"""

import torch
from torch import Tensor, nn

from t2v import fused

TRANSFORMER_EPS = 1e-6


def zero(module: nn.Module) -> nn.Module:
    """Sets all parameters of `module` to 0, in place."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group normalisation of [n, ..., c] with statistics over all axes between: n = b*f is per frame, n = b joint."""

    def forward(
        self, x: Tensor, kernel: Tensor, shift: Tensor | None = None, silu: bool = True, dropout: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The product of the normalised x + shift with `kernel`, without bias; and x, to go on with beside it."""
        dropout = dropout if self.training else 0.0
        return fused.norm_product(x, shift, self.weight, self.bias, kernel, self.num_groups, self.eps, silu, dropout)


class LayerNorm(nn.LayerNorm):
    """Normalisation of every position of [..., c]."""

    def forward(self, x: Tensor, h: Tensor | None, shift: Tensor, *kernels: Tensor) -> tuple[Tensor, ...]:
        """The products of the normalised x + h + shift with `kernels`, without biases; and x + h + shift."""
        return fused.layer_norm_products(x, h, shift, self.weight, self.bias, self.eps, *kernels)


class SpatialConv(nn.Conv2d):
    """Convolution of images [n, h, w, c] (paper 3.2, Fig. 4a)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class TemporalConv(nn.Conv3d):
    """Convolution of videos over three frames (paper 3.2, Fig. 4a), zeros beyond the first and last."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def kernel(self, frames: int) -> Tensor:
        """For b images of f x (h*w): [o, i, 3, 1]; of a single frame only the middle acts: [o, i]."""
        return self.weight[:, :, 1, 0, 0] if frames == 1 else self.weight.squeeze(-1)


class ResnetBlock(nn.Module):
    """Two spatial convolutions, frame by frame, with the timestep added between them."""

    def __init__(self, channels_in: int, channels: int, time_width: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in)
        self.conv1 = SpatialConv(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, channels)
        self.norm2 = GroupNorm(groups, channels)
        self.dropout = dropout
        self.conv2 = zero(SpatialConv(channels, channels, 3, padding=1))
        self.conv_shortcut = None if channels_in == channels else SpatialConv(channels_in, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [b, f, h, w, c_in], time [b, e] (after its activation) -> [b, f, h, w, c]."""
        y, images = self.norm1(x.flatten(0, 1), self.conv1.weight)  # [b*f, h, w, c]
        shift = self.time_emb_proj(time) + self.conv1.bias  # [b, c]
        y, _ = self.norm2(y, self.conv2.weight, shift, dropout=self.dropout)
        bias = self.conv2.bias
        if self.conv_shortcut is not None:
            images = fused.product(images, self.conv_shortcut.weight.flatten(1))
            bias = bias + self.conv_shortcut.bias
        return fused.add(images, y, bias).unflatten(0, x.shape[:2])


class TemporalConvBlock(nn.Module):
    """Four temporal convolutions as one residual (paper 3.2, N2 = 4); norms are joint over all frames.

    Differs: the paper speaks of a receptive field of 81 frames; four kernels of 3 see 9.
    """

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()

        def stage(*layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(GroupNorm(groups, channels), nn.SiLU(), *layers)

        self.dropout = dropout
        self.conv1 = stage(TemporalConv(channels))
        self.conv2 = stage(nn.Dropout(dropout), TemporalConv(channels))
        self.conv3 = stage(nn.Dropout(dropout), TemporalConv(channels))
        self.conv4 = stage(nn.Dropout(dropout), zero(TemporalConv(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, f, h, w, c] -> the same shape."""
        frames = x.shape[1]
        norm, *_, conv = self.conv1
        y, carried = norm(x.flatten(2, 3), conv.kernel(frames))  # [b, f, h*w, c]
        for norm, _, _, following in (self.conv2, self.conv3, self.conv4):
            y, _ = norm(y, following.kernel(frames), conv.bias, dropout=self.dropout)
            conv = following
        return fused.add(carried, y, conv.bias).reshape(x.shape)


class Attention(nn.Module):
    """Multi-head attention (paper 3.2, Fig. 4b) along axis 1 of [n, i, s, c], of each of the s sequences.

    What it returns lacks the bias of `to_out`.
    """

    def __init__(self, channels: int, source_width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_width, channels, bias=False)
        self.to_v = nn.Linear(source_width, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def kernels(self, positions: int, over_time: bool) -> list[Tensor]:
        """The products of x that self-attention reads: q, k and v, over time as one; of a single position v alone."""
        q, k, v = self.to_q.weight, self.to_k.weight, self.to_v.weight
        if not over_time and positions > 1:
            return [q, k, v]
        return [torch.cat([q, k, v])[2 * q.shape[0] if positions == 1 else 0 :]]  # all get a gradient, if only zero

    def forward(self, *products: Tensor) -> Tensor:
        """The products of `kernels` -> [n, i, s, c]."""
        kernel = self.to_out[0].weight
        if len(products) == 3:
            q, k, v = (x.unflatten(-1, (-1, self.head_dim)).squeeze(2).transpose(1, 2) for x in products)
            return fused.product(fused.attention(q, k, v).transpose(1, 2).reshape(products[0].shape), kernel)
        (only,) = products
        if only.shape[1] == 1:  # whose softmax is 1
            return fused.product(only, kernel)
        return fused.temporal_attention_product(only, self.head_dim, kernel)

    def to_text(self, q: Tensor, text: Tensor) -> Tensor:
        """q [b*f, i, 1, c], text [b, l, k] -> [b*f, i, 1, c]; all frames of a clip read the same text."""
        k, v = self.to_k(text), self.to_v(text)
        y = q.reshape(text.shape[0], -1, q.shape[-1])
        return fused.cross_attention_product(y, k, v, self.head_dim, self.to_out[0].weight).reshape(q.shape)


class GEGLU(nn.Module):
    """Linear layer to twice the width, of which one half, through a GELU, gates the other."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)


class FeedForward(nn.Module):
    """Gated feed-forward layer of four times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))
        self.keep = True  # for the backward pass what the gate reads, eight times the width

    def forward(self, x: Tensor, h: Tensor, shift: Tensor, norm: nn.LayerNorm, out: nn.Linear) -> tuple[Tensor, Tensor]:
        """What `out` makes of y + feed_forward(norm(y)), y = x + h + shift, and the bias that it lacks."""
        widen, narrow = self.net[0].proj, self.net[2]
        y = fused.feed_forward_product(
            x,
            h,
            shift,
            (norm.weight, norm.bias, norm.eps),
            (widen.weight, widen.bias),
            out.weight @ narrow.weight,
            out.weight,
            self.keep,
        )
        return y, out.weight @ narrow.bias + out.bias


class TransformerBlock(nn.Module):
    """Self-attention, a second attention (to the text if it has a width, else to itself), feed-forward.

    Differs: the paper names the cross-attention first; the public code runs self-attention first.
    """

    def __init__(self, channels: int, head_dim: int, text_width: int | None) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = Attention(channels, channels, head_dim)
        self.norm2 = LayerNorm(channels)
        self.attn2 = Attention(channels, text_width or channels, head_dim)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, shift: Tensor, text: Tensor | None, out: nn.Linear) -> tuple[Tensor, Tensor]:
        """x [n, i, s, c], still without its shift [c], text [b, l, k] with n a multiple of b.

        Returns what `out` makes of the result, and the bias that it lacks: the last product of the feed-forward layer
        and `out` follow on each other, and so are one.
        """
        i, over_time = x.shape[1], text is None
        *products, x = self.norm1(x, None, shift, *self.attn1.kernels(i, over_time))
        h, shift = self.attn1(*products), self.attn1.to_out[0].bias
        if text is None:
            *products, x = self.norm2(x, h, shift, *self.attn2.kernels(i, over_time))
            h = self.attn2(*products)
        else:
            q, x = self.norm2(x, h, shift, self.attn2.to_q.weight)
            h = self.attn2.to_text(q, text)
        return self.ff(x, h, self.attn2.to_out[0].bias, self.norm3, out)


class Transformer(nn.Module):
    """Attention along axis 1 of [n, i, s, c], as a residual; the norm is joint over i and s.

    Over space: [b*f, h*w, 1, c] and the text; over time: [b, f, h*w, c] and no text (paper 3.2, N3 = N4 = 2). There is
    no position encoding: over time, order enters through the temporal convolutions alone.
    """

    def __init__(self, channels: int, inner: int, head_dim: int, groups: int, text_width: int | None = None) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=TRANSFORMER_EPS)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, head_dim, text_width)])
        self.proj_out = zero(nn.Linear(inner, channels))

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """x [n, i, s, c], text [b, l, k] -> the shape of x."""
        y, x = self.norm(x, self.proj_in.weight, silu=False)
        return fused.add(x, *self.transformer_blocks[0](y, self.proj_in.bias, text, self.proj_out))


class Downsample(nn.Module):
    """Halves h and w."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SpatialConv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, f, h, w, c] -> [b, f, h/2, w/2, c]."""
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Upsample(nn.Module):
    """Doubles h and w: every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SpatialConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, f, h, w, c] -> [b, f, 2h, 2w, c]."""
        b, f, h, w, c = x.shape
        y = x.reshape(b * f, h, 1, w, 1, c).expand(-1, -1, 2, -1, 2, -1)
        return self.conv(y.reshape(b * f, 2 * h, 2 * w, c)).unflatten(0, (b, f))
