import pytest
import torch
from diffusers import DDPMScheduler

from t2v.config import DiffusionConfig
from t2v.diffusion import Diffusion, sample_generator

SHAPE = (4, 2, 4, 4)


@pytest.fixture
def diffusion() -> Diffusion:
    return Diffusion(DiffusionConfig())


def test_the_noise_schedule_is_the_published_one(diffusion):
    assert diffusion.alphas_cumprod.dtype == torch.float64
    expected = torch.tensor([0.99915, 0.9983, 0.00466], dtype=torch.float64)
    assert torch.allclose(diffusion.alphas_cumprod[[0, 1, 999]], expected, rtol=0, atol=6e-6)


def test_added_noise_equals_diffusers(diffusion):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    theirs = scheduler.add_noise(latents, noise, timesteps)
    assert torch.allclose(diffusion.add_noise(latents, noise, timesteps), theirs, atol=1e-6)


def test_the_loss_is_the_mean_squared_error_of_each_sample(diffusion):
    latents, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    offset, text = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1), torch.zeros(3, 7, 8)

    def unet(noisy, at, given):
        assert torch.equal(noisy, diffusion.add_noise(latents, noise, timesteps)) and at is timesteps and given is text
        return (noise + offset).bfloat16()

    loss = diffusion.loss(unet, latents, text, timesteps, noise)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.tensor([0.0, 1.0, 4.0]), atol=0.02)


def test_draws_depend_on_the_sample_alone(diffusion):
    together = diffusion.draw(7, [3, 11, 500_000_000], SHAPE)
    for row, index in enumerate([3, 11, 500_000_000]):
        alone = diffusion.draw(7, [index], SHAPE)
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True))
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(together.noise, together.posterior_noise)
    for other in (8, "7 images"):
        assert not torch.equal(diffusion.draw(other, [3], SHAPE).noise[0], together.noise[0])


def test_timestep_and_coin_do_not_depend_on_the_latent_size(diffusion):
    small, large = diffusion.draw(0, range(50), (4, 1, 2, 2)), diffusion.draw(0, range(50), (4, 16, 4, 4))
    assert torch.equal(small.timesteps, large.timesteps)
    assert torch.equal(small.drop_caption, large.drop_caption)


def test_draws_are_the_same_on_every_machine(diffusion):
    assert sample_generator("0 videos", 5).initial_seed() == 1311062901
    assert diffusion.draw("0 videos", [5, 6], (1, 1, 1, 1)).timesteps.tolist() == [201, 391]


def test_draws_follow_their_distributions(diffusion):
    draw = diffusion.draw(1, range(4000), (1, 1, 4, 4))
    assert draw.timesteps.min() < 5 and draw.timesteps.max() > 994
    assert abs(draw.timesteps.float().mean() - 499.5) < 20
    assert abs(draw.drop_caption.float().mean() - 0.1) < 0.02
    for noise in (draw.noise, draw.posterior_noise):
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((draw.noise * draw.posterior_noise).mean()) < 0.02
