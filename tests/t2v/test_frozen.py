"""The frozen parts against the libraries they wrap, and the miniature's VAE against its promise."""

import copy
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from safetensors.torch import save_file

from pipelines.config import CorpusConfig
from pipelines.judge import judge
from pipelines.nano_frames import draw_shapes
from pipelines.nano_vae import psnr_db
from pipelines.shapes import draw_scene, render
from t2v import keys
from t2v.autoencoder import encode
from t2v.config import DiffusionConfig, TextConfig
from t2v.frozen import Vae, load_text, load_vae, make_scheduler
from t2v.shards import WEIGHTS
from tests.t2v.conftest import randomise

NANO_VAE = Path(__file__).parents[2] / "t2v/assets/nano_vae"
TINY_TEXT = TextConfig(weights="random", width=32, heads=2, layers=3, skip_layers=1)
PROMPTS = ["a red circle moves left", "a red circle moves right", ""]


@pytest.fixture(scope="module")
def vae() -> Vae:
    return load_vae(str(NANO_VAE), chunk_frames=5)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.from_numpy(draw_shapes(16, seed=1234))


def test_encode_and_decode_are_the_diffusers_network(vae: Vae, frames: torch.Tensor) -> None:
    mean, logvar = vae.encode(frames)
    direct = AutoencoderKL.from_pretrained(NANO_VAE, torch_dtype=torch.float32)
    pixels = frames.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        posterior = direct.encode(pixels).latent_dist
        seen = (direct.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert mean.shape == (16, 4, 8, 8) and mean.dtype == torch.float32
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=0)
    decoded = vae.decode(mean.view(2, 8, 4, 8, 8).transpose(1, 2) * vae.scale)
    assert decoded.shape == (2, 8, 64, 64, 3) and decoded.dtype == torch.uint8
    # Half a level of rounding, and a little more where arithmetic differs on the edge of one.
    assert (decoded.flatten(0, 1) / 255 - seen).abs().max() <= 0.501 / 255


@torch.no_grad()
def changed(vae: Vae, bias: float = 0.0, brightness: float = 1.0) -> Vae:
    """A copy that encodes in fp16, as on a GPU, with another log-variance or another scale of its first features."""
    model = copy.deepcopy(vae.model)
    model.quant_conv.bias[4:] += bias
    model.encoder.conv_in.weight *= brightness
    half = Vae(model, "", chunk_frames=5)
    half.encodes_in = torch.float16
    return half


def test_fp16_is_the_same_to_its_precision(vae: Vae, frames: torch.Tensor) -> None:
    half = changed(vae)
    for found, expected in zip(half.encode(frames), vae.encode(frames), strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - expected).norm() <= 5e-3 * expected.norm()
    assert half.model.dtype == torch.float32  # decoding stays exact


def test_frames_that_overflow_fp16_are_encoded_in_fp32_and_no_others(vae: Vae, frames: torch.Tensor) -> None:
    half = changed(vae, brightness=5e4)
    grey = torch.full_like(frames, 127)  # nearly zero, which that scale leaves within fp16
    mixed = torch.cat([grey[:2], frames[:2], grey[2:3]])
    pixels = mixed / 127.5 - 1
    exact = encode(half.model, pixels)
    overflows = ~encode(copy.deepcopy(half.model).half(), pixels.half()).isfinite().flatten(1).all(1)
    assert overflows.tolist() == [False, False, True, True, False]
    same = half.encode(mixed)[0].movedim(1, -1) == exact[..., :4]
    assert same[overflows].all() and not same[~overflows].all()
    assert torch.isfinite(half.encode(mixed)[0]).all()


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), 1e6])
def test_broken_weights_are_an_error_and_never_latents(vae: Vae, frames: torch.Tensor, bias: float) -> None:
    for precision in (torch.float16, torch.float32):
        broken = changed(vae, bias)
        broken.encodes_in = precision
        with pytest.raises(ValueError, match=r"model\.vae: its latents are beyond fp16 or not finite"):
            broken.encode(frames)


def test_log_variances_are_bounded_as_in_diffusers(vae: Vae, frames: torch.Tensor) -> None:
    for bias, bound in ((100, 20), (-100, -30)):
        assert (changed(vae, bias).encode(frames)[1] == bound).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_encodes_in_fp16_and_decodes_as_a_cpu(vae: Vae, frames: torch.Tensor) -> None:
    on_gpu = load_vae(str(NANO_VAE), "cuda", chunk_frames=5)
    assert on_gpu.encodes_in == torch.float16
    mean = vae.encode(frames)[0]
    assert 0 < (on_gpu.encode(frames)[0].cpu() - mean).norm() <= 5e-3 * mean.norm()
    video = mean.unsqueeze(2) * vae.scale
    assert abs(on_gpu.decode(video).cpu().int() - vae.decode(video).int()).max() <= 1


