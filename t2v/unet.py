"""The denoising UNet (paper 3.1, eq. 4; 3.2): an initial block, levels going down, a middle, levels going up.

b batch, f frames, h w latent height and width, c channels, e time embedding, l text tokens, k text width.

Only the maths: device, precision, compilation and sharding are applied from outside. At the start every temporal part
is the identity, so that with the weights of an image UNet (Stable Diffusion 2.1) it acts on each frame as that does.

Parameters get their gradients in one order, whatever the number of frames: ZeRO reduces them as they come, and in
multi-frame training (paper 3.3) some ranks have images while others have videos. A test holds to it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.blocks import Downsample, GroupNorm, ResnetBlock, SpatialConv, TemporalConvBlock, Transformer, Upsample
from t2v.config import UNetConfig

HEADS_IN = 8  # of the initial block's attention, whatever its width


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Timesteps [b] as cosines and sines of width/2 frequencies from 1 down to nearly 1/10,000: fp32 [b, width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """The timestep as a vector, ready for the residual blocks."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps [b] -> [b, e], with the activation that every residual block would begin with."""
        x = sinusoids(timesteps, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(x))))


class Level(nn.Module):
    """The spatio-temporal blocks of one resolution (paper Fig. 3), and the step to the next one.

    One block for each of `channels_in`; the first `attentions` of them attend. `change` follows the last.
    """

    def __init__(self, config: UNetConfig, channels_in: list[int], channels: int, attentions: int) -> None:
        super().__init__()
        groups, head_dim, time_width = config.norm_groups, config.head_dim, 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(width, channels, time_width, groups, config.dropout) for width in channels_in
        )
        self.temp_convs = nn.ModuleList(TemporalConvBlock(channels, groups, config.dropout) for _ in channels_in)
        self.attentions = nn.ModuleList(
            Transformer(channels, channels, head_dim, groups, config.text_dim) for _ in range(attentions)
        )
        self.temp_attentions = nn.ModuleList(
            Transformer(channels, channels, head_dim, groups) for _ in range(attentions)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor, time: Tensor, text: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        """The output of each block and of the step to the next level; `skips` are joined to the blocks' inputs.

        x [b, f, h, w, c], time [b, e], text [b, l, k], skips [b, f, h, w, *]; what has not met a text yet may have
        fewer rows, and is repeated when it does.
        """
        outputs = []
        for index, (resnet, temporal_conv) in enumerate(zip(self.resnets, self.temp_convs, strict=True)):
            if skips is not None:
                x = torch.cat([x, _repeated(skips[index], len(x))], dim=-1)
            x = temporal_conv(resnet(x, time[: len(x)]))
            if index < len(self.attentions):
                x = _repeated(x, len(text))
                b, f, h, w, c = x.shape
                x = self.attentions[index](x.reshape(b * f, h * w, 1, c), text)
                x = self.temp_attentions[index](x.reshape(b, f, h * w, c)).reshape(b, f, h, w, c)
            outputs.append(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            outputs.append(resample(outputs[-1]))
        return outputs


def _repeated(x: Tensor, rows: int) -> Tensor:
    """x [b, ...] as often as it takes to `rows`, a multiple of b."""
    return x if len(x) == rows else x.repeat(rows // len(x), *[1] * (x.ndim - 1))


class UNet(nn.Module):
    """Predicts the noise in noisy latents at a timestep, given the text (paper eq. 4)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_groups
        first, deepest = widths[0], len(widths) - 1
        self.conv_in = SpatialConv(config.channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, 4 * first)
        self.transformer_in = Transformer(first, HEADS_IN * config.head_dim, config.head_dim, groups)

        skips = [first]  # widths of what goes to the way up, in the order of making
        self.down_blocks = nn.ModuleList()
        for index, width in enumerate(widths):
            level = Level(config, [skips[-1]] + [width] * (layers - 1), width, layers if index < deepest else 0)
            skips += [width] * layers
            if index < deepest:
                level.downsamplers.append(Downsample(width))
                skips.append(width)
            self.down_blocks.append(level)

        self.mid_block = Level(config, [widths[-1]] * 2, widths[-1], attentions=1)

        below = widths[-1]
        self.up_blocks = nn.ModuleList()
        for index, width in reversed(list(enumerate(widths))):
            channels_in = [joined + skips.pop() for joined in [below] + [width] * layers]
            level = Level(config, channels_in, width, layers + 1 if index < deepest else 0)
            if index > 0:
                level.upsamplers.append(Upsample(width))
            self.up_blocks.append(level)
            below = width

        self.conv_norm_out = GroupNorm(groups, first)
        self.conv_out = SpatialConv(first, config.channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """latents [b, c, f, h, w], timesteps [b], text [b, l, k] -> noise [b, c, f, h, w].

        Any number of frames; h and w must be divisible by 2 for every level but one (ValueError). Texts may be several
        times as many as latents, first one for each, then another for each (guidance): so is the noise, and what
        comes before the first text is computed once.
        """
        self._check(latents, timesteps, text)
        time = _repeated(self.time_embedding(timesteps), len(text))  # [b, e]
        x = latents.movedim(1, -1)  # [b, f, h, w, c]
        x = self.conv_in(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        b, f, h, w, c = x.shape
        x = self.transformer_in(x.reshape(b, f, h * w, c)).reshape(b, f, h, w, c)

        skips = [x]
        for level in self.down_blocks:
            skips += level(skips[-1], time, text)
        x = self.mid_block(skips[-1], time, text)[-1]
        for level in self.up_blocks:
            x = level(x, time, text, [skips.pop() for _ in range(self.config.layers_per_block + 1)])[-1]

        images, _ = self.conv_norm_out(x.flatten(0, 1), self.conv_out.weight)  # [b*f, h, w, c]
        return (images + self.conv_out.bias).unflatten(0, (-1, f)).movedim(-1, 1)

    def _check(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.channels:
            raise ValueError(f"latents: {tuple(latents.shape)} is not [b, {self.config.channels}, f, h, w]")
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        if latents.shape[3] % factor or latents.shape[4] % factor:
            raise ValueError(
                f"latents: height and width {tuple(latents.shape[3:])} must be multiples of {factor}, for the UNet has "
                f"{len(self.config.block_out_channels)} levels; choose a size in pixels that {8 * factor} divides"
            )
        if timesteps.shape != latents.shape[:1]:
            raise ValueError(f"timesteps: {tuple(timesteps.shape)} is not [{latents.shape[0]}], one for each video")
        if text.ndim != 3 or text.shape[0] % latents.shape[0] or text.shape[2] != self.config.text_dim:
            wanted = f"[{latents.shape[0]}, l, {self.config.text_dim}]"
            raise ValueError(f"text: {tuple(text.shape)} is not {wanted}, or several times as many")
