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

    def kept(self, captions: Sequence[str]) -> list[str]:
        """The captions [b], '' in place of the dropped ones: what guidance will lead away from is learnt from it."""
        return ["" if drop else caption for drop, caption in zip(self.drop_caption.tolist(), captions, strict=True)]


def sample_generator(seed: int | str, index: int) -> torch.Generator:
    """Random numbers of one training sample, which depend on (seed, index) alone; a stream can be part of the seed.

    The engine takes 32 bits, so among hundreds of millions of samples some share theirs: each still has its own
    latents and caption.
    """
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def cumulated_alphas(config: DiffusionConfig) -> Tensor:
    """a_t of every timestep, fp64 [timesteps]: `scaled_linear`, or that with no signal left at the last one.

    The latter shifts and scales sqrt(a_t) so that its first value stays and its last is 0 (Lin et al., algorithm 1).
    """
    deviations = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
    alphas = (1 - deviations**2).cumprod(0)
    if not config.zero_terminal_snr:
        return alphas
    signal = alphas.sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2


def loss_weights(config: DiffusionConfig, alphas_cumprod: Tensor) -> Tensor:
    """Weight of each timestep's loss, fp64 [timesteps]: 1, or min-SNR's (Hang et al., 3.4) for SNR a_t / (1 - a_t).

    The weight min(SNR, gamma) of an error of z_0 is one of the noise's error divided by SNR, of v's by SNR + 1.
    """
    if config.min_snr_gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=config.min_snr_gamma) / (snr + 1 if config.prediction == "v" else snr)


class Diffusion:
    """Gaussian diffusion, by default with the `scaled_linear` schedule and noise as the target (paper 3.1)."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.alphas_cumprod = cumulated_alphas(config)
        weights = loss_weights(config, self.alphas_cumprod)
        self._table = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), weights]).float()
        self._on_device: dict[torch.device, Tensor] = {}

    def _at(self, timesteps: Tensor) -> Tensor:
        """sqrt(a_t), sqrt(1 - a_t) and the loss weight at timesteps [b], on their device: fp32 [3, b, 1, 1, 1, 1].

        The table is copied to a device once, because the host waits for the device in each such copy.
        """
        device = timesteps.device
        if device not in self._on_device:
            self._on_device[device] = self._table.to(device)
        return self._on_device[device][:, timesteps, None, None, None, None]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise, a_t the cumulated alphas: [b, c, f, h, w] at timesteps [b]."""
        signal, deviation, _ = self._at(timesteps)
        return signal * latents + deviation * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet is to predict, [b, c, f, h, w]: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) z_0."""
        if self.config.prediction == "eps":
            return noise
        signal, deviation, _ = self._at(timesteps)
        return signal * noise - deviation * latents

    def loss(
        self,
        unet: Callable[[Tensor, Tensor, Tensor], Tensor],
        latents: Tensor,
        text: Tensor,
        timesteps: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Squared error of the prediction, averaged over each sample's elements and weighted (paper eq. 5): fp32 [b].

        latents and noise [b, c, f, h, w], text [b, l, k], timesteps [b].
        """
        predicted = unet(self.add_noise(latents, noise, timesteps), timesteps, text)
        target = self.target(latents, noise, timesteps)
        weight = self._at(timesteps)[2].flatten()
        return weight * F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)

    def draw(self, seed: int | str, indices: Sequence[int], shape: Sequence[int]) -> Draw:
        """The draws of the training samples `indices` for latents of `shape` (c, f, h, w), on the CPU.

        Each sample's are those of its own generator: its batch, its rank and the order of calls do not matter. With
        offset noise the noise is no longer white: all of a channel of a frame share a part of it.
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
            if self.config.offset_noise:  # drawn last, so that all other draws are those without it
                noise[row] += self.config.offset_noise * torch.randn(*shape[:2], 1, 1, generator=generator)
        return Draw(timesteps, noise, posterior_noise, coins < self.config.caption_dropout)