def test_nano_vae_is_small_sharp_and_of_unit_variance(vae: Vae, frames: torch.Tensor) -> None:
    assert (NANO_VAE / WEIGHTS).stat().st_size <= 4e6
    assert psnr_db(vae, frames) >= 30
    assert 0.8 < (vae.encode(frames)[0] * vae.scale).std() < 1.2


def test_a_clip_of_the_corpus_can_be_read_after_the_way_through_the_latents(vae: Vae) -> None:
    scenes = [draw_scene(CorpusConfig(seed=777), "test", index) for index in range(8)]
    clips = [np.stack([render(scene, k / 3, 64, 64) for k in range(0, 16, 3)]) for scene in scenes]
    means = [vae.encode(torch.from_numpy(clip))[0] for clip in clips]
    latents = torch.stack(means).transpose(1, 2) * vae.scale
    readings = [judge(clip) for clip in vae.decode(latents).numpy()]
    assert readings == [scene.fields for scene in scenes]


def test_vae_id_names_the_weights(vae: Vae, tmp_path: Path) -> None:
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((NANO_VAE / name).read_bytes())
    assert load_vae(str(tmp_path)).id == vae.id
    changed = AutoencoderKL.from_pretrained(tmp_path)
    changed.decoder.conv_out.bias.data += 1
    changed.save_pretrained(tmp_path)
    assert load_vae(str(tmp_path)).id != vae.id


def test_a_missing_vae_names_its_config_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.vae"):
        load_vae(None)
    with pytest.raises(FileNotFoundError, match="model.vae.*has no diffusion_pytorch_model.safetensors"):
        load_vae(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="model.vae.*safetensors"):
        load_vae(str(tmp_path))


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    """A small VAE of Stable Diffusion's layout, whose groups are always 32."""
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return randomise(AutoencoderKL(block_out_channels=[32, 64], layers_per_block=2, latent_channels=4, **kinds)).eval()


