"""Frames -> H.264 in mp4: the one place where video is encoded.

f frames of y x x pixels, RGB.
"""

import io
from collections.abc import Iterable
from itertools import chain
from typing import BinaryIO

import av
import numpy as np

_WATCHABLE_PIXELS = 256


def write_mp4(target: str | BinaryIO, frames: Iterable[np.ndarray], fps: int, options: dict[str, str]) -> None:
    """Encodes uint8 frames [y, x, 3], sides even, one after another; `options` are x264's."""
    first, frames = _first(frames)
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # or the bytes would depend on the machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def mp4_bytes(frames: np.ndarray, fps: int, options: dict[str, str]) -> bytes:
    """A small clip, uint8 [f, y, x, 3], as an mp4 to be looked at.

    Clips narrower than 256 pixels are enlarged by a whole factor, every pixel to a square.
    """
    factor = -(-_WATCHABLE_PIXELS // frames.shape[2])
    buffer = io.BytesIO()
    write_mp4(buffer, frames.repeat(factor, axis=1).repeat(factor, axis=2), fps, options)
    return buffer.getvalue()


def _first(frames: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterable[np.ndarray]]:
    """The first frame, and all of them."""
    iterator = iter(frames)
    first = next(iterator)
    return first, chain([first], iterator)
