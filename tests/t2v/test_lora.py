"""Low-rank updates: what is trained, with which gradients, at every stage of ZeRO, and what peft reads of it."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet3DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2v import fused, storage, validation
from t2v.config import LoraConfig, TrainConfig, UNetConfig
from t2v.identity import keep_identity
from t2v.lora import Adapter, LowRank, choose_trained, trained_shapes
from t2v.memory import count_weights
from t2v.plan import make_plan, sample_flops
from t2v.published import diffusers_config, start_weights
from t2v.unet import UNet
from tests.t2v.conftest import randomise
from tests.t2v.test_trainer import HALF, WHOLE, furthest, losses, read_state_names, train
from tests.t2v.test_unet import inputs
from tests.t2v.train_ranks import job

CONVOLUTIONS = LoraConfig(rank=3, alpha=5, targets=["to_q", "to_v", "resnets.0.conv1", "conv4.3", "net.2"])
LORAS = pytest.mark.parametrize("lora", [LoraConfig(rank=4), CONVOLUTIONS], ids=["attention", "convolutions too"])


def adapted(unet: UNet, lora: LoraConfig, std: float = 0.0) -> UNet:
    """A copy of `unet` that trains updates, whose B has values of this deviation."""
    unet = copy.deepcopy(unet)
    torch.manual_seed(0)
    choose_trained(unet, TrainConfig(trained="lora", lora=lora))
    for name, weight in unet.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(weight, std=std)
    return unet


def adapter_of(unet: UNet, lora: LoraConfig) -> Adapter:
    trained = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    return Adapter(lora, trained, base="")


@LORAS
def test_a_model_begins_as_its_base_and_trains_nothing_but_a_and_b(tiny_unet: UNet, lora: LoraConfig) -> None:
    call, unet = inputs(tiny_unet.config, b=2, f=3), adapted(tiny_unet, lora)
    assert torch.equal(unet(*call), tiny_unet(*call))
    unet(*call).square().mean().backward()
    trained = {name for name, weight in unet.named_parameters() if weight.grad is not None}
    assert trained == set(trained_shapes(unet))
    assert trained and {name.rsplit(".", 1)[-1] for name in trained} == {"lora_A", "lora_B"}
    sizes = sum(shape.numel() for shape in trained_shapes(unet).values())
    counted = count_weights(tiny_unet.config, TrainConfig(trained="lora", lora=lora))
    assert counted[:2] == (sum(weight.numel() for weight in unet.parameters()), sizes)
    assert 0 < counted[2] < counted[0]
    assert adapted(tiny_unet, lora).state_dict().keys() == unet.state_dict().keys()
    again = adapted(tiny_unet, lora).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in unet.state_dict().items())


def compare_with_merged(base: UNet, lora: LoraConfig, call: tuple[Tensor, ...], use: Callable[[], None]) -> None:
    """The output and the gradients by A and B beside those of a plain model of the merged weights; `use` is between."""
    unet = adapted(base, lora, std=0.1)
    adapter = adapter_of(unet, lora)
    expected = torch.func.functional_call(base, adapter.merged(dict(base.named_parameters())), call)
    trained = list(adapter.tensors.values())
    gradients = torch.autograd.grad(expected.square().mean(), trained, materialize_grads=True)
    assert (expected - base(*call)).norm() > 0.01 * expected.norm()
    use()
    found = unet(*call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(found.square().mean(), trained, materialize_grads=True)
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-7
    assert sum(bool(one.any()) for one in gradients) > len(gradients) / 2


@LORAS
def test_gradients_are_those_of_merged_weights(tiny_unet: UNet, lora: LoraConfig) -> None:
    compare_with_merged(tiny_unet, lora, inputs(tiny_unet.config, b=2, f=3), lambda: None)


def test_so_they_are_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = UNetConfig(block_out_channels=[16], layers_per_block=1, head_dim=16, text_dim=8, norm_groups=2, dropout=0)
    call = tuple(x.to(device) for x in inputs(config, b=1, f=2))

    def use() -> None:
        for name in ("_on_gpu", "_attends"):
            monkeypatch.setattr(fused, name, lambda *_: True)

    monkeypatch.setattr(fused, "_on_gpu", lambda _: False)
    compare_with_merged(randomise(UNet(config)).to(device).eval(), CONVOLUTIONS, call, use)  # type: ignore[arg-type]


def test_updates_below_the_steps_of_16_bits_are_not_lost() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    update = LowRank(weight, LoraConfig(rank=1, alpha=1), torch.bfloat16).bfloat16()
    torch.nn.init.constant_(update.lora_A, 1.0)
    torch.nn.init.constant_(update.lora_B, 2**-12)  # most weights' steps are 2^-9 to 2^-7
    moved = update(weight.bfloat16()).double() - weight.double()
    assert float(moved.detach().mean()) == pytest.approx(2**-12, rel=0.1)


@LORAS
def test_peft_loads_the_adapter_into_diffusers_unet(tiny_unet: UNet, lora: LoraConfig, tmp_path: Path) -> None:
    unet = adapted(tiny_unet, lora, std=0.1)
    adapter_of(unet, lora).write(tmp_path / "lora")
    theirs = UNet3DConditionModel.from_config(diffusers_config(tiny_unet.config))
    theirs.load_state_dict(tiny_unet.state_dict())
    theirs = PeftModel.from_pretrained(theirs.eval(), str(tmp_path / "lora"))
    call = inputs(tiny_unet.config, b=2, f=3)
    with torch.no_grad():
        torch.testing.assert_close(theirs(*call).sample, unet(*call), rtol=1e-4, atol=1e-5)


def test_names_of_layers_that_are_none_are_refused(tiny_unet: UNet) -> None:
    for name, said in (("to_x", "the UNet has no layer to_x"), ("norm1", "norm1 is no linear layer")):
        with pytest.raises(ValueError, match=f"train.lora.targets: .*{said}"):
            adapted(tiny_unet, LoraConfig(targets=["to_q", name]))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks that adapt a whole model."""
    folder = tmp_path_factory.mktemp("lora")
    shutil.copytree(data, folder / "data")
    unet = randomise(UNet(job("", 1).model.unet))
    storage.write_json(str(folder / "data/start/unet/config.json"), diffusers_config(unet.config))  # type: ignore[attr-defined]
    save_file(unet.state_dict(), folder / "data/start/unet/diffusion_pytorch_model.safetensors")
    half = [f"2 fp32/checkpoint-{HALF}"]
    train(
        folder / "data",
        folder,
        2,
        leg("2 fp32", 2, "fp32"),
        leg("resumed", 2, "fp32") | {"from": half},
        leg("0 fp32", 0, "fp32"),
        leg("3 bf16", 3, "bf16"),  # the last: at stage 3 DeepSpeed puts its own linear layer into the process
    )
    return folder


