import pytest
import torch
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from t2v.config import DiffusionConfig, TextConfig
from t2v.diffusion import Diffusion, sample_generator
from t2v.frozen import load_text

SHAPE = (4, 2, 4, 4)
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = DiffusionConfig(prediction="v")
TERMINAL = DiffusionConfig(prediction="v", zero_terminal_snr=True)


@pytest.fixture
def diffusion() -> Diffusion:
    return Diffusion(DiffusionConfig())


def test_the_noise_schedule_is_the_published_one(diffusion):
    assert diffusion.alphas_cumprod.dtype == torch.float64
    expected = torch.tensor([0.99915, 0.9983, 0.00466], dtype=torch.float64)
    assert torch.allclose(diffusion.alphas_cumprod[[0, 1, 999]], expected, rtol=0, atol=6e-6)


def test_added_noise_equals_diffusers(diffusion):
    scheduler = DDPMScheduler(**SCALED_LINEAR)
    latents, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    theirs = scheduler.add_noise(latents, noise, timesteps)
    assert torch.allclose(diffusion.add_noise(latents, noise, timesteps), theirs, atol=1e-6)


def test_zero_terminal_snr_leaves_no_signal_at_the_last_timestep_and_all_of_the_first(diffusion):
    rescaled = Diffusion(TERMINAL)
    assert rescaled.alphas_cumprod[-1] == 0
    assert torch.allclose(rescaled.alphas_cumprod[0], diffusion.alphas_cumprod[0], rtol=1e-14, atol=0)
    theirs = DDPMScheduler(**SCALED_LINEAR, rescale_betas_zero_snr=True).alphas_cumprod.double()
    assert torch.allclose(rescaled.alphas_cumprod, theirs, rtol=0, atol=1e-6)
    latents, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    noisy = rescaled.add_noise(latents, noise, timesteps)  # what training sees
    assert torch.equal(noisy[2], noise[2])
    assert torch.equal(noisy[0], diffusion.add_noise(latents, noise, timesteps)[0])
    assert not torch.allclose(noisy[1], diffusion.add_noise(latents, noise, timesteps)[1], atol=1e-3)


@pytest.mark.parametrize("config", [V, TERMINAL])
def test_the_velocity_equals_diffusers(config):
    scheduler = DDPMScheduler(**SCALED_LINEAR, rescale_betas_zero_snr=config.zero_terminal_snr)
    latents, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    diffusion = Diffusion(config)
    assert torch.allclose(diffusion.target(latents, noise, timesteps), velocity, atol=1e-5)
    loss = diffusion.loss(lambda *_: velocity + 2, latents, torch.zeros(3, 7, 8), timesteps, noise)
    assert torch.allclose(loss, torch.full((3,), 4.0), atol=1e-4)


def test_the_loss_is_the_mean_squared_error_of_each_sample(diffusion):
    latents, noise, timesteps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    offset, text = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1), torch.zeros(3, 7, 8)

    def unet(noisy, at, given):
        assert torch.equal(noisy, diffusion.add_noise(latents, noise, timesteps)) and at is timesteps and given is text
        return (noise + offset).bfloat16()

    loss = diffusion.loss(unet, latents, text, timesteps, noise)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, torch.tensor([0.0, 1.0, 4.0]), atol=0.02)


@pytest.mark.parametrize("config", [DiffusionConfig(min_snr_gamma=5), DiffusionConfig(prediction="v", min_snr_gamma=5)])
def test_min_snr_weighs_every_target_as_the_same_error_of_the_data(config):
    """A model whose z_0 is off by 1 everywhere loses min(SNR, gamma), whatever it predicts (Hang et al., 3.4)."""
    diffusion, timesteps = Diffusion(config), torch.tensor([0, 100, 500, 999])
    latents, noise = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    alphas = diffusion.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1, 1)

    def unet(noisy, at, given):
        data = latents + 1
        implied = (noisy - alphas.sqrt() * data) / (1 - alphas).sqrt()
        return implied if config.prediction == "eps" else alphas.sqrt() * implied - (1 - alphas).sqrt() * data

    loss = diffusion.loss(unet, latents, torch.zeros(4, 7, 8), timesteps, noise)
    snr = (alphas / (1 - alphas)).flatten()
    assert snr[0] > 1000 and snr[1] > 5 > snr[2]
    assert torch.allclose(loss, snr.clamp(max=5), rtol=2e-3)


