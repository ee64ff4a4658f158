"""The UNet and its spatio-temporal block (paper 3.2, Figs. 2 and 3) as one picture: `python -m dashboards.block`.

Drawn from the modules at the published size, on the meta device: a forward pass tells sizes, order and skips, the
modules their layers and parameters, and a narrow twin with real values which weights start at zero. So it shows what
the code does, and a test fails where it no longer does. Space is cool and time warm, on paper of its own.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Size, nn

from pipelines.config import DataConfig
from t2v.blocks import Attention, FeedForward, SpatialConv, TemporalConv
from t2v.config import TextConfig, UNetConfig
from t2v.keys import is_temporal
from t2v.unet import Level, UNet

OUT = Path(__file__).with_name("block.svg")
FRAMES, SIDE = DataConfig.frames, DataConfig.size // 8  # of the latents
PARTS: dict[str, tuple[str, type[nn.Module]]] = {  # of a level: what they are, and what is counted in one
    "resnets": ("spatial convolutions", SpatialConv),
    "temp_convs": ("temporal convolutions", TemporalConv),
    "attentions": ("spatial attentions", Attention),
    "temp_attentions": ("temporal attentions", Attention),
}
NORMS = (nn.GroupNorm, nn.LayerNorm)
LAYERS = (nn.Conv2d, nn.Conv3d, nn.Linear, Attention, FeedForward)
INKS = {  # by day and by night
    "paper": ("#faf9f6", "#15171c"),
    "card": ("#ffffff", "#1d2027"),
    "ink": ("#33343a", "#e4e4e0"),
    "quiet": ("#6f7077", "#9fa0a8"),
    "rule": ("#c4c2bb", "#50545f"),
    "resnets": ("#3b6ea8", "#6ea3e0"),
    "attentions": ("#8db4da", "#3f6c9f"),
    "rest": ("#b9b8b2", "#5f626b"),
    "temp_attentions": ("#edb083", "#a8643a"),
    "temp_convs": ("#cb6427", "#eb9257"),
}
STYLE = """text{font:11px system-ui,sans-serif}.b{font-weight:600;font-size:13px}.h{font-weight:600;font-size:16px}
.m{text-anchor:middle}.e{text-anchor:end}.tint{fill-opacity:.2}.edge{fill:none;stroke-width:1.3}"""
TIP = '<marker id="tip" viewBox="0 0 6 6" refX="3" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
DOWN, UP, LEFT, RIGHT = 92, 318, 488, 846  # where the ways down and up begin; where the parts of the block do, and end
TOP, ROW, CARD = 150, 88, 92  # where the levels begin, from one to the next; height of a part
Seen = dict[str, tuple[Size, int]]  # of levels and their parts, the shape of the (first) output, the number of skips


def watch(unet: UNet) -> Seen:
    """What a forward pass tells of levels and their parts, in the order in which they end."""
    seen: Seen = {}
    names = {module: name for name, module in unet.named_modules()}

    def note(module: nn.Module, inputs: tuple, output: Any) -> None:
        first = output[0] if isinstance(output, list) else output
        seen[names[module]] = first.shape, len(inputs[3]) if len(inputs) > 3 else 0

    for module, name in names.items():
        if isinstance(module, Level) or PARTS.keys() & name.split(".")[-2:-1]:
            module.register_forward_hook(note)
    latents, words = (1, unet.config.channels, FRAMES, SIDE, SIDE), (1, TextConfig().context, unet.config.text_dim)
    unet(*(torch.empty(shape, device="meta") for shape in (latents, (1,), words)))
    return seen


def zeros(config: UNetConfig) -> set[str]:
    """Names of the modules whose weights start at zero, as a narrow UNet of the same build shows."""
    widths = [8] * len(config.block_out_channels)
    twin = UNet(replace(config, block_out_channels=widths, head_dim=8, norm_groups=1, text_dim=8))
    values = {name.removesuffix(".weight"): value for name, value in twin.named_parameters() if "weight" in name}
    return {name for name, value in values.items() if not value.any()}


def size(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def totals(unet: UNet) -> Counter[str]:
    """Parameters by kind of part in the whole UNet; what is temporal outside of the levels is an attention."""
    count: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        other = "temp_attentions" if is_temporal(name) else "rest"
        count[next((part for part in PARTS if part in name.split(".")), other)] += parameter.numel()
    return count


def leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The norms and layers below `module` in order, by name."""
    for child, inner in module.named_children():
        path = f"{name}.{child}"
        yield from [(path, inner)] if isinstance(inner, NORMS + LAYERS) else leaves(inner, path)


