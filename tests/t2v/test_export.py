import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, TextToVideoSDPipeline, UNet3DConditionModel

from t2v.config import DiffusionConfig, ModelConfig, SampleConfig, TextConfig
from t2v.diffusion import Diffusion
from t2v.export import read_unet, write_model, write_modelscope
from t2v.frozen import load_text
from t2v.sampler import sample

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_unet, tmp_path) -> ModelConfig:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    vae.save_pretrained(tmp_path / "vae")
    return ModelConfig(
        unet=tiny_unet.config, vae=str(tmp_path / "vae"), text=TextConfig(weights="random", width=24, heads=2, layers=3)
    )


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


def pipeline_latents(pipeline: TextToVideoSDPipeline, config: SampleConfig, **prompt: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **prompt,
        num_frames=3,
        height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="latent",
    ).frames


def test_diffusers_pipeline_samples_the_same_latents_from_prompts(folder, model, tiny_unet):
    prompts = ["a red circle moves left", "Wow!"]
    pipeline = TextToVideoSDPipeline.from_pretrained(folder)
    theirs = pipeline_latents(pipeline, SampleConfig(), prompt=prompts)
    text = load_text(model.text)
    ours = sample(
        tiny_unet,
        text.encode(prompts),
        text.encode([""]),
        (4, 3, 8, 8),
        [1, 2],
        SampleConfig(),
        Diffusion(DiffusionConfig()),
    )
    assert theirs.shape == (2, 4, 3, 8, 8) and theirs[0].std() > 0.01
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_diffusers_pipeline_makes_a_video_of_a_prompt_with_no_other_argument(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is TextToVideoSDPipeline
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("a red circle moves left").frames
    size = 8 * pipeline.vae_scale_factor
    assert video.shape == (1, 16, size, size, 3) and np.isfinite(video).all()


def test_the_text_encoder_is_the_same_model_wherever_it_came_from(folder, model, tiny_unet, tmp_path):
    again = replace(model, text=TextConfig(weights=folder))
    write_model(str(tmp_path / "again"), tiny_unet.state_dict(), again, DiffusionConfig(), {})
    for name in ("text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/vocab.json"):
        assert Path(folder, name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_vae_of_another_layout_is_written_as_a_diffusers_folder(folder, model, tiny_unet, tmp_path):
    AutoencoderKL.from_pretrained(tmp_path / "vae").save_pretrained(tmp_path / "half", variant="fp16")
    other = replace(model, vae=str(tmp_path / "half"))
    write_model(str(tmp_path / "again"), tiny_unet.state_dict(), other, DiffusionConfig(), {})
    assert equal_weights(
        *(AutoencoderKL.from_pretrained(path, subfolder="vae") for path in (folder, tmp_path / "again"))
    )


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
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        WEIGHTS,
        "vae/config.json",
        WEIGHTS.replace("unet", "vae"),
    }


def test_tensors_that_do_not_fit_are_named_before_anything_is_written(model, tiny_unet, tmp_path):
    weights = tiny_unet.state_dict()
    weights["conv_inn.weight"] = weights.pop("conv_in.weight")
    for write in (
        lambda: write_model(str(tmp_path / "new"), weights, model, DiffusionConfig(), {}),
        lambda: write_modelscope(str(tmp_path / "new"), weights, model.unet),
    ):
        with pytest.raises(
            ValueError, match=r"weights: conv_in\.weight is missing; conv_inn\.weight is not in the model$"
        ):
            write()
        assert not (tmp_path / "new").exists()
