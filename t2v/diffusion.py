"""The forward process and the training target (paper 3.1, eq. 5), and the random numbers of a training sample.

b batch, c channels, f frames, h w latent height and width, l text tokens, k text width.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.config import DiffusionConfig


class Draw(NamedTuple):
    """What chance decides for a batch: timesteps [b], two noises [b, c, f, h, w], which captions to drop [b]."""

    timesteps: Tensor
    noise: Tensor
    posterior_noise: Tensor
    drop_caption: Tensor


def sample_generator(seed: int | str, index: int) -> torch.Generator:
    """Random numbers of one training sample, which depend on (seed, index) alone; a stream can be part of the seed.

    The engine takes 32 bits, so among hundreds of millions of samples some share theirs: each still has its own
    latents and caption.
    """
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Diffusion:
    """Gaussian diffusion with the `scaled_linear` schedule and noise as the target (paper 3.1)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
        self.alphas_cumprod = (1 - roots**2).cumprod(0)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise, a_t the cumulated alphas: [b, c, f, h, w] at timesteps [b]."""
        signal, deviation = (
            table.to(latents)[timesteps].view(-1, 1, 1, 1, 1)
            for table in (self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt())
        )
        return signal * latents + deviation * noise

    def loss(
        self,
        unet: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        text: Tensor,
        timesteps: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Squared error of the predicted noise, averaged over each sample's elements (paper eq. 5): fp32 [b].

        latents and noise [b, c, f, h, w], text [b, l, k], timesteps [b].
        """
        predicted = unet(self.add_noise(latents, noise, timesteps), timesteps, text)
        return F.mse_loss(predicted.float(), noise.float(), reduction="none").flatten(1).mean(1)

    def draw(self, seed: int | str, indices: Sequence[int], shape: Sequence[int]) -> Draw:
        """The draws of the training samples `indices` for latents of `shape` (c, f, h, w), on the CPU.

        Each sample's are those of its own generator: its batch, its rank and the order of calls do not matter.
        """
        b = len(indices)
        timesteps, coins = torch.empty(b, dtype=torch.int64), torch.empty(b)
        noise, posterior_noise = torch.empty(b, *shape), torch.empty(b, *shape)
        for row, index in enumerate(indices):
            generator = sample_generator(seed, index)
            timesteps[row].random_(0, self.config.timesteps, generator=generator)
            coins[row].uniform_(generator=generator)
            noise[row].normal_(generator=generator)
            posterior_noise[row].normal_(generator=generator)
        return Draw(timesteps, noise, posterior_noise, coins < self.config.caption_dropout)
