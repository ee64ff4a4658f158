"""The UNet from every public layout, tiny: the same tensors, and the same output as the network they were made for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from t2v import keys
from t2v.config import ModelConfig, UNetConfig
from t2v.export import read_unet, write_modelscope
from t2v.published import diffusers_config, image_unet_config, start_weights, unet_config, unet_weights
from t2v.unet import UNet
from tests.t2v.conftest import randomise
from tests.t2v.test_keys import STABLE_DIFFUSION, modelscope

TINY = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=24, norm_groups=8)
FOUR_LEVELS = UNetConfig(block_out_channels=[8, 8, 16, 16], head_dim=4, text_dim=12, norm_groups=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def image_unet(**changes: Any) -> UNet2DConditionModel:
    """A random UNet in Stable Diffusion 2.1's layout whose levels are those of TINY."""
    shape = {
        "attention_head_dim": [2, 4],
        "block_out_channels": [16, 32],
        "cross_attention_dim": 24,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    return randomise(UNet2DConditionModel.from_config(STABLE_DIFFUSION | shape | changes)).eval()


def ldm_checkpoint(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The same weights as in Stable Diffusion's own checkpoints, with some of what else is in those."""
    names = keys.renamed(unet.state_dict(), keys.stable_diffusion_unet(TINY))
    tensors = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in unet.state_dict().items()}
    return tensors | {"betas": torch.ones(1000), "first_stage_model.quant_conv.bias": torch.ones(8)}


def inputs(text_dim: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, text_dim)


@torch.no_grad()
def frame_by_frame_error(unet: UNet, image: UNet2DConditionModel) -> float:
    latents, timesteps, text = inputs()
    ours = unet(latents, timesteps, text)
    frames = [image(latents[:, :, index], timesteps, text).sample for index in range(latents.shape[2])]
    theirs = torch.stack(frames, dim=2)
    return float((ours - theirs).norm() / theirs.norm())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def unet() -> UNet:
    return randomise(UNet(TINY)).eval()


@pytest.fixture
def folder(unet: UNet, tmp_path: Path) -> Path:
    """A pipeline's folder with the UNet alone in it."""
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    save_file(unet.state_dict(), tmp_path / "pipeline" / "unet" / WEIGHTS)
    (tmp_path / "pipeline" / "unet" / "config.json").write_text(json.dumps(diffusers_config(TINY)))
    return tmp_path / "pipeline"


@pytest.mark.parametrize("where", [".", "unet"])
def test_a_diffusers_folder_is_read_from_its_root_or_itself(folder: Path, unet: UNet, where: str) -> None:
    read = read_unet(str(folder / where))
    assert read.config == TINY and not read.training
    assert same(read.state_dict(), unet.state_dict())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_diffusers_folders_as_it_saves_them(tmp_path: Path, half: bool, sharded: bool, safe: bool) -> None:
    image = image_unet()
    saved = image_unet().half() if half else image
    size = "100KB" if sharded else "10GB"
    saved.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=size, variant="fp16" if half else None)
    assert len(list(tmp_path.glob("*.index*"))) == sharded
    config, weights = unet_weights(str(tmp_path))
    assert config == TINY
    assert same(weights, saved.state_dict())


def test_the_weights_outlive_their_file(folder: Path, unet: UNet) -> None:
    read = read_unet(str(folder))
    (folder / "unet" / WEIGHTS).write_bytes(bytes((folder / "unet" / WEIGHTS).stat().st_size))
    assert same(read.state_dict(), unet.state_dict())


def test_half_precision_becomes_fp32(folder: Path, unet: UNet) -> None:
    save_file({name: tensor.half() for name, tensor in unet.state_dict().items()}, folder / "unet" / WEIGHTS)
    assert {parameter.dtype for parameter in read_unet(str(folder)).parameters()} == {torch.float32}


@pytest.mark.parametrize("linear", [True, False])
def test_a_stable_diffusion_folder_gives_its_output_frame_by_frame(tmp_path: Path, linear: bool) -> None:
    image = image_unet(use_linear_projection=linear)
    image.save_pretrained(tmp_path / "sd" / "unet")
    unet = read_unet(str(tmp_path / "sd"))
    assert frame_by_frame_error(unet, image) <= 1e-5
    temporal = [name for name in unet.state_dict() if keys.is_temporal(name)]
    assert len(temporal) == len(unet.state_dict()) - len(image.state_dict())


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_stable_diffusion_checkpoint_gives_its_output_frame_by_frame(tmp_path: Path, kind: str) -> None:
    image, path = image_unet(), tmp_path / f"v2-1_512-ema-pruned.{kind}"
    tensors = ldm_checkpoint(image)
    torch.save({"state_dict": tensors, "global_step": 875_000}, path) if kind == "ckpt" else save_file(tensors, path)
    assert frame_by_frame_error(read_unet(str(path), TINY), image) <= 1e-5


def test_a_run_starts_from_an_image_unet(tmp_path: Path) -> None:
    image = image_unet()
    image.save_pretrained(tmp_path / "unet")
    torch.manual_seed(0)
    unet = UNet(TINY)
    fresh = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    weights = start_weights(str(tmp_path), TINY)
    unet.load_state_dict(weights, strict=False)
    assert same(weights, image.state_dict())
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in unet.state_dict().items() if keys.is_temporal(name))


