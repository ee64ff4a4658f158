import copy

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from t2v.autoencoder import channels_last
from t2v.config import DiffusionConfig, ModelConfig, SampleConfig, TextConfig
from t2v.diffusion import Diffusion
from t2v.export import write_model
from t2v.frozen import make_scheduler
from t2v.sampler import Captured, sample, start_noise

SHAPE = (4, 3, 4, 4)
DIFFUSION = Diffusion(DiffusionConfig())
VELOCITY = Diffusion(DiffusionConfig(prediction="v"))
TERMINAL = Diffusion(DiffusionConfig(prediction="v", zero_terminal_snr=True))
SAMPLERS = ["ddim", "dpm++", "unipc"]


class Oracle(nn.Module):
    """Knows the data's distribution, a Gaussian of `spread` around a point; keeps what it was asked."""

    def __init__(self, point: torch.Tensor, diffusion: Diffusion = DIFFUSION, spread: float = 0.0) -> None:
        super().__init__()
        self.point, self.diffusion, self.variance = point, diffusion, spread**2
        self.calls: list[tuple[int, int]] = []
        self.texts: list[torch.Tensor] = []

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.calls.append((len(latents), int(timesteps[0])))
        self.texts.append(text)
        alphas = self.diffusion.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1, 1)
        signal, deviation = alphas.sqrt(), (1 - alphas).sqrt()
        unknown = latents - signal * self.point
        data = self.point + signal * self.variance / (alphas * self.variance + 1 - alphas) * unknown
        noise = (latents - signal * data) / deviation
        predicted = noise if self.diffusion.config.prediction == "eps" else signal * noise - deviation * data
        return predicted.repeat(len(text) // len(latents), 1, 1, 1, 1)


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))


def test_ddim_takes_the_published_steps(text):
    oracle = Oracle(torch.zeros(SHAPE)).eval()
    sample(oracle, text, text[:1], SHAPE, [0, 1, 2], SampleConfig(steps=50), DIFFUSION)
    assert oracle.calls == [(3, timestep) for timestep in range(981, 0, -20)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_perfect_predictions_every_sampler_finds_the_data(sampler, text):
    point = torch.randn(SHAPE)
    config = SampleConfig(sampler=sampler, steps=20)
    latents = sample(Oracle(point).eval(), text, text[:1], SHAPE, [0, 1, 2], config, DIFFUSION)
    left = (1 - DIFFUSION.alphas_cumprod[0]).sqrt()  # the last step ends at t = 0, where some noise is left
    assert (latents - point).square().mean().sqrt() < 1.5 * left


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_velocity_gives_the_samples_of_its_noise(sampler, text):
    point, config = torch.randn(SHAPE), SampleConfig(sampler=sampler, steps=10)
    noise, velocity = (
        sample(Oracle(point, diffusion, spread=0.5).eval(), text, text[:1], SHAPE, [0, 1, 2], config, diffusion)
        for diffusion in (DIFFUSION, VELOCITY)
    )
    assert (noise - velocity).norm() <= 1e-4 * noise.norm()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_terminal_signal_every_sampler_finds_the_distribution(sampler, text):
    """The start is then exactly the data's own noise, so the solution is known: the point and `spread` of the start."""
    point, errors = torch.randn(SHAPE), []
    left = (1 - TERMINAL.alphas_cumprod[0]) if sampler == "ddim" else 0  # DDIM ends at t = 0, the others without noise
    for steps in (20, 40, 200):
        oracle, config = Oracle(point, TERMINAL, spread=0.5).eval(), SampleConfig(sampler=sampler, steps=steps)
        latents = sample(oracle, text, text[:1], SHAPE, [0, 1, 2], config, TERMINAL)
        expected = (1 - left) ** 0.5 * point + ((1 - left) * 0.25 + left) ** 0.5 * start_noise([0, 1, 2], SHAPE)
        errors.append((latents - expected).square().mean().sqrt())
        assert [timestep for _, timestep in oracle.calls] == list(range(999, 0, -1000 // steps))
    assert errors[2] < 0.01 and errors[2] < 0.25 * errors[0] and errors[1] < 0.7 * errors[0]


def ddim_sample_loop(unet, noise, text, empty_text, guidance, steps):
    """ModelScope's sampler as its source has it (diffusion.py), eta 0, but in float64 throughout."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas, x, stride = torch.cumprod(1 - betas, 0), noise.double(), 1000 // steps
    for t in (1 + torch.arange(0, 1000, stride)).clamp(0, 999).flip(0):
        at = t.expand(len(x))
        given = unet(x, at, text.double())  # two calls, the one with text first
        without = unet(x, at, empty_text.double().expand_as(text))
        eps = without + guidance * (given - without)
        start = torch.sqrt(1 / alphas[t]) * x - torch.sqrt(1 / alphas[t] - 1) * eps
        eps = (torch.sqrt(1 / alphas[t]) * x - start) / torch.sqrt(1 / alphas[t] - 1)
        before = alphas[(t - stride).clamp(0)]
        x = before.sqrt() * start + (1 - before).sqrt() * eps
    return x


@torch.no_grad()
def test_ddim_gives_the_public_samplers_latents(text, tiny_unet):
    config = SampleConfig(steps=50, guidance=9)
    ours = sample(tiny_unet, text, text[:1] + 1, SHAPE, [0, 1, 2], config, DIFFUSION)
    exact = copy.deepcopy(tiny_unet).double()
    theirs = ddim_sample_loop(exact, start_noise([0, 1, 2], SHAPE), text, text[:1] + 1, guidance=9, steps=50)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_guidance_is_one_batch_without_text_and_with_it(text):
    oracle, empty_text = Oracle(torch.zeros(SHAPE)).eval(), torch.zeros(1, 7, 24)
    sample(oracle, text, empty_text, SHAPE, [0, 1, 2], SampleConfig(steps=2), DIFFUSION)
    assert len(oracle.texts) == 2
    assert all(torch.equal(given, torch.cat([empty_text.expand(3, -1, -1), text])) for given in oracle.texts)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_a_function_of_their_seeds(sampler, text, tiny_unet):
    config = SampleConfig(sampler=sampler, steps=3, guidance=3)
    first = sample(tiny_unet, text, text[:1], SHAPE, [0, 1, 2], config, DIFFUSION)
    torch.randn(5)  # moves the global generator
    assert torch.equal(first, sample(tiny_unet, text, text[:1], SHAPE, [0, 1, 2], config, DIFFUSION))


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


def test_the_scheduler_has_the_tables_of_training():
    for diffusion in (DIFFUSION, VELOCITY, TERMINAL):
        scheduler = make_scheduler(diffusion.config, "ddim", 50)
        assert torch.allclose(scheduler.alphas_cumprod.double(), diffusion.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "steps", "diffusion", "message"),
    [
        ("ddim", 30, TERMINAL, "steps: 30 cannot be spaced over 1000 timesteps for ddim with zero_terminal_snr"),
        ("dpm++", 61, TERMINAL, "steps: 61 cannot be spaced"),
        ("unipc", 103, TERMINAL, "steps: 103 cannot be spaced"),
        ("dpm++", 1000, DIFFUSION, "steps: 1000 are too many for dpm"),
    ],
)
def test_steps_that_a_sampler_cannot_take_are_refused(sampler, steps, diffusion, message, text):
    config = SampleConfig(sampler=sampler, steps=steps)
    with pytest.raises(ValueError, match=message):
        sample(Oracle(torch.zeros(SHAPE)).eval(), text, text[:1], SHAPE, [0, 1, 2], config, diffusion)


def test_an_exported_model_samples_alike_in_diffusers(text, tiny_unet, tmp_path):
    """Velocity and zero terminal SNR go with the folder: its pipeline knows no other settings."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    vae.save_pretrained(tmp_path / "vae")
    model = ModelConfig(tiny_unet.config, str(tmp_path / "vae"), TextConfig("random", width=24, heads=2, layers=2))
    write_model(str(tmp_path / "model"), tiny_unet.state_dict(), model, TERMINAL.config, {}, latent_size=8)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model", text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    settings = pipeline.scheduler.config
    assert (settings.prediction_type, settings.timestep_spacing) == ("v_prediction", "trailing")
    theirs = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=text[:1].expand(3, -1, -1),
        num_frames=3,
        height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor,
        num_inference_steps=20,
        guidance_scale=9,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1, 2)],
        output_type="latent",
    ).frames
    ours = sample(tiny_unet, text, text[:1], (4, 3, 8, 8), [0, 1, 2], SampleConfig(steps=20), TERMINAL)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def graphed(function, own):
    """What a CUDA graph comes to: it reads the memory of its first inputs, and writes one result again and again."""
    result = function(*own)

    def replay(*inputs):
        for old, new in zip(own, inputs, strict=True):
            old.copy_(new)
        return result.copy_(function(*own))

    return replay


