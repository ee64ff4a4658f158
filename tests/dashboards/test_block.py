"""The figure of the UNet says what its modules say."""

from collections import Counter
from xml.etree import ElementTree

import pytest
import torch

from dashboards import block
from t2v.blocks import Attention, FeedForward, SpatialConv, TemporalConv
from t2v.config import UNetConfig
from t2v.keys import is_temporal
from t2v.unet import UNet

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn() -> str:
    return block.figure()


@pytest.fixture(scope="module")
def unet() -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig())


@pytest.fixture(scope="module")
def words(drawn: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_the_committed_figure_is_what_the_modules_draw(drawn: str) -> None:
    assert block.OUT.read_text() == drawn, "stale: run python -m dashboards.block"
    assert len(drawn.encode()) < 40_000
    assert drawn.count("http") == 1 and "@import" not in drawn  # the namespace alone: nothing from outside


def test_every_part_is_named_with_its_count_and_its_parameters(unet: UNet, words: list[str]) -> None:
    kinds = {"resnets": SpatialConv, "temp_convs": TemporalConv, "attentions": Attention, "temp_attentions": Attention}
    title = {"resnets": "spatial conv", "temp_convs": "temporal conv", "attentions": "spatial att"}
    for number, (part, kind) in enumerate(kinds.items()):
        path = f"down_blocks.0.{part}.0."
        count = sum(isinstance(module, kind) for name, module in unet.named_modules() if name.startswith(path))
        size = sum(value.numel() for name, value in unet.named_parameters() if name.startswith(path))
        place = words.index(f"N{'₁₂₃₄'[number]} = {count} · {size / 1e6:.2f} M")
        assert words[place - 1].startswith(title.get(part, "temporal att"))


def test_every_layer_of_the_block_is_named(unet: UNet, words: list[str]) -> None:
    level = unet.down_blocks[0]
    count = Counter(type(module) for part in block.PARTS for module in getattr(level, part)[0].modules())
    said = Counter(words)
    assert said["3 × 3"] == count[SpatialConv]
    assert said["3 frames"] == count[TemporalConv]
    assert said["self"] + said["text"] == count[Attention]
    assert said["text"] == 1
    assert said["feed-forward"] == count[FeedForward]


def test_the_sums_are_those_of_the_unet(unet: UNet, words: list[str]) -> None:
    sizes = {name: value.numel() for name, value in unet.named_parameters()}
    temporal = sum(size for name, size in sizes.items() if is_temporal(name))
    assert f"{sum(sizes.values()) / 1e6:,.1f} M parameters, {temporal / 1e6:.1f} M of them temporal" in words
    assert sum(block.totals(unet).values()) == sum(sizes.values())
    assert block.totals(unet)["temp_convs"] + block.totals(unet)["temp_attentions"] == temporal


def test_levels_stand_with_their_sizes_blocks_and_skips(unet: UNet, drawn: str, words: list[str]) -> None:
    sides = [32 // 2**index for index in range(len(unet.down_blocks))]
    assert [word for word in words if " × " in word and word != "3 × 3"] == [f"{side} × {side}" for side in sides]
    assert words.count("3 skips") == len(unet.up_blocks)
    levels = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    squares = Counter(
        element.get("class") for element in ElementTree.fromstring(drawn).iter(f"{SVG}rect") if _is_square(element)
    )
    parts = {part: sum(len(getattr(level, part)) for level in levels) for part in block.PARTS}
    parts["temp_attentions"] += 1  # at the start of the UNet
    assert {part: squares[part] - 1 for part in parts} == parts  # one more in the legend


def test_what_starts_at_zero_is_hollow_and_ends_every_part(unet: UNet, drawn: str) -> None:
    zero = block.zeros(unet.config)
    assert {name.split(".")[-1] for name in zero if "temp_convs" not in name} == {"conv2", "proj_out", "conv_out"}
    assert all("conv4" in name for name in zero if "temp_convs" in name)
    assert [drawn.count(f'"{part}-edge edge"') for part in block.PARTS] == [1, 1, 1, 1]


def _is_square(element: ElementTree.Element) -> bool:
    return element.get("width") == element.get("height") == "9"