def same_weights(vae: Vae, autoencoder: AutoencoderKL) -> bool:
    ours, theirs = vae.model.state_dict(), autoencoder.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def ldm_checkpoint(autoencoder: AutoencoderKL, prefix: str) -> dict[str, torch.Tensor]:
    """The names and shapes of Stable Diffusion's checkpoints, whose attention is made of convolutions."""
    state = autoencoder.state_dict()
    names = keys.renamed(state, keys.ldm_vae(levels=2, layers=2))
    tensors = {f"{prefix}{names[name]}": tensor for name, tensor in state.items()}
    return {name: t[..., None, None] if ".attn_1." in name and t.ndim == 2 else t for name, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_in_a_stable_diffusion_checkpoint_is_the_same(
    autoencoder: AutoencoderKL, tmp_path: Path, prefix: str
) -> None:
    tensors = ldm_checkpoint(autoencoder, prefix)
    if prefix:
        tensors["model.diffusion_model.out.2.bias"] = torch.ones(4)
    torch.save({"state_dict": tensors, "callbacks": {SampleCallback: SampleCallback()}}, tmp_path / "VQGAN.pth")
    vae = load_vae(str(tmp_path / "VQGAN.pth"))
    assert same_weights(vae, autoencoder)
    assert vae.scale == 0.18215
    assert len(vae.id) == 16
    frames = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = autoencoder.encode(frames.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(vae.encode(frames)[0], expected, atol=1e-5, rtol=0)


class SampleCallback:
    """Left in a checkpoint by the trainer that made it."""


@pytest.mark.parametrize("where", [".", "vae"])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bin", "shards", "old names"])
def test_a_vae_in_a_diffusers_folder_is_the_same(
    autoencoder: AutoencoderKL, tmp_path: Path, kind: str, where: str
) -> None:
    settings = {
        "fp16": {"variant": "fp16"},
        "bin": {"safe_serialization": False},
        "shards": {"max_shard_size": "200KB"},
    }
    autoencoder.save_pretrained(tmp_path / "vae", **settings.get(kind, {}))
    if kind == "old names":
        state = autoencoder.state_dict()
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in names.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in state.items()}
        save_file(state, tmp_path / "vae" / WEIGHTS)
    vae = load_vae(str(tmp_path / where))
    assert same_weights(vae, autoencoder)
    assert len(vae.id) == 16


def test_a_vae_that_does_not_fit_names_the_key_the_path_and_the_tensors(
    autoencoder: AutoencoderKL, tmp_path: Path
) -> None:
    tensors = ldm_checkpoint(autoencoder, "first_stage_model.")
    tensors["first_stage_model.quant.bias"] = tensors.pop("first_stage_model.quant_conv.bias")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    message = r"model.vae: .*vae.safetensors: quant\.bias is not in the model; quant_conv\.bias is missing$"
    with pytest.raises(ValueError, match=message):
        load_vae(str(tmp_path / "vae.safetensors"))
    save_file({"some.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="model.vae: .*other.safetensors: no first_stage_model of a known layout"):
        load_vae(str(tmp_path / "other.safetensors"))
    autoencoder.save_pretrained(tmp_path / "vae")
    settings = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(settings | {"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="model.vae: .*_class_name is 'VQModel'"):
        load_vae(str(tmp_path))
    (tmp_path / "vae" / "config.json").write_text(json.dumps(settings | {"act_fn": "gelu"}))
    with pytest.raises(ValueError, match="model.vae: .*act_fn is 'gelu'"):
        load_vae(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="model.vae: there is no file or folder .*nowhere"):
        load_vae(str(tmp_path / "nowhere"))


def test_tokens_are_clips_padded_with_zero() -> None:
    text = load_text(TINY_TEXT)
    tokens = text.tokenize(PROMPTS + ["word " * 100])
    assert tokens.shape == (4, 77) and tokens.dtype == torch.int64
    assert torch.equal(tokens, open_clip.tokenize(PROMPTS + ["word " * 100]))
    assert tokens[2].tolist() == [49406, 49407] + [0] * 75
    assert tokens[3, -1] == 49407


def test_random_tower_depends_on_its_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = load_text(TINY_TEXT).encode(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(load_text(TINY_TEXT).encode(PROMPTS), first)
    other = TextConfig(weights="random", width=32, heads=2, layers=3, seed=1)
    assert not torch.allclose(load_text(other).encode(PROMPTS), first, atol=0.1)


def test_every_word_and_their_order_change_the_states() -> None:
    text = load_text(TINY_TEXT)
    states = text.encode(["red circle blue square", "blue circle red square", "red circle blue star"])
    assert states.shape == (3, 77, text.width) and not states.requires_grad
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (states[one] - states[other]).abs().mean() > 0.01


def test_states_train_what_reads_them() -> None:
    reader = torch.nn.Linear(32, 1)
    reader(load_text(TINY_TEXT).encode(PROMPTS)).sum().backward()
    assert reader.weight.grad.abs().sum() > 0


def test_skipping_every_layer_or_missing_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="model.text.weights is not set"):
        load_text(TextConfig())
    with pytest.raises(FileNotFoundError, match="model.text.weights.*nowhere.pt"):
        load_text(TextConfig(weights="nowhere.pt"))
    with pytest.raises(ValueError, match="model.text.skip_layers: 3 of 3"):
        load_text(TextConfig(weights="random", width=32, heads=2, layers=3, skip_layers=3))


def test_ddim_is_the_public_samplers() -> None:
    """reference: modelscope's ddim_sample, float64 tables, stride 20, the last step to t = 0."""
    scheduler = make_scheduler(DiffusionConfig(), "ddim", 50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 8, 8, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    for t, before in ((981, 961), (1, 0)):
        start = (x - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        expected = alphas[before].sqrt() * start + (1 - alphas[before]).sqrt() * noise
        stepped = scheduler.step(noise, t, x).prev_sample
        torch.testing.assert_close(stepped, expected.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_every_sampler_finds_the_picture_that_its_noise_predictor_knows(sampler: str) -> None:
    scheduler = make_scheduler(DiffusionConfig(), sampler, 20)
    picture = torch.linspace(-1, 1, 16).view(1, 4, 1, 2, 2)
    x = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t]
        x = scheduler.step((x - alpha.sqrt() * picture) / (1 - alpha).sqrt(), t, x).prev_sample
    torch.testing.assert_close(x, picture, atol=0.1, rtol=0)


def test_dpm_is_what_diffusers_makes_of_the_exported_scheduler() -> None:
    ours = make_scheduler(DiffusionConfig(), "dpm++", 25)
    theirs = DPMSolverMultistepScheduler.from_config(make_scheduler(DiffusionConfig(), "ddim", 25).config)
    theirs.set_timesteps(25)
    assert ours.config == theirs.config and ours.config.algorithm_type == "dpmsolver++"


def test_schedulers_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="sampler: 'euler'"):
        make_scheduler(DiffusionConfig(), "euler", 50)
    with pytest.raises(ValueError, match="steps: 1000 are too many"):
        make_scheduler(DiffusionConfig(), "ddim", 1000)