def label(path: str, layer: Any) -> str:
    if isinstance(layer, TemporalConv):
        return f"{layer.kernel_size[0]} frames"
    if isinstance(layer, SpatialConv):
        return " × ".join(map(str, layer.kernel_size))
    if isinstance(layer, Attention):
        return "self" if layer.to_k.in_features == layer.to_q.in_features else "text"
    return "feed-forward" if isinstance(layer, FeedForward) else "+ timestep" if "time" in path else "linear"


def text(x: float, y: float, words: str, kind: str = "quiet") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "card rule-edge edge", corner: int = 6) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:.4g}" height="{height:g}" rx="{corner}" class="{kind}"/>'


def line(path: str, tip: str = ' marker-end="url(#tip)"') -> str:
    return f'<path d="{path}" class="rule-edge edge"{tip}/>'


def millions(count: int, digits: int = 1) -> str:
    return f"{count / 1e6:,.{digits}f} M"


def level(x: float, y: float, name: str, unet: UNet, seen: Seen) -> str:
    """Width and parameters of one level and, a row each, the parts that its blocks call."""
    calls = [call.removeprefix(f"{name}.").split(".") for call in seen if call.startswith(f"{name}.")]
    drawn = box(x, y, 126, 64) + text(x + 12, y + 28, f"{seen[name][0][-1]:,}", "ink b")
    drawn += text(x + 12, y + 47, millions(size(unet.get_submodule(name))))
    above = 33.5 - 6 * len({index for _, index in calls})
    for place, (part, index) in enumerate(calls):
        column = sum(other == index for _, other in calls[:place])
        drawn += box(x + 68 + 12 * column, y + above + 12 * int(index), 9, 9, part, 2)
    return drawn


def ends(unet: UNet, zero: set[str]) -> Iterator[str]:
    """What stands before the levels and after them."""
    yield text(48, TOP - 32, f"{FRAMES} frames", "quiet m")
    for x, words, names in ((DOWN, "noisy latents", ("conv_in", "transformer_in")), (UP, "noise", ("conv_out",))):
        yield text(x + 63, TOP - 60, f"{words}, {unet.config.channels} channels", "quiet m") + box(x, TOP - 50, 126, 28)
        yield text(x + 12, TOP - 32, millions(size(*map(unet.get_submodule, names)), 2))
        for place, name in enumerate(names):
            kind = "temp_attentions" if is_temporal(f"{name}.") else "rest"
            yield box(x + 68 + 12 * place, TOP - 40.5, 9, 9, f"{kind}-edge edge" if name in zero else kind, 2)
    yield line(f"M{DOWN + 63} {TOP - 22}V{TOP - 3}") + line(f"M{UP + 63} {TOP}V{TOP - 19}")


def ways(unet: UNet, seen: Seen) -> Iterator[str]:
    """The levels going down, the middle, the levels going up, and the skips between them."""
    depth, down, up, center = len(unet.down_blocks), DOWN + 63, UP + 63, (DOWN + UP + 126) // 2
    bottom = TOP + ROW * depth + 4
    for row in range(depth):
        y, descent, ascent = TOP + ROW * row, f"down_blocks.{row}", f"up_blocks.{depth - 1 - row}"
        side = seen[descent][0][2]
        yield box(48 - side / 2, y + 22 - side / 2, side, side, corner=1)
        yield text(48, y + 54, f"{side} × {side}", "quiet m")
        yield level(DOWN, y, descent, unet, seen) + level(UP, y, ascent, unet, seen)
        yield line(f"M{DOWN + 126} {y + 32}H{UP - 3}") + text(center, y + 25, f"{seen[ascent][1]} skips", "quiet m")
        if row < depth - 1:
            yield line(f"M{down} {y + 64}V{y + ROW - 3}") + line(f"M{up} {y + ROW}V{y + 67}")
    yield line(f"M{down} {bottom - 28}V{bottom + 32}H{center - 66}")
    yield line(f"M{center + 63} {bottom + 32}H{up}V{bottom - 25}")
    yield level(center - 63, bottom, "mid_block", unet, seen)