@pytest.mark.parametrize("wrapped", [False, True])
def test_modelscopes_file_comes_back_bit_for_bit(tmp_path: Path, wrapped: bool) -> None:
    unet, path = randomise(UNet(FOUR_LEVELS)), tmp_path / "text2video_pytorch_model.pth"
    write_modelscope(str(path), unet.state_dict(), FOUR_LEVELS)
    stored = torch.load(path, weights_only=True)
    expected = modelscope(FOUR_LEVELS.block_out_channels, head_dim=4, text=12)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected
    if wrapped:
        torch.save({"state_dict": stored, "step": 267_000}, path)
    assert same(read_unet(str(path), FOUR_LEVELS).state_dict(), unet.state_dict())


def test_each_layout_names_what_does_not_fit(folder: Path, unet: UNet, tmp_path: Path) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    weights["conv_inn.weight"] = weights.pop("conv_in.weight")
    weights["conv_out.bias"] = torch.zeros(5)
    save_file(weights, folder / "unet" / WEIGHTS)
    message = (
        r"unet: conv_in\.weight is missing; conv_inn\.weight is not in the model; conv_out\.bias is \[5\], not \[4\]$"
    )
    with pytest.raises(ValueError, match=message):
        read_unet(str(folder))

    checkpoint = ldm_checkpoint(image_unet())
    save_file({name: t for name, t in checkpoint.items() if "input_blocks.2." not in name}, tmp_path / "sd.safetensors")
    with pytest.raises(
        ValueError, match=r"sd.safetensors: input_blocks\.2\.0\.op\.bias is missing; .*weight is missing$"
    ):
        read_unet(str(tmp_path / "sd.safetensors"), TINY)

    write_modelscope(str(tmp_path / "ms.pth"), unet.state_dict(), TINY)
    stored = torch.load(tmp_path / "ms.pth", weights_only=True)
    torch.save({name: t for name, t in stored.items() if "conv4.3" not in name}, tmp_path / "ms.pth")
    with pytest.raises(
        ValueError, match=r"ms.pth: input_blocks.*temopral_conv\.conv4\.3\.bias is missing; .*and \d+ more"
    ):
        read_unet(str(tmp_path / "ms.pth"), TINY)


def test_what_is_no_unet_or_another_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model.start: .*nowhere: there is no such file or folder"):
        start_weights(str(tmp_path / "nowhere"), TINY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model.start: .*empty has no config.json"):
        start_weights(str(tmp_path / "empty"), TINY)
    with pytest.raises(
        ValueError, match=r"model.start: .*unet: block_out_channels is \[16, 32\], model.unet has \[8, 8"
    ):
        start_weights(str(folder), FOUR_LEVELS)
    save_file({"visual.proj": torch.ones(2)}, tmp_path / "clip.safetensors")
    with pytest.raises(
        ValueError, match=r"clip.safetensors: no UNet of a known layout; its first tensors are visual.proj"
    ):
        start_weights(str(tmp_path / "clip.safetensors"), TINY)
    shutil.rmtree(folder / "unet")
    with pytest.raises(FileNotFoundError, match="pipeline has no config.json"):
        read_unet(str(folder))


def test_the_first_published_config_is_read() -> None:
    published = diffusers_config(ModelConfig().unet, latent_size=32)
    del published["num_attention_heads"], published["time_cond_proj_dim"]
    published |= {"_diffusers_version": "0.15.0.dev0", "class_embed_type": None, "flip_sin_to_cos": True}
    published |= {"center_input_sample": False, "mid_block_type": "UNetMidBlock3DCrossAttn", "freq_shift": 0}
    assert unet_config(published) == ModelConfig().unet


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", "UNetMotionModel"),
        ("act_fn", "gelu"),
        ("out_channels", 8),
        ("down_block_types", ["DownBlock3D"] * 4),
        ("attention_head_dim", [5, 10, 20, 20]),
    ],
)
def test_a_video_unet_of_another_kind_is_refused(name: str, value: Any) -> None:
    values = diffusers_config(ModelConfig().unet) | {name: value}
    with pytest.raises(ValueError, match=name):
        unet_config(values)


def test_stable_diffusions_config_is_read() -> None:
    fixed = {"in_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "only_cross_attention": False}
    assert image_unet_config(STABLE_DIFFUSION | fixed) == UNetConfig()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attention_head_dim", 8, "8 heads for .* this UNet has one width of heads"),  # Stable Diffusion 1.5
        ("attention_head_dim", [5, 10], r"\[5, 10\] heads for"),
        ("in_channels", 9, "out_channels is 4, this UNet has 9"),  # inpainting
        ("resnet_time_scale_shift", "scale_shift", "resnet_time_scale_shift"),
        ("cross_attention_dim", None, None),
    ],
)
def test_an_image_unet_of_another_kind_is_refused(name: str, value: Any, message: str | None) -> None:
    values = STABLE_DIFFUSION | {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32}
    values = values | {name: value}
    if message is None:
        del values[name]
    with pytest.raises(ValueError, match=message or "somewhere: cross_attention_dim missing"):
        image_unet_config(values, "somewhere")
