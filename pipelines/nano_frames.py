"""Gathers the pictures that the miniature's VAE learns from: frames of the shapes corpus, and of a few real clips.

It runs where the video libraries are; pipelines/nano_vae.py then trains from the one file that this writes.

    python -m pipelines.nano_frames --out material.npz --clips '{b.mp4: 600, c.mpg: 130}' --held_out '{a.mp4: 200}'
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice

import av
import cv2
import numpy as np
from jsonargparse import auto_cli

from pipelines.config import CorpusConfig
from pipelines.shapes import Scene, draw_scene, render
from pipelines.video import write_mp4

SIZE = 64  # pixels
REAL_SIZE = 96  # pixels; more than SIZE, so that training can crop the real frames anew each time


def frames(clips: dict[str, int], held_out: dict[str, int], out: str, shape_frames: int = 8000) -> None:
    """Writes the training material: frames of shapes, and real frames of some clips.

    Both dicts say how many frames each video file gives; what is held out comes from other clips. `out` becomes an
    .npz of uint8 RGB [n, y, x, 3]: shapes, shapes_held_out and real_held_out (64 x 64), real (96 x 96).
    """
    np.savez_compressed(
        out,
        shapes=draw_shapes(shape_frames, seed=1001),
        shapes_held_out=draw_shapes(shape_frames // 16, seed=1002),
        real=_real_frames(clips, REAL_SIZE),
        real_held_out=_real_frames(held_out, SIZE),
    )


def draw_shapes(number: int, seed: int) -> np.ndarray:
    """Frames of a shapes corpus as the data pipeline sees them, uint8 RGB [number, 64, 64, 3].

    Half are pictures, half come in fours out of H.264 clips. `seed` is the corpus's: the miniature's own is 0.
    """
    config = CorpusConfig(picture_only_colours=[], seed=seed)
    return np.stack(list(islice(chain.from_iterable(_pictures_and_clips(config)), number)))


def _pictures_and_clips(config: CorpusConfig) -> Iterator[list[np.ndarray]]:
    for index in count():
        rng = np.random.default_rng([config.seed, index])
        pictures = [_widened(draw_scene(config, "pictures", 4 * index + k), rng) for k in range(4)]
        yield [_middle_square(render(scene, 0, scene.height, scene.width)) for scene in pictures]
        scene = _widened(draw_scene(config, "train", index), rng)
        moments_s = rng.uniform(0, scene.duration_s, 4)
        clip = [render(scene, t_s, scene.height, scene.width) for t_s in moments_s]
        yield [_middle_square(frame) for frame in _through_h264(clip)]


def _widened(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene in sizes and greys that vary more than the corpus's, so that the VAE does not hang on its settings."""
    return replace(
        scene,
        diameter=scene.diameter * rng.uniform(0.8, 1.2),
        cell=scene.cell * rng.uniform(0.8, 1.2),
        greys=tuple(rng.uniform(40, 215, 2)),
    )


def _through_h264(clip: list[np.ndarray]) -> list[np.ndarray]:
    buffer = io.BytesIO()
    write_mp4(buffer, clip, fps=8, options={"crf": "20"})
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _middle_square(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    side = min(height, width)
    return _shrunk(frame, (height - side) // 2, (width - side) // 2, side, SIZE)


def _real_frames(clips: dict[str, int], size: int) -> np.ndarray:
    """Evenly spaced frames of every clip, a random square crop of each, uint8 RGB [n, size, size, 3]."""
    rng = np.random.default_rng(0)
    crops = []
    for path, number in clips.items():
        with av.open(path) as container:
            length = sum(packet.size > 0 for packet in container.demux(video=0))
        wanted = set(np.linspace(0, length - 1, number).round().astype(int).tolist())
        with av.open(path) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    crops.append(_random_square(frame.to_ndarray(format="rgb24"), size, rng))
    return np.stack(crops)


def _random_square(frame: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    height, width = frame.shape[:2]
    side = int(rng.integers(size, min(height, width), endpoint=True))
    top, left = (int(rng.integers(extent - side, endpoint=True)) for extent in (height, width))
    return _shrunk(frame, top, left, side, size)


def _shrunk(frame: np.ndarray, top: int, left: int, side: int, size: int) -> np.ndarray:
    """A square of the frame, `side` wide, at `size` pixels."""
    return cv2.resize(frame[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)


if __name__ == "__main__":
    auto_cli(frames, as_positional=False)
