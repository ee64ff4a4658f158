import pytest
import torch
from diffusers import UNet3DConditionModel

import t2v.blocks
from t2v import fused
from t2v.blocks import Transformer
from t2v.config import UNetConfig
from t2v.export import diffusers_config
from t2v.unet import UNet
from tests.t2v.conftest import randomise

TINY = {
    "two levels": UNetConfig(
        block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=24, norm_groups=8, dropout=0
    ),
    "three levels, wide heads": UNetConfig(
        block_out_channels=[16, 48, 32], layers_per_block=2, head_dim=16, text_dim=12, norm_groups=4, dropout=0
    ),
    "four levels": UNetConfig(
        channels=3,
        block_out_channels=[8, 8, 16, 24],
        layers_per_block=1,
        head_dim=4,
        text_dim=8,
        norm_groups=8,
        dropout=0,
    ),
}


def twin(config: UNetConfig) -> UNet3DConditionModel:
    return UNet3DConditionModel.from_config(diffusers_config(config))


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def inputs(config: UNetConfig, b: int, f: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(b * 100 + f)
    height = 2 ** len(config.block_out_channels)
    latents = torch.randn(b, config.channels, f, height, height // 2)
    return latents, torch.randint(0, 1000, (b,)), torch.randn(b, 7, config.text_dim)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_the_published_size_has_the_published_parameters():
    with torch.device("meta"):
        unet, published = UNet(UNetConfig()), twin(UNetConfig())
    assert shapes(unet) == shapes(published)
    assert len(unet.state_dict()) == 1480
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    temporal = (size for name, size in sizes.items() if "temp_" in name or name.startswith("transformer_in"))
    assert (sum(sizes.values()), sum(temporal)) == (1_411_233_860, 545_323_136)


@pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
def test_names_and_shapes_are_those_of_diffusers_at_any_size(config):
    with torch.device("meta"):
        assert shapes(UNet(config)) == shapes(twin(config))


@pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
def test_forward_equals_diffusers(config):
    unet, published = randomise(UNet(config)).eval(), twin(config).eval()
    published.load_state_dict(unet.state_dict())
    for f in (1, 2, 5, 16):
        for b in (1, 3):
            latents, timesteps, text = inputs(config, b, f)
            with torch.no_grad():
                ours, theirs = unet(latents, timesteps, text), published(latents, timesteps, text).sample
            assert relative_error(ours, theirs) <= 1e-5, (f, b)


def test_gradients_equal_diffusers():
    config = TINY["two levels"]
    unet, published = randomise(UNet(config)), twin(config).eval()
    published.load_state_dict(unet.state_dict())
    latents, timesteps, text = inputs(config, b=2, f=3)
    unet(latents, timesteps, text).square().sum().backward()
    published(latents, timesteps, text).sample.square().sum().backward()
    theirs = dict(published.named_parameters())
    scale = max(parameter.grad.norm() for parameter in theirs.values())
    for name, parameter in unet.named_parameters():
        assert (parameter.grad - theirs[name].grad).norm() <= 1e-4 * theirs[name].grad.norm() + 1e-7 * scale, name


def test_one_frame_leaves_exact_zeros_in_gradients_it_does_not_determine(tiny_unet):
    latents, timesteps, text = inputs(tiny_unet.config, b=2, f=1)
    tiny_unet(latents, timesteps, text).square().sum().backward()
    for name, parameter in tiny_unet.named_parameters():
        if parameter.ndim == 5:
            assert parameter.grad[:, :, [0, 2]].abs().max() == 0, name
            assert parameter.grad[:, :, 1].abs().max() > 0, name
        elif ("temp_attentions" in name or "transformer_in" in name) and (".to_q." in name or ".to_k." in name):
            assert parameter.grad.abs().max() == 0, name
        else:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("f", [2, 16])
def test_gradients_come_in_one_order_whatever_the_number_of_frames(tiny_unet, f):
    """ZeRO reduces gradients in the order in which they come, and one rank may have images while another has videos."""
    assert order_of_gradients(tiny_unet, 1) == order_of_gradients(tiny_unet, f)


def order_of_gradients(unet: UNet, f: int) -> list[str]:
    seen: list[str] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
        for name, parameter in unet.named_parameters()
    ]
    unet(*inputs(unet.config, b=1, f=f)).square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks)
    return seen


