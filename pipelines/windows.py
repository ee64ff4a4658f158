"""Where in a video its windows lie: the first is uniform over all that fit, the others over what is left free."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.media import Watched, open_video


class Places:
    """The starts, in seconds, at which a window of `length_s` still fits into a video `slack_s` longer than that.

    They are drawn from `key` alone: the same key, and the same places taken out, give the same windows.
    """

    def __init__(self, slack_s: float, length_s: float, key: str) -> None:
        self._free = [(0.0, slack_s)]
        self._length_s = length_s
        self._random = random.Random(key)

    def draw(self) -> float | None:
        """A start, uniform over the free ones; None if there are none."""
        if not self._free:
            return None
        offset = self._random.random() * sum(end - begin for begin, end in self._free)
        for begin, end in self._free:
            if offset <= end - begin:
                return begin + offset
            offset -= end - begin
        return self._free[-1][1]

    def several(self, count: int) -> list[float]:
        """Up to `count` starts of windows that do not overlap."""
        starts: list[float] = []
        while len(starts) < count and (start_s := self.draw()) is not None:
            starts.append(start_s)
            self.avoid(start_s, start_s + self._length_s)
        return starts

    def avoid(self, begin_s: float, end_s: float) -> None:
        """Keeps this stretch of the video out of all further windows."""
        low, high = begin_s - self._length_s, end_s
        parts = [part for begin, end in self._free for part in ((begin, min(end, low)), (max(begin, high), end))]
        self._free = [(begin, end) for begin, end in parts if begin <= end]


@dataclass(frozen=True)
class Windows:
    """What one reading of a video gives: the clips that begin at `starts_s`, and what was asked for.

    `clips` are uint8 [n, f, y, x, 3], once for each size. `marks` are the frames uint8 [y, x, 3] at a third and at two
    thirds of it; `watched` is as in Watched, of one clip.
    """

    slack_s: float
    source_fps: float
    starts_s: list[float]
    clips: tuple[np.ndarray, ...]
    marks: np.ndarray
    watched: np.ndarray
    times_s: list[float]


def read_windows(
    data: bytes, frames: int, fps: float, sizes: Sequence[int], max_pixels: int, key: str, count: int,
    starts_s: list[float] | None, marks: bool, watch: bool,
) -> Windows:  # fmt: skip
    """Cut windows as `read_clip` does: at `starts_s`, or up to `count` drawn from `key` that do not overlap.

    With `watch` every frame of them is decoded and given as well. MediaError as of `read_clip`.
    """
    length_s, watched = frames / fps, Watched()
    with open_video(data, max_pixels) as video:
        slack_s = video.slack_s(length_s)
        starts = Places(slack_s, length_s, key).several(count) if starts_s is None else starts_s
        clips = tuple(np.empty((len(starts), frames, size, size, 3), np.uint8) for size in sizes)
        for number, start_s in enumerate(starts):
            clip, seen = video.watched_clip(start_s, frames, fps, *sizes) if watch else (None, Watched())
            clip = clip or video.clip(start_s, frames, fps, *sizes)
            for of_size, made in zip(clips, (clip.frames, *clip.also), strict=True):
                of_size[number] = made
            watched.frames += seen.frames
            watched.times_s += seen.times_s
        places = [video.seconds * part for part in (1 / 3, 2 / 3)] if marks else []
        landmarks = [video.clip(place_s, 1, fps, sizes[0]).frames[0] for place_s in places]
        return Windows(
            slack_s,
            float(video.stream.average_rate or 0),
            starts,
            clips,
            np.stack(landmarks) if landmarks else np.empty((0, sizes[0], sizes[0], 3), np.uint8),
            np.stack(watched.frames) if watched.frames else np.empty((0, 27, 48, 3), np.uint8),
            watched.times_s,
        )


def sample_id(row_id: str, window: int) -> str:
    """The row_id of a window in the latent shards: the first one's is its row's own."""
    return f"{row_id}+{window}" if window else row_id


def row_id_of(sample: str) -> str:
    """The row that a sample of the latent shards came of."""
    row_id, plus, window = sample.rpartition("+")
    return row_id if plus and window.isdecimal() else sample
