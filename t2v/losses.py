"""The loss of a batch, and what is told of losses: their mean in each stream and in each quarter of the timesteps.

b samples, c channels, f frames, h w latent size, l tokens, d text width.
"""

import torch
from torch import Tensor

from t2v.config import Stream
from t2v.feed import Batch
from t2v.frozen import TextEncoder
from t2v.job import STREAMS

BUCKETS = 4  # into which timesteps are divided where losses are told apart


def loss_inputs(
    batch: Batch, scale: float, text: TextEncoder, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What Diffusion.loss takes beside the UNet, which computes in `dtype`: latents, text, timesteps and noise.

    `scale` brings latents to unit variance. All chance is the batch's own.
    """
    draw = batch.draw
    latents = batch.mean.to(device, non_blocking=True).float()  # b c f h w
    if batch.logvar is not None:
        deviation = (0.5 * batch.logvar.to(device, non_blocking=True).float()).exp()
        latents += deviation * draw.posterior_noise.to(device, non_blocking=True)
    latents *= scale
    states = text.encode(draw.kept(batch.captions)).to(dtype)  # b l d
    noise, timesteps = draw.noise.to(device, non_blocking=True), draw.timesteps.to(device, non_blocking=True)
    return latents, states, timesteps, noise


def add_losses(tally: Tensor, stream: Stream, losses: Tensor, timesteps: Tensor, of: int) -> None:
    """Adds losses [b] at timesteps [b], out of `of`, to sums and numbers: fp32 [streams * BUCKETS or more, 2]."""
    row = STREAMS.index(stream) * BUCKETS + timesteps * BUCKETS // of
    tally.index_add_(0, row, torch.stack([losses.detach(), torch.ones_like(losses)], 1))


def first_timestep(bucket: int, of: int) -> int:
    """Where a quarter of `of` timesteps begins."""
    return -(-of * bucket // BUCKETS)


def losses_of(tally: Tensor, name: str, of: int) -> dict[str, float]:
    """Mean loss of each stream, and in each quarter of `of` timesteps: NAME_videos, NAME_videos_t250, ..."""
    means = {}
    for stream, rows in zip(STREAMS, tally.view(len(STREAMS), BUCKETS, 2), strict=True):
        total, number = rows.sum(0).tolist()
        means[f"{name}_{stream}"] = total / number
        for bucket, (total, number) in enumerate(rows.tolist()):
            if number:
                means[f"{name}_{stream}_t{first_timestep(bucket, of):03}"] = total / number
    return means