@pytest.mark.parametrize("guidance", [1, 3])  # with 1 the UNet reads the scheduler's own latents
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_captured_unet_gives_the_same_samples(sampler, guidance, text, tiny_unet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    config, captured = SampleConfig(sampler=sampler, steps=4, guidance=guidance), Captured(tiny_unet)
    for rows in (3, 2, 3):  # another shape is another graph, and a known one is used again
        given = text[:rows] + rows
        call = (given, text[:1], SHAPE, range(rows), config, DIFFUSION)
        assert torch.equal(sample(captured, *call), sample(tiny_unet, *call))
        assert torch.equal(given, text[:rows] + rows)
    assert len(captured.graphs) == 2


@torch.no_grad()
def test_what_a_captured_unet_gives_stays(text, tiny_unet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    captured, timesteps = Captured(tiny_unet), torch.tensor(5).expand(3)
    latents = [torch.randn(3, *SHAPE) for _ in range(2)]
    given = [captured(x, timesteps, text) for x in latents]
    assert all(torch.equal(one, tiny_unet(x, timesteps, text)) for one, x in zip(given, latents, strict=True))


def test_a_captured_unet_in_training_mode_is_refused(text, tiny_unet):
    with pytest.raises(ValueError, match="training mode"):
        sample(Captured(tiny_unet.train()), text, text[:1], SHAPE, [0, 1, 2], SampleConfig(), DIFFUSION)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_graph_gives_the_samples_of_the_plain_unet(sampler, text, tiny_unet):
    text, plain = text.cuda(), copy.deepcopy(tiny_unet).cuda()
    captured, config = Captured(channels_last(tiny_unet.cuda())), SampleConfig(sampler=sampler, steps=5, guidance=3)
    for rows in (3, 2, 3):
        call = (text[:rows] + rows, text[:1], SHAPE, range(rows), config, DIFFUSION)
        expected = sample(plain, *call)
        assert (sample(captured, *call) - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_the_steps_never_wait_for_the_gpu(sampler, text):
    class Watched(nn.Module):
        """From its first call on, any wait for the GPU is an error."""

        def forward(self, latents, timesteps, text):
            torch.cuda.set_sync_debug_mode("error")
            return torch.cat([latents, latents])

    try:
        config = SampleConfig(sampler=sampler, steps=5)
        sample(Watched().eval(), text.cuda(), text[:1].cuda(), SHAPE, [0, 1, 2], config, VELOCITY)
    finally:
        torch.cuda.set_sync_debug_mode("default")
