"""From noise and text to latents: classifier-free guidance around a diffusers scheduler (paper 3.1, 4.1.2).

b batch, c channels, f frames, h w latent height and width, l text tokens, k text width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2v.config import SampleConfig
from t2v.diffusion import Diffusion
from t2v.frozen import make_scheduler


def start_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise [b, c, f, h, w] of `shape` (c, f, h, w) for each seed, the same on every machine and in every batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Captured(nn.Module):
    """A UNet in eval mode on a GPU, as one CUDA graph for each shape that it meets: no kernel waits for Python.

    A graph reads and writes memory of its own, so inputs are copied there, and the result out of it.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.graphs: dict[tuple[torch.Size, ...], Any] = {}
        self.train(unet.training)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """As the UNet's, without gradients."""
        inputs = (latents, timesteps, text)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.graphs:  # a module would be changed in place, a function is not
            own = tuple(x.clone() for x in inputs)
            self.graphs[shapes] = torch.cuda.make_graphed_callables(lambda *x: self.unet(*x), own)
        return self.graphs[shapes](*inputs).clone()


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
    (c, f, h, w); `empty_text` [1, l, k], the states of '', is what guidance leads away from.
    """
    if unet.training:
        raise ValueError("unet: is in training mode, its dropout would act; call eval() first")
    if len(seeds) != len(text):
        raise ValueError(f"seeds: {len(seeds)} for {len(text)} texts")
    scheduler = make_scheduler(diffusion.config, config.sampler, config.steps)
    latents = start_noise(seeds, shape).to(text.device) * scheduler.init_noise_sigma
    if config.guidance != 1:
        text = torch.cat([empty_text.expand_as(text), text])  # 2b l k
    # A scheduler looks its tables up on the CPU: with timesteps on the GPU (set_timesteps(device=...)) each step would
    # wait for the GPU to read one back. The UNet's own are copied there once, because such a copy waits as well. UniPC
    # still waits, in diffusers: it copies its noise levels at each step and solves its corrector's equations there.
    for timestep, unets in zip(scheduler.timesteps, scheduler.timesteps.to(text.device), strict=True):
        predicted = _predict(unet, latents, unets, text, config.guidance)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


def _predict(unet: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor, guidance: float) -> Tensor:
    """Predicted noise, or velocity, u + guidance * (y - u): u without text and y with it, in one batch of two.

    latents [b, c, f, h, w], text [2b, l, k]: without, then with. Guidance 1 is y alone, of text [b, l, k].
    """
    predicted = unet(latents.to(text.dtype), timestep.expand(len(latents)), text).float()
    if guidance == 1:
        return predicted
    without, given = predicted.chunk(2)
    return without + guidance * (given - without)
