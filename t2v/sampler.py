"""From noise and text to latents: classifier-free guidance around a diffusers scheduler (paper 3.1, 4.1.2).

b batch, c channels, f frames, h w latent height and width, l text tokens, k text width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2v.config import SampleConfig
from t2v.diffusion import Diffusion
from t2v.frozen import make_scheduler


def start_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise [b, c, f, h, w] of `shape` (c, f, h, w) for each seed, the same on every machine and in every batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    unet: nn.Module,
    text: Tensor,
    empty_text: Tensor,
    shape: Sequence[int],
    seeds: Sequence[int],
    config: SampleConfig,
    diffusion: Diffusion,
) -> Tensor:
    """Latents [b, c, f, h, w] for the texts [b, l, k], one seed each, on the device of the text.

    The UNet, in eval mode (ValueError if not), gets its input in the text's dtype; all else is fp32. `shape` is
    (c, f, h, w); `empty_text` [1, l, k] is what guidance leads away from.
    """
    if unet.training:
        raise ValueError("unet: is in training mode, its dropout would act; call eval() first")
    if len(seeds) != len(text):
        raise ValueError(f"seeds: {len(seeds)} for {len(text)} texts")
    scheduler = make_scheduler(diffusion.config, config.sampler, config.steps)
    latents = start_noise(seeds, shape).to(text.device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise = _predict(unet, latents, timestep, text, empty_text, config.guidance)
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def _predict(
    unet: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor, empty_text: Tensor, guidance: float
) -> Tensor:
    """Predicted noise u + guidance * (y - u), u without text and y with it, in one batch of two; guidance 1 is y."""
    if guidance != 1:
        latents = torch.cat([latents, latents])
        text = torch.cat([empty_text.expand_as(text), text])
    timesteps = timestep.to(text.device).expand(len(latents))
    noise = unet(latents.to(text.dtype), timesteps, text).float()
    if guidance == 1:
        return noise
    without, given = noise.chunk(2)
    return without + guidance * (given - without)
