"""The miniature's corpus: captioned clips and pictures of one coloured shape that moves over a grey background.

A caption says what must be seen and a scene holds all that is needed to draw it, so colour, shape, direction
and background can be read back from the pixels (pipelines/judge.py) of a real clip or of a generated one.

Lengths are in sides of the middle square, the part that training and scoring look at; its centre is (0, 0),
x points right and y points down.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from pipelines.config import CorpusConfig

Split = Literal["train", "pictures", "test"]

# RGB. All saturated, against backgrounds that are grey, and at least 29 degrees of hue apart.
COLOURS = {
    "red": (226, 26, 34),
    "orange": (255, 122, 10),
    "yellow": (250, 238, 20),
    "green": (30, 172, 48),
    "cyan": (16, 206, 214),
    "blue": (32, 80, 236),
    "purple": (138, 36, 214),
    "pink": (255, 64, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and to the left": (-1, -1),
    "up and to the right": (1, -1),
    "down and to the left": (-1, 1),
    "down and to the right": (1, 1),
}
BACKGROUNDS = ("plain", "striped", "checkered", "dotted")

WORDINGS = (
    "{noun} moves {direction} over a {background} background",
    "{noun} is moving {direction} across a {background} background",
)
STILL_WORDINGS = ("{noun} on a {background} background", "{noun} in front of a {background} background")


class Fields(NamedTuple):
    """What a caption states of a scene; None where it states nothing or nothing could be read."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None


VOCABULARY = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "background": BACKGROUNDS,
}


@dataclass(frozen=True)
class Scene:
    """All that is needed to draw one clip, or one picture where `direction` is None and nothing moves."""

    colour: str
    shape: str
    direction: str | None
    background: str
    wording: int = 0
    diameter: float = 0.35
    start: tuple[float, float] = (0.0, 0.0)
    speed: float = 0.0  # sides a second
    cell: float = 0.16  # width of a stripe; half the pitch of the dots
    phase: tuple[float, float] = (0.0, 0.0)
    greys: tuple[float, float] = (90.0, 170.0)  # of the ground and of what is painted on it
    duration_s: float = 0.0
    fps: int = 24
    height: int = 128
    width: int = 192

    @property
    def fields(self) -> Fields:
        """What the caption says of this scene."""
        return Fields(self.colour, self.shape, self.direction, self.background)


def caption(scene: Scene) -> str:
    """The sentence that states the scene's fields, in one of two wordings."""
    noun = f"{'an' if scene.colour[0] in 'aeiou' else 'a'} {scene.colour} {scene.shape}"
    wordings = STILL_WORDINGS if scene.direction is None else WORDINGS
    return wordings[scene.wording].format(noun=noun, direction=scene.direction, background=scene.background)


def parse_caption(text: str) -> Fields:
    """The fields that a caption states; ValueError for a sentence that `caption` cannot have written."""
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            return Fields(found["colour"], found["shape"], found.get("direction"), found["background"])
    raise ValueError(f"not a caption of the shapes corpus: {text!r}")


def _pattern(wording: str) -> re.Pattern[str]:
    words = {name: f"(?P<{name}>{'|'.join(labels)})" for name, labels in VOCABULARY.items()}
    noun = f"an? {words['colour']} {words['shape']}"
    return re.compile(wording.format(noun=noun, direction=words["direction"], background=words["background"]))


_PATTERNS = [_pattern(wording) for wording in WORDINGS + STILL_WORDINGS]


def position(scene: Scene, t_s: float) -> tuple[float, float]:
    """Centre of the shape t_s seconds into the clip: constant velocity from the start."""
    if scene.direction is None:
        return scene.start
    dx, dy = DIRECTIONS[scene.direction]
    step = scene.speed * t_s / np.hypot(dx, dy)
    return scene.start[0] + dx * step, scene.start[1] + dy * step


def render(scene: Scene, t_s: float, height: int, width: int) -> np.ndarray:
    """One frame of the scene, anti-aliased by distance to the edges.

    uint8 RGB [height, width, 3]. The middle square's side is min(height, width) pixels.
    """
    side = min(height, width)
    ground, painted = scene.greys
    grey = _background(scene.background, scene.cell, scene.phase, ground, painted, height, width)
    frame = np.repeat(grey[:, :, None], 3, axis=2)
    radius = scene.diameter * side / 2
    x, y = (position(scene, t_s)[axis] * side + extent / 2 for axis, extent in enumerate((width, height)))
    box = tuple(
        slice(max(int(centre - radius) - 1, 0), max(min(int(centre + radius) + 2, extent), 0))
        for centre, extent in ((y, height), (x, width))
    )
    v, u = (np.arange(s.start, s.stop, dtype=np.float32) + 0.5 for s in box)
    distance = signed_distance(scene.shape, ((u - x) / radius)[None, :], ((v - y) / radius)[:, None]) * radius
    cover = np.clip(0.5 - distance, 0, 1)[:, :, None]
    behind = frame[box].astype(np.float32)
    frame[box] = behind + cover * (np.array(COLOURS[scene.colour], np.float32) - behind) + 0.5
    return frame


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the shape's edge, negative inside, in radii of its enclosing circle or box.

    Exact near the edge, which is all that anti-aliasing needs. x and y broadcast against each other.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    if shape == "square":
        return _box(x, y, 0.86, 0.86)
    if shape == "cross":
        return np.minimum(_box(x, y, 1.0, 0.33), _box(x, y, 0.33, 1.0))
    if shape == "triangle":  # inside all three half-planes
        return _half_planes(x, y - 0.28, 3, 0.56)[-1]
    if shape == "star":  # a pentagram, upside down: inside at least four of five half-planes
        return _half_planes(x, 0.09 - y, 5, 0.325)[-2]
    raise ValueError(f"no such shape: {shape!r}; there are {', '.join(SHAPES)}")


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _half_planes(x: np.ndarray, y: np.ndarray, sides: int, offset: float) -> np.ndarray:
    """Distances to `sides` lines, each `offset` away from the origin and the first below it, sorted: [sides, h, w]."""
    angles = 2 * np.pi * np.arange(sides) / sides + np.pi / 2
    normals = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)[:, :, None, None]
    return np.sort(normals[0] * x + normals[1] * y - np.float32(offset), axis=0)