def test_min_snr_is_finite_without_signal():
    config = DiffusionConfig(prediction="v", min_snr_gamma=5, zero_terminal_snr=True)
    latents, noise, timesteps = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.tensor([0, 999])
    loss = Diffusion(config).loss(lambda noisy, *_: noisy, latents, torch.zeros(2, 7, 8), timesteps, noise)
    assert loss.isfinite().all() and loss[1] == 0


def test_offset_noise_is_one_number_for_each_channel_and_frame(diffusion):
    offset = Diffusion(DiffusionConfig(offset_noise=0.5))
    plain, shifted = diffusion.draw(3, range(400), (2, 3, 2, 2)), offset.draw(3, range(400), (2, 3, 2, 2))
    for name in ("timesteps", "posterior_noise", "drop_caption"):
        assert torch.equal(getattr(plain, name), getattr(shifted, name))
    shift = shifted.noise - plain.noise  # b c f h w
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6)
    numbers = shift[..., 0, 0].flatten(1)  # b (c f)
    assert abs(numbers.mean()) < 0.04 and abs(numbers.std() - 0.5) < 0.04
    assert (numbers.T.corrcoef() - torch.eye(6)).abs().max() < 0.2
    assert torch.equal(offset.draw(3, [7], (2, 3, 2, 2)).noise[0], shifted.noise[7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "x0"}, "prediction: 'x0' is none of eps, v"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr: with prediction eps .* set prediction to v"),
        ({"min_snr_gamma": 0}, "min_snr_gamma: 0 is not above 0"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma: -1.0 is not above 0"),
        ({"offset_noise": -0.1}, "offset_noise: -0.1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**options)


class DeviceCopies(TorchDispatchMode):
    """Counts the copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten._to_copy.default and result.device != args[0].device
        return result


def test_tables_follow_their_inputs_and_are_copied_once():
    diffusion = Diffusion(TERMINAL)
    latents, timesteps = torch.empty(2, *SHAPE, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with DeviceCopies() as copies:
        for _ in range(3):
            loss = diffusion.loss(lambda noisy, *_: noisy, latents, latents, timesteps, latents)
            assert loss.device.type == "meta"
    assert copies.count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_loss_never_waits_for_the_gpu():
    diffusion = Diffusion(DiffusionConfig(prediction="v", min_snr_gamma=5))
    latents, timesteps = torch.randn(2, *SHAPE, device="cuda"), torch.tensor([3, 700]).cuda()
    diffusion.add_noise(latents, latents, timesteps)  # copies the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion.loss(lambda noisy, *_: noisy, latents, latents, timesteps, latents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    draw = diffusion.draw("0 videos", [5, 6], (1, 1, 1, 1))
    assert draw.timesteps.tolist() == [201, 391]
    assert torch.allclose(draw.noise.flatten(), torch.tensor([-0.655692, -0.582537]), atol=1e-6)
    assert torch.allclose(draw.posterior_noise.flatten(), torch.tensor([-1.796010, -1.659918]), atol=1e-6)


def test_draws_follow_their_distributions(diffusion):
    draw = diffusion.draw(1, range(4000), (1, 1, 4, 4))
    assert draw.timesteps.min() < 5 and draw.timesteps.max() > 994
    assert abs(draw.timesteps.float().mean() - 499.5) < 20
    assert abs(draw.drop_caption.float().mean() - 0.1) < 0.02
    for noise in (draw.noise, draw.posterior_noise):
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((draw.noise * draw.posterior_noise).mean()) < 0.02


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_captions_are_dropped_at_the_configured_rate(rate):
    draw = Diffusion(DiffusionConfig(caption_dropout=rate)).draw("0 videos", range(4000), (1, 1, 1, 1))
    assert abs(draw.drop_caption.float().mean() - rate) <= 4 * (rate * (1 - rate) / 4000) ** 0.5


def test_a_dropped_caption_is_the_empty_text():
    text = load_text(TextConfig("random", width=16, heads=2, layers=2))
    captions = [f"a red ball number {number}" for number in range(20)]
    draw = Diffusion(DiffusionConfig(caption_dropout=0.5)).draw(0, range(20), (1, 1, 1, 1))
    states = text.encode(draw.kept(captions))  # b l d
    expected = torch.where(draw.drop_caption[:, None, None], text.encode([""]), text.encode(captions))
    assert 0 < draw.drop_caption.sum() < 20
    assert torch.allclose(states, expected, atol=1e-5)
    assert not torch.allclose(text.encode([""]).expand_as(expected), text.encode(captions), atol=1e-2)
