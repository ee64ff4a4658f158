"""Real and generated clips -> features: the one stage of scoring that looks at pixels, on a pool of Ray actors.

f frames    y x pixels    d width of a feature    k classes
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipelines.config import DataConfig, EvaluateConfig
from pipelines.judge import judge
from pipelines.media import MediaError, read_clip
from pipelines.ray_data import actor_pool, quieten, tell_if_too_small
from pipelines.sampling import read_frames
from pipelines.shapes import Fields
from t2v import storage
from t2v.config import SampleConfig

FRAME_STEP = 2  # FrameNetwork sees every second frame: neighbours are much alike, and it is most of the work


class Pair(NamedTuple):
    """A real clip, its caption, and the key of the video that was generated for it."""

    real: str
    caption: str
    key: str


@dataclass(frozen=True)
class Features:
    """What was measured of pair `index`; where `error` says why its real clip cannot be read, the rest is empty.

    frames [2, f / 2, d] and probabilities [2, f / 2, k] are FrameNetwork's, real and generated; clips [3, d] are
    ClipNetwork's, real, generated, and real with its first frame all the time; seen is what the judge reads, real and
    generated. Networks and judge that are not asked for leave theirs empty.
    """

    index: int
    error: str
    frames: np.ndarray
    probabilities: np.ndarray
    clips: np.ndarray
    seen: list[Fields]


def extract(
    run_dir: str, pairs: Sequence[Pair], config: EvaluateConfig, sample: SampleConfig, data: DataConfig
) -> Iterator[Features]:
    """Features of all pairs, as they come, in no order."""
    import ray.data

    tell_if_too_small("evaluate", sample.cpus_per_worker, sample.gpus_per_worker, "one worker (sample) needs them")
    rows = [{"index": index, "real": pair.real, "key": pair.key} for index, pair in enumerate(pairs)]
    measured = ray.data.from_items(rows).map(
        Extractor,  # type: ignore[arg-type]  # a class: one a worker
        fn_constructor_args=(run_dir, config, sample, data),
        **actor_pool(sample, batches=len(rows)),
    )
    quieten(measured)
    for row in measured.iter_rows():
        seen = [Fields(*labels) for labels in json.loads(row.pop("seen"))]
        yield Features(seen=seen, **row)


def embed_texts(captions: list[str]) -> Any:
    """Starts a Ray task; its reference gives the vectors [p, d] of captions and those [k, d] of the classes' names."""
    import ray

    # Without a CPU of its own: the actors may hold all there are until their last clip.
    return ray.remote(num_cpus=0)(_embed_texts).remote(captions)


def _embed_texts(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    from t2v.standins import TextNetwork, class_names

    network = TextNetwork()
    return network(captions), network(class_names())


class Extractor:
    """A Ray actor that decodes clips and holds the networks; frames never leave it."""

    def __init__(self, run_dir: str, config: EvaluateConfig, sample: SampleConfig, data: DataConfig) -> None:
        self._run_dir, self._config, self._data = run_dir, config, data
        if config.networks == "standins":
            import torch

            from t2v.standins import ClipNetwork, FrameNetwork

            device = "cuda" if sample.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu"
            self._frame_network, self._clip_network = FrameNetwork(device), ClipNetwork(device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row (index, real, key) -> the fields of Features, `seen` as JSON."""
        generated = read_frames(self._run_dir, row["key"])
        try:
            real, error = self._read_real(row["real"]), ""
        except MediaError as problem:
            # A stage never raises for a bad row: its numbers are made, so that all rows are alike, and never used.
            real, error = np.zeros_like(generated), f"{problem.status}: {problem}"
        measured = self._networks(real, generated) | self._judge(real, generated)
        return {"index": row["index"], "error": error} | measured

    def _read_real(self, path: str) -> np.ndarray:
        source = storage.local_path(path) if storage.is_local(path) else storage.read_bytes(path)
        return read_clip(source, self._data.frames, self._data.fps, self._data.size, start="middle").frames

    def _networks(self, real: np.ndarray, generated: np.ndarray) -> dict[str, Any]:
        if self._config.networks == "none":
            return dict.fromkeys(("frames", "probabilities", "clips"), np.zeros(1))
        sparse = np.concatenate([clip[::FRAME_STEP] for clip in (real, generated)])
        features, probabilities = self._frame_network(sparse)
        frozen = np.repeat(real[:1], len(real), axis=0)
        return {
            "frames": features.reshape(2, len(sparse) // 2, -1),
            "probabilities": probabilities.reshape(2, len(sparse) // 2, -1),
            "clips": self._clip_network(np.stack([real, generated, frozen])),
        }

    def _judge(self, real: np.ndarray, generated: np.ndarray) -> dict[str, Any]:
        clips = (real, generated) if self._config.judge_shapes else ()
        return {"seen": json.dumps([judge(clip) for clip in clips])}