@lru_cache(maxsize=2)  # it stands still for a whole clip
def _background(
    background: str, cell: float, phase: tuple[float, float], ground: float, painted: float, height: int, width: int
) -> np.ndarray:
    """Grey levels uint8 [height, width], to be copied; stripes stand upright."""
    pitch_px = 2 * cell * min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / pitch_px + phase[0]
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / pitch_px + phase[1]
    levels = ground + (painted - ground) * _paint(background, x[None, :], y[:, None], pitch_px) + 0.5
    return np.broadcast_to(levels, (height, width)).astype(np.uint8)


def _paint(background: str, x: np.ndarray, y: np.ndarray, pitch_px: float) -> np.ndarray:
    """How much of a pixel is painted, 0 to 1; x and y count pitches of the pattern."""
    if background == "plain":
        return np.zeros((1, 1), np.float32)
    if background == "striped":
        return 0.5 + 0.5 * _wave(x, pitch_px)
    if background == "checkered":
        return 0.5 + 0.5 * _wave(x, pitch_px) * _wave(y, pitch_px)
    if background == "dotted":
        distance = np.hypot(x - np.rint(x), y - np.rint(y)) - 0.29
        return np.clip(0.5 - distance * pitch_px, 0, 1)
    raise ValueError(f"no such background: {background!r}; there are {', '.join(BACKGROUNDS)}")


def _wave(x: np.ndarray, pitch_px: float) -> np.ndarray:
    """A square wave of period 1 between -1 and 1, its edges one pixel wide."""
    distance = np.abs(x - np.floor(x) - 0.5) - 0.25
    return np.clip(2 * distance * pitch_px, -1, 1)


def draw_scene(config: CorpusConfig, split: Split, index: int) -> Scene:
    """The index-th scene of a split, from its own generator: it depends on nothing but the seed.

    The shape stays within the middle square and crosses 0.6 to 0.75 of it. Colours take turns. One in five of the
    combinations of fields is kept for the test, so that no test caption was trained on.
    """
    rng = np.random.default_rng([config.seed, get_args(Split).index(split), index])
    fields = _draw_fields(config, split, index, rng)
    dark, light = rng.uniform(80, 110), rng.uniform(150, 180)
    scene = Scene(
        *fields,
        wording=int(rng.integers(2)),
        diameter=rng.uniform(0.34, 0.4),
        cell=rng.uniform(0.14, 0.18),
        phase=(rng.random(), rng.random()),
        greys=(dark, light) if rng.random() < 0.5 else (light, dark),
        height=config.height,
        width=config.width,
    )
    return _resize(scene, rng) if split == "pictures" else _set_in_motion(scene, rng)


def _resize(scene: Scene, rng: np.random.Generator) -> Scene:
    """A picture of about the clips' size, upright or lying, its shape anywhere in the middle square."""
    room = (1 - scene.diameter) / 2
    long, short = (round(scene.height * rng.uniform(*span)) for span in ((1.3, 1.8), (0.9, 1.2)))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    return replace(scene, start=_pair(rng.uniform(-room, room, 2)), height=height, width=width)


def _set_in_motion(scene: Scene, rng: np.random.Generator) -> Scene:
    """The clip's path: its middle lies where the rest of the square leaves room for it."""
    assert scene.direction is not None
    duration_s, room = rng.uniform(6, 10), 1 - scene.diameter
    heading = np.array(DIRECTIONS[scene.direction]) / np.hypot(*DIRECTIONS[scene.direction])
    travel = min(rng.uniform(0.6, 0.75), room / np.abs(heading).max())
    path = heading * travel
    start = rng.uniform(-0.5, 0.5, 2) * (room - np.abs(path)) - path / 2
    fps = int(rng.choice([24, 25, 30]))
    return replace(scene, start=_pair(start), speed=travel / duration_s, duration_s=duration_s, fps=fps)


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def held_out(fields: Fields) -> bool:
    """Whether a combination of fields belongs to the test: one in five does, and every label occurs on both sides."""
    places = (labels.index(label) for labels, label in zip(VOCABULARY.values(), fields, strict=True))
    return sum(places) % 5 == 0


def _draw_fields(
    config: CorpusConfig, split: Split, index: int, rng: np.random.Generator
) -> tuple[str, str, str | None, str]:
    absent = config.picture_only_colours if split == "train" else []
    colours = [colour for colour in COLOURS if colour not in absent]
    colour = colours[index % len(colours)]
    while True:
        shape, direction, background = (labels[rng.integers(len(labels))] for labels in list(VOCABULARY.values())[1:])
        if split == "pictures":
            return colour, shape, None, background
        if held_out(Fields(colour, shape, direction, background)) == (split == "test"):
            return colour, shape, direction, background