def leg(name: str, stage: int, precision: str) -> dict:
    changes = {"trained": "lora", "zero_stage": stage, "precision": precision, "learning_rate": 1e-2}
    return {"run": name, "samples": WHOLE, "train": changes}


def test_stages_of_zero_train_alike_and_a_resumed_run_as_an_uninterrupted_one(folder: Path) -> None:
    straight = losses(folder / "2 fp32")
    np.testing.assert_allclose(losses(folder / "0 fp32"), straight, rtol=1e-6)
    np.testing.assert_allclose(losses(folder / "3 bf16"), straight, rtol=0.02)
    assert (losses(folder / "resumed") == straight[3:]).all()
    assert furthest(folder / "resumed", folder / "2 fp32") == 0
    names = read_state_names(folder / f"2 fp32/checkpoint-{HALF}")
    assert {name.rsplit(".", 1)[-1] for name in names} == {"lora_A", "lora_B"}


def test_a_milestone_is_the_merged_model_and_peft_makes_the_same_of_base_and_adapter(folder: Path) -> None:
    whole = job(str(folder / "2 fp32"), 2)
    whole.train.trained = "lora"
    checkpoint = f"{whole.run_dir}/checkpoint-{WHOLE}"
    validation.export(whole, checkpoint, WHOLE)
    base = UNet3DConditionModel.from_pretrained(f"{whole.run_dir}/start/unet")
    merged = UNet3DConditionModel.from_pretrained(f"{whole.model_folder}/unet")
    call = inputs(whole.model.unet, b=2, f=3)
    with torch.no_grad():
        start, expected = base(*call).sample, merged(*call).sample
        found = PeftModel.from_pretrained(base, f"{whole.model_folder}/lora")(*call).sample
    assert (expected - start).norm() > 1e-3 * start.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    adapter = load_file(f"{whole.model_folder}/lora/adapter_model.safetensors")
    average: dict[str, Tensor] = load_file(folder / "2 fp32/average.safetensors")
    assert sorted(map(float, (t.double().sum() for t in adapter.values()))) == sorted(
        map(float, (t.double().sum() for t in average.values()))
    )


def test_what_a_run_needs_and_keeps(folder: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "run")
    whole = job(str(tmp_path / "run"), 2)
    whole.train.trained = "lora"
    assert "parameters trained" in "\n".join(make_plan(whole).lines())
    everything = sample_flops(replace(whole, train=replace(whole.train, trained="all")))
    assert {stream: 2 * flops / 3 for stream, flops in everything.items()} == pytest.approx(sample_flops(whole))
    with pytest.raises(ValueError, match="model.start: .* is an image model; train.trained lora adapts"):
        start_weights(f"{data}/start", whole.model.unet, whole=True)
    with pytest.raises(ValueError, match="model.start is not set: train.trained lora"):
        replace(whole, model=replace(whole.model, start=None)).sources()
    keep_identity(whole)
    keep_identity(whole)
    for changes in ({"lora": LoraConfig(rank=2)}, {"trained": "all"}):
        with pytest.raises(ValueError, match=r"another lora \(was \{'alpha': 16"):
            keep_identity(replace(whole, train=replace(whole.train, **changes)))
    identity = json.loads((tmp_path / "run/train/identity.json").read_text())
    assert identity["lora"]["targets"] == ["to_q", "to_k", "to_v", "to_out.0"]
