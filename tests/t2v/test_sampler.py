import pytest
import torch
from torch import nn

from t2v.config import DiffusionConfig, SampleConfig
from t2v.diffusion import Diffusion
from t2v.sampler import sample, start_noise

SHAPE = (4, 3, 4, 4)
DIFFUSION = Diffusion(DiffusionConfig())
SAMPLERS = ["ddim", "dpm++", "unipc"]


class Oracle(nn.Module):
    """Knows that all data is one point, and so what the noise is; keeps what it was asked."""

    def __init__(self, point: torch.Tensor) -> None:
        super().__init__()
        self.point = point
        self.calls: list[tuple[int, int]] = []

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(latents), int(timesteps[0])))
        alphas = DIFFUSION.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1, 1)
        return (latents - alphas.sqrt() * self.point) / (1 - alphas).sqrt()


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))


def test_ddim_takes_the_published_steps(text):
    oracle = Oracle(torch.zeros(SHAPE)).eval()
    sample(oracle, text, text[:1], SHAPE, [0, 1, 2], SampleConfig(steps=50), DIFFUSION)
    assert oracle.calls == [(6, timestep) for timestep in range(981, 0, -20)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_perfect_predictions_every_sampler_finds_the_data(sampler, text):
    point = torch.randn(SHAPE)
    config = SampleConfig(sampler=sampler, steps=20)
    latents = sample(Oracle(point).eval(), text, text[:1], SHAPE, [0, 1, 2], config, DIFFUSION)
    left = (1 - DIFFUSION.alphas_cumprod[0]).sqrt()  # the last step ends at t = 0, where some noise is left
    assert (latents - point).square().mean().sqrt() < 1.5 * left


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_video_does_not_depend_on_its_batch(sampler, text, tiny_unet):
    config, seeds = SampleConfig(sampler=sampler, steps=4, guidance=3), [5, 2**40, 5]
    together = sample(tiny_unet, text, text[:1], SHAPE, seeds, config, DIFFUSION)
    for row, seed in enumerate(seeds):
        alone = sample(tiny_unet, text[[row]], text[:1], SHAPE, [seed], config, DIFFUSION)
        assert torch.allclose(alone[0], together[row], rtol=1e-3, atol=1e-3 * together.abs().max())
    assert not torch.allclose(together[0], together[2])  # one seed, two texts


def test_start_noise_is_each_seeds_own():
    noise = start_noise([1, 2, 1], SHAPE)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)))


def test_guidance_of_one_is_the_text_alone(text, tiny_unet):
    def latents(guidance: float, empty_text: torch.Tensor) -> torch.Tensor:
        config = SampleConfig(steps=3, guidance=guidance)
        return sample(tiny_unet, text, empty_text, SHAPE, [0, 1, 2], config, DIFFUSION)

    alone = latents(1, text[:1])
    assert torch.equal(alone, latents(1, text[1:2]))
    assert torch.allclose(alone, latents(1 + 1e-6, text[:1]), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(alone, latents(3, text[:1]), rtol=1e-3, atol=1e-3)


def test_wrong_calls_are_refused(text, tiny_unet):
    with pytest.raises(ValueError, match="2 for 3 texts"):
        sample(tiny_unet, text, text[:1], SHAPE, [0, 1], SampleConfig(), DIFFUSION)
    with pytest.raises(ValueError, match="training mode"):
        sample(tiny_unet.train(), text, text[:1], SHAPE, [0, 1, 2], SampleConfig(), DIFFUSION)
