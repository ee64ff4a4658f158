"""Clips in one picture: of a stream's first shard what came in, and the samples of a model in training."""

from collections.abc import Sequence

import cv2
import numpy as np

from t2v import storage

ACROSS, DOWN = 8, 8


def sheet_path(data_dir: str, stream: str) -> str:
    """Where a stream's picture is."""
    return storage.join(data_dir, "sheets", f"{stream}.jpg")


def tiles(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A row of frames of each clip uint8 [f, y, x, 3], of a picture its one frame: as many as a sheet holds."""
    some = (frame for frames in clips for frame in frames[:: -(-len(frames) // ACROSS)])
    return [frame for frame, _ in zip(some, range(ACROSS * DOWN), strict=False)]


def grid(clips: np.ndarray) -> np.ndarray:
    """uint8 clips [b, f, y, x, 3] -> one picture [b * y, 8 * x, 3], a row each of at most eight of its frames."""
    some = clips[:, :: -(-clips.shape[1] // ACROSS)]
    return np.concatenate(list(np.concatenate(list(some.transpose(1, 0, 2, 3, 4)), axis=2)), axis=0)


def write_sheet(path: str, frames: list[np.ndarray]) -> None:
    """Write frames uint8 [y, x, 3], at least one, from left to right, atomically."""
    missing = -len(frames) % ACROSS
    filled = np.stack([*frames, *[np.zeros_like(frames[0])] * missing])
    picture = grid(filled.reshape(-1, ACROSS, *frames[0].shape))
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    with storage.open_atomic(path) as file:
        file.write(jpeg.tobytes())