def chips(y: float, name: str, part: nn.Module, zero: set[str]) -> Iterator[str]:
    """The layers of a part from left to right, norms counted with what follows them; hollow if zero at the start."""
    found, count = [], 0
    for path, leaf in leaves(part, name):
        count += size(leaf)
        if isinstance(leaf, LAYERS):
            found.append((label(path, leaf), count, path in zero))
            count = 0
    x, unit = LEFT + 12.0, (RIGHT - LEFT - 16 - 8 * len(found)) / sum(len(words) + 3 for words, _, _ in found)
    for words, count, hollow in found:
        width, kind = unit * (len(words) + 3), name.split(".")[-2]
        yield box(x, y, width, 43, f"{kind}-edge edge" if hollow else f"{kind} tint", 4)
        yield text(x + width / 2, y + 18, words, "ink m") + text(x + width / 2, y + 34, millions(count, 2), "quiet m")
        x += width + 8


def residual(y: int, number: int, name: str, part: nn.Module, zero: set[str]) -> Iterator[str]:
    """One part of the block, and the way around it."""
    kind, center, plus = name.split(".")[-2], (LEFT + RIGHT) // 2, y + CARD + 11
    title, counted = PARTS[kind]
    count = sum(isinstance(inner, counted) for inner in part.modules())
    yield line(f"M{center} {y - 11}H{RIGHT + 20}V{plus}H{center + 9}")
    yield line(f"M{center} {y + CARD}V{plus + 20}") + box(center - 6, plus - 6, 12, 12, "paper rule-edge edge")
    yield line(f"M{center - 6} {plus}h12M{center} {plus - 6}v12", "")
    yield box(LEFT, y, RIGHT - LEFT, CARD) + box(LEFT + 12, y + 13, 11, 11, kind, 2)
    yield text(LEFT + 31, y + 23, title, "ink b")
    yield text(RIGHT - 12, y + 23, f"N{chr(0x2080 + number)} = {count} · {millions(size(part), 2)}", "quiet e")
    yield from chips(y + 37, name, part, zero)


def balance(y: int, unet: UNet) -> Iterator[str]:
    """All parameters as one bar, the temporal ones at its end."""
    count, x = totals(unet), 28.0
    temporal = sum(value.numel() for name, value in unet.named_parameters() if is_temporal(name))
    yield text(28, y, f"{millions(size(unet))} parameters, {millions(temporal)} of them temporal", "ink b")
    yield box(716, y - 9, 9, 9, "quiet-edge edge", 2) + text(731, y, "starts at zero")
    for place, kind in enumerate(kind for kind in INKS if kind in count):
        width, left = 844 * count[kind] / size(unet), 28 + 172 * place
        yield box(x, y + 13, width - 2, 12, kind, 2) + box(left, y + 39, 9, 9, kind, 2)
        yield text(left + 15, y + 47, PARTS[kind][0] if kind in PARTS else "all else")
        yield text(left + 15, y + 63, millions(count[kind]), "ink")
        x += width


def rules(page: int) -> str:
    """The inks of the page of day (0) or night (1): a name alone fills, and as an edge draws a line."""
    return "".join(f".{name}{{fill:{ink[page]}}}.{name}-edge{{stroke:{ink[page]}}}" for name, ink in INKS.items())


def figure() -> str:
    """The whole picture as SVG: the UNet at the left, a block of its first level at the right, the sums below."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    seen, zero = watch(unet), zeros(unet.config)
    parts = {name: unet.get_submodule(name) for name in seen if name.startswith("down_blocks.0.") and name[-2:] == ".0"}
    lines = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 712" width="900" height="712" role="img">']
    lines += ["<title>The UNet and its spatio-temporal block</title>"]
    lines += [f"<style>{STYLE}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}</style>"]
    lines += [f'{TIP}<path d="M0 0L6 3L0 6Z" class="rule"/></marker>', box(0, 0, 900, 712, "paper", 12)]
    lines += [text(28, 38, "The UNet", "ink h"), text(LEFT, 38, "One spatio-temporal block", "ink h")]
    lines += [text(28, 57, "width and parameters of its levels, a row of squares for each block")]
    lines += [text(LEFT, 57, f"on the first level, {millions(size(*parts.values()))} parameters")]
    lines += [*ends(unet, zero), *ways(unet, seen), line(f"M{(LEFT + RIGHT) // 2} {TOP - 73}v20")]
    for number, (name, part) in enumerate(parts.items()):
        lines += residual(TOP - 50 + 126 * number, number + 1, name, part, zero)
    return "\n".join([*lines, *balance(632, unet), "</svg>\n"])


if __name__ == "__main__":
    OUT.write_text(figure())
