import json
import os
from pathlib import Path

import fsspec
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet3DConditionModel
from safetensors.torch import load_file, save_file

from t2v.config import DiffusionConfig, ModelConfig, SampleConfig, TextConfig
from t2v.diffusion import Diffusion
from t2v.export import diffusers_config, read_unet, unet_config, write_model
from t2v.sampler import sample

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_unet, tmp_path) -> ModelConfig:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    vae.save_pretrained(tmp_path / "vae")
    return ModelConfig(unet=tiny_unet.config, vae=str(tmp_path / "vae"), text=TextConfig(weights="random", width=24))


@pytest.fixture
def folder(tiny_unet, model, tmp_path) -> str:
    path = str(tmp_path / "run" / "model")
    write_model(path, tiny_unet.state_dict(), model, DiffusionConfig(), {"samples": 5}, latent_size=8)
    return path


def predict(unet: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 24))


def equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_comes_back_as_it_was(folder, tiny_unet):
    unet = read_unet(folder)
    assert not unet.training
    assert unet.config == tiny_unet.config
    assert equal_weights(unet, tiny_unet)
    assert torch.equal(predict(unet), predict(tiny_unet))


def test_what_diffusers_has_no_place_for_lies_beside(folder, model):
    beside = json.loads(Path(folder, "t2v.json").read_text())
    assert TextConfig(**beside["text"]) == model.text
    assert DiffusionConfig(**beside["diffusion"]) == DiffusionConfig()
    assert beside["info"] == {"samples": 5}


def test_diffusers_loads_the_unet(folder, tiny_unet):
    published = UNet3DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    assert (published.config.sample_size, published.dtype) == (8, torch.float32)
    theirs = predict(lambda *call: published(*call).sample)
    assert (predict(tiny_unet) - theirs).norm() <= 1e-5 * theirs.norm()


def test_diffusers_pipeline_samples_the_same_latents(folder, tiny_unet):
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    text, empty_text = torch.randn(2, 7, 24), torch.randn(1, 7, 24)
    config = SampleConfig(steps=5, guidance=4)
    ours = sample(tiny_unet, text, empty_text, (4, 3, 8, 8), [1, 2], config, Diffusion(DiffusionConfig()))
    theirs = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=empty_text.expand(2, -1, -1),
        num_frames=3,
        height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="latent",
    ).frames
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_newer_model_replaces_the_older_and_leaves_nothing_else(folder, model, tiny_unet):
    newer = {name: weight + 1 for name, weight in tiny_unet.state_dict().items()}
    write_model(folder, newer, model, DiffusionConfig(), {"samples": 6})
    assert torch.equal(read_unet(folder).conv_in.bias, tiny_unet.conv_in.bias + 1)
    assert os.listdir(os.path.dirname(folder)) == ["model"]


def test_a_failed_export_leaves_the_older_model(folder, model, tiny_unet, tmp_path):
    os.remove(tmp_path / "vae" / "config.json")
    with pytest.raises(FileNotFoundError):
        write_model(folder, tiny_unet.state_dict(), model, DiffusionConfig(), {})
    assert equal_weights(read_unet(folder), tiny_unet)
    assert os.listdir(os.path.dirname(folder)) == ["model"]


def test_a_model_goes_to_an_object_store_and_back(model, tiny_unet):
    url = "memory://bucket/model"
    for samples in (1, 2):
        write_model(url, tiny_unet.state_dict(), model, DiffusionConfig(), {"samples": samples})
    assert equal_weights(read_unet(url), tiny_unet)
    files = {path.removeprefix("/bucket/model/") for path in fsspec.filesystem("memory").find("/bucket/model")}
    assert files == {
        "model_index.json",
        "t2v.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
        "vae/config.json",
        WEIGHTS.replace("unet", "vae"),
    }


def test_half_precision_weights_are_read_as_fp32(folder, tiny_unet):
    save_file({name: weight.half() for name, weight in tiny_unet.state_dict().items()}, Path(folder, WEIGHTS))
    unet = read_unet(folder)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


def test_tensors_that_do_not_fit_are_named(folder, model):
    weights = load_file(Path(folder, WEIGHTS))
    weights["conv_inn.weight"] = weights.pop("conv_in.weight")
    weights["conv_out.bias"] = torch.zeros(5)
    message = r"conv_in\.weight is missing; conv_inn\.weight is not in the model; conv_out\.bias is \[5\], not \[4\]$"
    save_file(weights, Path(folder, WEIGHTS))
    with pytest.raises(ValueError, match=message):
        read_unet(folder)
    with pytest.raises(ValueError, match=message):
        write_model(folder, weights, model, DiffusionConfig(), {})


def test_pickled_weights_are_not_read(folder):
    os.rename(Path(folder, WEIGHTS), Path(folder, "unet", "diffusion_pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"unet has no diffusion_pytorch_model\.safetensors"):
        read_unet(folder)


def test_the_first_published_config_is_read():
    published = diffusers_config(ModelConfig().unet, latent_size=32)
    del published["num_attention_heads"], published["time_cond_proj_dim"]
    published |= {"_diffusers_version": "0.15.0.dev0", "class_embed_type": None, "flip_sin_to_cos": True}
    assert unet_config(published) == ModelConfig().unet


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", "UNet2DConditionModel"),
        ("act_fn", "gelu"),
        ("out_channels", 8),
        ("down_block_types", ["DownBlock3D"] * 4),
        ("attention_head_dim", [5, 10, 20, 20]),
    ],
)
def test_a_unet_of_another_kind_is_refused(name, value):
    values = diffusers_config(ModelConfig().unet) | {name: value}
    with pytest.raises(ValueError, match=name):
        unet_config(values)


def test_an_incomplete_config_is_refused():
    values = diffusers_config(ModelConfig().unet)
    del values["in_channels"]
    with pytest.raises(ValueError, match="somewhere: in_channels missing"):
        unet_config(values, "somewhere")
