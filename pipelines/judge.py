"""Reads colour, shape, direction and background back from the pixels of clips, and counts how often captions agree.

No network is involved. The shape is where the saturation is, since all backgrounds are grey; its colour is the
nearest hue; which shape it is, the template that overlaps it best; its direction, the path of its centre; and the
background, an analysis of variance over rows and columns of what the shape leaves free.

f frames, h height, w width, n clips
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from pipelines.shapes import COLOURS, DIRECTIONS, SHAPES, VOCABULARY, Fields, signed_distance

MIN_CHROMA = 48.0  # of 255: paler than this, nothing is there
MIN_AREA = 0.004  # of the frame: a smaller patch is a speck
MIN_TRAVEL = 0.06  # of the frame's height over the clip: less is standing still
MIN_OVERLAP = 0.6  # with the best template
MIN_CONTRAST = 9.0  # grey levels, as a standard deviation: less is plain
TEMPLATE = 32  # side of the grid on which masks and templates meet
TEMPLATE_RADIUS = 7.0  # root mean square distance from the centre on it

# Shares of a pattern's variance that lie between columns and between rows. Dots: from their radius of 0.29 pitches.
PATTERNS = {"striped": (1.0, 0.0), "checkered": (0.0, 0.0), "dotted": (0.31, 0.31)}


@dataclass(frozen=True)
class Confusion:
    """How often each true label (rows) was read as each label (columns, and a last one for nothing read)."""

    labels: list[str]
    matrix: list[list[int]]


@dataclass(frozen=True)
class Scores:
    """Shares of n clips whose caption is seen in the pixels, by field and for all fields at once.

    `chance` is what the same readings score on average against captions dealt out at random.
    """

    n: int
    accuracy: dict[str, float]
    all_fields: float
    chance: dict[str, float]
    chance_all_fields: float
    confusion: dict[str, Confusion]


def judge(frames: np.ndarray) -> Fields:
    """What a clip or picture shows, uint8 RGB [f, h, w, 3], about 64 pixels high or more; None for what is not seen."""
    pixels = frames.astype(np.float32)
    chroma = pixels.max(-1) - pixels.min(-1)  # [f, h, w]
    peak = float(np.percentile(chroma, 99))
    masks = np.stack([_largest_patch(plane > peak / 2) for plane in chroma])
    seen = masks.mean((1, 2)) > MIN_AREA
    if peak < MIN_CHROMA or not seen.any():
        return Fields(None, None, None, None)
    around = np.stack([cv2.dilate(mask, np.ones((3, 3), np.uint8)) for mask in masks])
    cover = np.clip(chroma / peak * 1.6 - 0.3, 0, 1) * around
    colour = _colour(pixels[(chroma > 0.8 * peak) & (masks > 0)])
    background = _background(pixels.mean(-1), masks)
    return Fields(colour, _shape(cover[seen]), _direction(cover, seen), background)


def _largest_patch(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask, uint8 [h, w]."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count == 1:
        return np.zeros(mask.shape, np.uint8)
    return (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA])).astype(np.uint8)


def _colour(pixels: np.ndarray) -> str | None:
    """The colour whose hue is nearest to that of the mean pixel."""
    if not len(pixels):
        return None
    hue = _hue(pixels.mean(0))
    distance = {name: abs((hue - _hue(np.array(rgb)) + 180) % 360 - 180) for name, rgb in COLOURS.items()}
    return min(distance, key=distance.__getitem__)


def _hue(rgb: np.ndarray) -> float:
    """Angle in degrees around the grey axis, red at 0."""
    red, green, blue = (float(channel) for channel in rgb)
    return float(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)))


def _centre(cover: np.ndarray) -> tuple[float, float, float]:
    """x, y of the centre and root mean square distance from it, in pixels."""
    moments = cv2.moments(cover)
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    return x, y, float(np.sqrt((moments["mu20"] + moments["mu02"]) / moments["m00"]))


def _aligned(covers: np.ndarray) -> np.ndarray:
    """The mean over frames of masks [f, h, w], all moved to the same centre and scale: [TEMPLATE, TEMPLATE]."""
    centres = np.array([_centre(cover) for cover in covers])
    scale = TEMPLATE_RADIUS / np.median(centres[:, 2])
    middle = (TEMPLATE - 1) / 2
    maps = [np.array([[scale, 0, middle - scale * x], [0, scale, middle - scale * y]]) for x, y, _ in centres]
    moved = [cv2.warpAffine(cover, m, (TEMPLATE, TEMPLATE)) for cover, m in zip(covers, maps, strict=True)]
    return np.mean(moved, axis=0)


@lru_cache
def _templates() -> np.ndarray:
    """Every shape as 64 x 64 frames would show it, aligned: [shapes, TEMPLATE, TEMPLATE]."""
    radius = 12.0
    steps = np.arange(-20, 21, dtype=np.float32) / radius
    covers = [np.clip(0.5 - signed_distance(shape, steps[None, :], steps[:, None]) * radius, 0, 1) for shape in SHAPES]
    return np.stack([_aligned(cover[None].astype(np.float32)) for cover in covers])


def _shape(covers: np.ndarray) -> str | None:
    """The shape of greatest overlap (intersection over union) with the aligned mask."""
    mask, templates = _aligned(covers), _templates()
    overlaps = np.minimum(mask, templates).sum((1, 2)) / np.maximum(mask, templates).sum((1, 2))
    best = int(overlaps.argmax())
    return SHAPES[best] if overlaps[best] > MIN_OVERLAP else None


def _direction(cover: np.ndarray, seen: np.ndarray) -> str | None:
    """The direction nearest to the line of best fit through the centres; None for what stands still."""
    times = np.flatnonzero(seen)
    if len(times) < 2:
        return None
    centres = np.array([_centre(cover[t])[:2] for t in times])
    velocity = np.polyfit(times, centres, 1)[0]  # pixels a frame
    if np.hypot(*velocity) * (len(cover) - 1) < MIN_TRAVEL * cover.shape[1]:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(velocity, DIRECTIONS[name]) / np.hypot(*DIRECTIONS[name])))


def _background(grey: np.ndarray, masks: np.ndarray) -> str | None:
    """The pattern of the mean over frames [f, h, w] of what the shape, with a margin, leaves free.

    Main effects of a two-way analysis of variance tell the patterns apart. What they leave must be a product of
    one row and one column, as it is for a regular pattern, or nothing is read.
    """
    margin = 1 + grey.shape[1] // 24
    around = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    free = np.stack([1 - cv2.dilate(mask, around) for mask in masks]).astype(np.float32)
    count = free.sum(0)
    known = (count > 0).astype(np.float32)
    if known.mean() < 0.5:
        return None
    picture = (grey * free).sum(0) / np.maximum(count, 1)
    picture = (picture - picture.sum() / known.sum()) * known
    variance = float((picture**2).sum() / known.sum())
    if variance < MIN_CONTRAST**2:
        return "plain"
    columns, rows = (picture.sum(axis) / np.maximum(known.sum(axis), 1) for axis in (0, 1))
    shares = np.array([columns.var(), rows.var()]) / variance
    pattern = min(PATTERNS, key=lambda name: float(np.hypot(*(shares - PATTERNS[name]))))
    rest = (picture - columns[None, :] - rows[:, None]) * known
    energy = np.linalg.svd(rest, compute_uv=False) ** 2
    return pattern if pattern == "striped" or energy[0] > 0.4 * energy.sum() else None


def tabulate(seen: Sequence[Fields], said: Sequence[Fields]) -> Scores:
    """Scores of readings against what the captions say; a field that a caption leaves out is not asked for."""
    if not seen:
        raise ValueError("no clips to score")
    pixels, captions = _numbers(seen), _numbers(said)  # [n, 4]
    asked = captions >= 0
    match = (pixels == captions) | ~asked
    accuracy, chance, confusion = {}, {}, {}
    for place, (name, labels) in enumerate(VOCABULARY.items()):
        rows = captions[:, place][asked[:, place]]
        columns = pixels[:, place][asked[:, place]]
        if not len(rows):
            continue
        table = np.zeros((len(labels), len(labels) + 1), int)
        np.add.at(table, (rows, columns), 1)  # nothing read is -1, the last column
        accuracy[name] = float(np.trace(table) / len(rows))
        chance[name] = float(table.sum(1) @ table.sum(0)[:-1] / len(rows) ** 2)
        confusion[name] = Confusion(list(labels), table.tolist())
    pairs = [np.mean(((pixels == caption) | (caption < 0)).all(1)) for caption in captions]
    return Scores(len(seen), accuracy, float(match.all(1).mean()), chance, float(np.mean(pairs)), confusion)


def _numbers(fields: Sequence[Fields]) -> np.ndarray:
    """Places in the vocabulary, int [n, 4]; -1 for None."""
    places = [{None: -1} | {label: i for i, label in enumerate(labels)} for labels in VOCABULARY.values()]
    return np.array([[place[label] for place, label in zip(places, row, strict=True)] for row in fields])