def test_temporal_parts_begin_as_the_identity():
    unet = UNet(TINY["three levels, wide heads"]).eval()
    for name, module in unet.named_modules():
        if isinstance(module, t2v.blocks.SpatialConv) or (name.endswith("proj_out") and ".attentions." in name):
            randomise(module)
    latents, timesteps, text = inputs(unet.config, b=2, f=3)
    with torch.no_grad():
        video = unet(latents, timesteps, text)
        frames = [unet(latents[:, :, [index]], timesteps, text) for index in range(3)]
    assert video.std() > 0.01
    assert relative_error(video, torch.cat(frames, dim=2)) <= 1e-5


def test_compiled_as_one_graph_for_every_batch_size():
    """The last batch is often smaller: it must neither break the graph nor have it made again."""
    config = UNetConfig(block_out_channels=[16], layers_per_block=1, head_dim=8, text_dim=24, norm_groups=8)
    unet = randomise(UNet(config)).eval()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for b in (5, 2):
            call = inputs(config, b, 3)
            for x in call:
                torch._dynamo.mark_dynamic(x, 0)
            assert relative_error(compiled(*call), unet(*call)) <= 1e-5


def test_attention_over_time_has_no_sense_of_order():
    attention = randomise(Transformer(16, 32, head_dim=8, groups=4))
    x, order = torch.randn(2, 5, 6, 16), torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        assert torch.allclose(attention(x)[:, order], attention(x[:, order]), atol=1e-5)


def test_more_heads_than_one_call_takes_change_nothing(tiny_unet, monkeypatch):
    call = inputs(tiny_unet.config, b=2, f=3)
    with torch.no_grad():
        expected = tiny_unet(*call)
        monkeypatch.setattr(fused, "MAX_HEADS", 5)
        assert torch.allclose(tiny_unet(*call), expected, atol=1e-5)


@pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
def test_several_texts_for_each_latent_are_as_many_calls(config):
    unet = randomise(UNet(config)).eval()
    latents, timesteps, first = inputs(config, b=2, f=3)
    with torch.no_grad():
        together = unet(latents, timesteps, torch.cat([first, 1 - first]))
        apart = [unet(latents, timesteps, text) for text in (first, 1 - first)]
    assert relative_error(together, torch.cat(apart)) <= 1e-5


@pytest.mark.parametrize(("dropout", "same"), [(0.0, True), (0.5, False)])
def test_dropout_acts_in_training_only(dropout, same):
    config = UNetConfig(
        block_out_channels=[16], layers_per_block=1, head_dim=8, text_dim=8, norm_groups=8, dropout=dropout
    )
    unet, call = randomise(UNet(config)), inputs(config, b=1, f=2)
    with torch.no_grad():
        assert torch.equal(unet.train()(*call), unet(*call)) == same
        assert torch.equal(unet.eval()(*call), unet(*call))


@pytest.mark.parametrize(
    ("latents", "timesteps", "text", "message"),
    [
        ((1, 4, 2, 6, 7), 1, (1, 7, 24), "multiples of 2, .* 2 levels; choose a size in pixels that 16 divides"),
        ((1, 3, 2, 8, 8), 1, (1, 7, 24), r"latents: \(1, 3, 2, 8, 8\) is not \[b, 4, f, h, w\]"),
        ((1, 4, 8, 8), 1, (1, 7, 24), "latents: "),
        ((2, 4, 2, 8, 8), 1, (2, 7, 24), "timesteps: "),
        ((1, 4, 2, 8, 8), 1, (1, 7, 32), r"text: \(1, 7, 32\) is not \[1, l, 24\]"),
        ((2, 4, 2, 8, 8), 2, (3, 7, 24), r"text: .* is not \[2, l, 24\], or several times as many"),
    ],
)
def test_wrong_shapes_are_named(tiny_unet, latents, timesteps, text, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(torch.zeros(latents), torch.zeros(timesteps, dtype=torch.int64), torch.zeros(text))
