"""The miniature's corpus: captioned clips and pictures of one coloured shape that moves over a grey background.

A caption says what must be seen and a scene holds all that is needed to draw it, so colour, shape, direction
and background can be read back from the pixels (pipelines/judge.py) of a real clip or of a generated one.

Lengths are in sides of the middle square, the part that training and scoring look at; its centre is (0, 0),
x points right and y points down.
"""

import csv
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from urllib.parse import urlsplit

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import CorpusConfig
from pipelines.web import IMAGE_FAULTS, VIDEO_FAULTS

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


def write_corpus(folder: str | Path, config: CorpusConfig, base_url: str) -> None:
    """Write clips, pictures, manifests and the test split, on all cores; base_url is where the folder is served.

    `corpus.json` comes last, under a temporary name: where it is, the corpus is whole and a rerun returns at once.
    ValueError for a folder that holds the corpus of another config or another base_url.
    """
    folder = Path(folder)
    _check(config)
    if _is_written(folder, config, base_url):
        return
    for name in ("videos", "images", "test", "faults"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    videos = {f"videos/{i:06d}.mp4": draw_scene(config, "train", i) for i in range(config.clips)}
    images = {f"images/{i:06d}.jpg": draw_scene(config, "pictures", i) for i in range(config.pictures)}
    test = {f"test/video{i}.mp4": draw_scene(config, "test", i) for i in range(config.test_clips)}
    _write_clips(folder, videos | test)
    for name, scene in images.items():
        _write_picture(folder / name, scene)
    if config.faults:
        _write_faults(folder, videos["videos/000000.mp4"])
        videos |= {f"faults/{name}": videos["videos/000000.mp4"] for name in VIDEO_FAULTS}
        images |= {f"faults/{name}": images["images/000000.jpg"] for name in IMAGE_FAULTS}
    _write_webvid(folder / "webvid.csv", _shuffled(videos, config.seed), base_url)
    _write_laion(folder / "laion.parquet", _shuffled(images, config.seed), base_url)
    _write_msrvtt(folder / "test.csv", test)
    _write_summary(folder / "corpus.json", config, base_url, len(videos), len(images))


def corpus_port(folder: str | Path) -> int:
    """The port that a written corpus's manifests point at, for a server to take again; 0 where there is none."""
    path = Path(folder) / "corpus.json"
    return json.loads(path.read_text())["port"] if path.exists() else 0


def _check(config: CorpusConfig) -> None:
    unknown = set(config.picture_only_colours) - set(COLOURS)
    if unknown:
        raise ValueError(f"picture_only_colours: no such colour: {', '.join(sorted(unknown))}")
    if set(config.picture_only_colours) == set(COLOURS):
        raise ValueError("picture_only_colours: all colours are named, which leaves none for the clips")
    if config.width % 2 or config.height % 2:
        raise ValueError(f"width, height: {config.width} x {config.height}, but H.264 needs even sizes")
    if config.faults and not (config.clips and config.pictures):
        raise ValueError("faults: these rows need at least one clip and one picture")


def _is_written(folder: Path, config: CorpusConfig, base_url: str) -> bool:
    path = folder / "corpus.json"
    if not path.exists():
        return False
    summary = json.loads(path.read_text())
    found = summary["config"] | {"base_url": summary["base_url"]}
    wanted = asdict(config) | {"base_url": base_url}
    changed = [f"{name} is {found.get(name)!r}" for name, value in wanted.items() if found.get(name) != value]
    if changed:
        raise ValueError(f"{folder} holds another corpus ({'; '.join(changed)}): choose another folder or delete it")
    return True


def _write_clips(folder: Path, clips: dict[str, Scene]) -> None:
    paths = [folder / name for name in clips]
    workers = min(os.cpu_count() or 1, len(paths) // 16)
    if workers < 2:
        list(map(_write_clip, paths, clips.values()))
        return
    # Spawned, because a fork of a process that has run threads (Ray's, PyTorch's) may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_clip, paths, clips.values(), chunksize=4))


def _write_clip(path: Path, scene: Scene) -> None:
    """H.264 in mp4; the index comes last in the file, and the bytes are the same each time."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=scene.fps, options={"preset": "veryfast", "crf": "18", "g": "48"})
        stream.height, stream.width, stream.pix_fmt = scene.height, scene.width, "yuv420p"
        stream.codec_context.thread_count = 1
        for k in range(round(scene.duration_s * scene.fps)):
            frame = render(scene, k / scene.fps, scene.height, scene.width)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_picture(path: Path, scene: Scene) -> None:
    frame = render(scene, 0, scene.height, scene.width)
    if not cv2.imwrite(str(path), frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f"could not write {path}")


def _write_faults(folder: Path, scene: Scene) -> None:
    """The files under faults/ that are broken in themselves."""
    clip, picture = (folder / "videos/000000.mp4").read_bytes(), (folder / "images/000000.jpg").read_bytes()
    (folder / "faults/truncated.mp4").write_bytes(clip[: len(clip) // 2])
    (folder / "faults/huge.jpg").write_bytes(_claim_size(picture, 60_000, 60_000))
    _write_clip(folder / "faults/short.mp4", replace(scene, duration_s=1.0))
    (folder / "faults/empty.mp4").touch()
    (folder / "faults/empty.jpg").touch()


def _claim_size(jpg: bytes, height: int, width: int) -> bytes:
    """The same JPEG with another size in its frame header (ITU-T T.81, B.2.2)."""
    at = jpg.index(b"\xff\xc0") + 5
    return jpg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpg[at + 4 :]


def _shuffled(scenes: dict[str, Scene], seed: int) -> list[tuple[str, Scene]]:
    """Rows in an order that spreads those that fail over the manifest."""
    rows = list(scenes.items())
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _write_webvid(path: Path, rows: list[tuple[str, Scene]], base_url: str) -> None:
    lines = [
        (number, f"{base_url}/{name}", "shapes", caption(scene), f"PT00H00M{round(scene.duration_s):02d}S")
        for number, (name, scene) in enumerate(rows)
    ]
    _write_csv(path, [("videoid", "contentUrl", "page_dir", "name", "duration"), *lines])


def _write_laion(path: Path, rows: list[tuple[str, Scene]], base_url: str) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "URL": [f"{base_url}/{name}" for name, _ in rows],
        "TEXT": [caption(scene) for _, scene in rows],
        "WIDTH": [scene.width for _, scene in rows],
        "HEIGHT": [scene.height for _, scene in rows],
        "similarity": rng.uniform(0.28, 0.4, len(rows)),
        "punsafe": rng.uniform(0, 0.01, len(rows)),
        "pwatermark": rng.uniform(0, 0.2, len(rows)),
        "hash": rng.integers(-(2**63), 2**63 - 1, len(rows)),
    }
    pq.write_table(pa.table(columns), path)


def _write_msrvtt(path: Path, test: dict[str, Scene]) -> None:
    """Paths are relative to the table's own folder."""
    lines = [(Path(name).stem, name, caption(scene)) for name, scene in test.items()]
    _write_csv(path, [("video_id", "path", "sentence"), *lines])


def _write_summary(path: Path, config: CorpusConfig, base_url: str, videos: int, images: int) -> None:
    expected = {"videos": VIDEO_FAULTS, "images": IMAGE_FAULTS} if config.faults else {"videos": {}, "images": {}}
    summary = {
        "config": asdict(config),
        "base_url": base_url,
        "port": urlsplit(base_url).port,
        "rows": {"videos": videos, "images": images, "test": config.test_clips},
        "faults": {
            stream: Counter(status for status in faults.values() if status != "ok")
            for stream, faults in expected.items()
        },
    }
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(summary, indent=2))
    partial.replace(path)
