"""The parts of the spatio-temporal block (paper 3.2, Fig. 3): convolution and attention, over space and over time.

b batch, f frames, h w latent height and width, c channels, e time embedding, l text tokens, k text width; where axes
are folded, n is b or b*f, i j positions of a sequence, s sequences side by side.

Between the parts a video is one contiguous buffer [b, f, h, w, c]. It is channels-last for spatial convolutions, as
b*f images of h x w, and for temporal ones, as b images of f x (h*w); so nothing is copied on the way from one to the
other. Attributes are named so that the state dict has the keys and shapes of diffusers' UNet3DConditionModel.

Every residual is zero at the start. That the spatial ones are too, as in ModelScope's code, matters only when training
from scratch; diffusers zeroes the last temporal convolution alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSFORMER_EPS = 1e-6
MAX_HEADS = 65_535  # of a CUDA grid axis; a video of 256 x 256 pixels has 8,192 in the initial block, over time


def zero(module: nn.Module) -> nn.Module:
    """Sets all parameters of `module` to 0, in place."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group normalisation of [n, ..., c] with statistics over all axes between: n = b*f is per frame, n = b joint."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0], -1, 1, x.shape[-1]).movedim(-1, 1)  # [n, c, positions, 1], channels-last
        return super().forward(y).movedim(1, -1).reshape(x.shape)


class SpatialConv(nn.Conv2d):
    """Convolution of images [n, h, w, c] (paper 3.2, Fig. 4a)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class TemporalConv(nn.Conv3d):
    """Convolution of videos [b, f, h, w, c] over three frames (paper 3.2, Fig. 4a), zeros beyond the first and last.

    The kernel is stored as [o, i, 3, 1, 1] and applied as [o, i, 3, 1] to b images of f x (h*w).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2, 3).movedim(-1, 1)  # [b, c, f, h*w], channels-last
        y = F.conv2d(y, self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return y.movedim(1, -1).reshape(x.shape)


class ResnetBlock(nn.Module):
    """Two spatial convolutions, frame by frame, with the timestep added between them."""

    def __init__(self, channels_in: int, channels: int, time_width: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in)
        self.conv1 = SpatialConv(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, channels)
        self.norm2 = GroupNorm(groups, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(SpatialConv(channels, channels, 3, padding=1))
        self.conv_shortcut = nn.Identity() if channels_in == channels else SpatialConv(channels_in, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [b, f, h, w, c_in], time [b, e] (after its activation) -> [b, f, h, w, c]."""
        images = x.flatten(0, 1)  # [b*f, h, w, c]
        y = self.conv1(F.silu(self.norm1(images)))
        y = y.unflatten(0, x.shape[:2]) + self.time_emb_proj(time)[:, None, None, None]
        y = self.conv2(self.dropout(F.silu(self.norm2(y.flatten(0, 1)))))
        return (self.conv_shortcut(images) + y).unflatten(0, x.shape[:2])


class TemporalConvBlock(nn.Module):
    """Four temporal convolutions as one residual (paper 3.2, N2 = 4); norms are joint over all frames.

    Differs: the paper speaks of a receptive field of 81 frames; four kernels of 3 see 9.
    """

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()

        def stage(*layers: nn.Module) -> nn.Module:
            return nn.Sequential(GroupNorm(groups, channels), nn.SiLU(), *layers)

        self.conv1 = stage(TemporalConv(channels))
        self.conv2 = stage(nn.Dropout(dropout), TemporalConv(channels))
        self.conv3 = stage(nn.Dropout(dropout), TemporalConv(channels))
        self.conv4 = stage(nn.Dropout(dropout), zero(TemporalConv(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, f, h, w, c] -> the same shape."""
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [n, heads, i, d] to k and v [n, heads, j, d], in calls of at most MAX_HEADS heads."""
    if k.shape[2] == 1:  # one number's softmax is 1; q and k keep gradients, and flash would leave rounding in them
        return v + 0 * (q + k)
    calls = zip(*(x.split(MAX_HEADS, dim=1) for x in (q, k, v)), strict=True)
    results = [F.scaled_dot_product_attention(*call) for call in calls]
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


class Attention(nn.Module):
    """Multi-head attention (paper 3.2, Fig. 4b) along one axis of several sequences that lie side by side."""

    def __init__(self, channels: int, source_width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_width, channels, bias=False)
        self.to_v = nn.Linear(source_width, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Positions i of x [n, i, s, c] read positions j of source [n, j, s, k], each of the s sequences its own.

        The sequences count as further heads, which leaves q, k and v where they are.
        """
        q, k, v = (self._heads(y) for y in (self.to_q(x), self.to_k(source), self.to_v(source)))
        return self.to_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [n, s*heads, i, head_dim]


class GEGLU(nn.Module):
    """Linear layer to twice the width, of which one half, through a GELU, gates the other."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward layer of four times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, a second attention (to the text if it has a width, else to itself), feed-forward.

    Differs: the paper names the cross-attention first; the public code runs self-attention first.
    """

    def __init__(self, channels: int, head_dim: int, text_width: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, head_dim)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, text_width or channels, head_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """x [n, i, s, c], text [b, l, k] with n a multiple of b -> the shape of x."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        y = self.norm2(x)
        if text is None:
            x = x + self.attn2(y, y)
        else:  # all frames of a clip read the same text: they are one long row of queries
            y = y.reshape(text.shape[0], -1, 1, y.shape[-1])  # [b, f*h*w, 1, c]
            x = x + self.attn2(y, text.unsqueeze(2)).reshape(x.shape)
        return x + self.ff(self.norm3(x))


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
        y = self.proj_in(self.norm(x))
        for block in self.transformer_blocks:
            y = block(y, text)
        return x + self.proj_out(y)


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
