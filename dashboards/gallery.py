"""Generated clips beside their nearest real ones, as small videos that live inside the page.

frames: uint8 RGB [f, h, w, 3]
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashboards.verdicts import Word, proof
from pipelines.config import DataConfig
from t2v import storage

AT_MOST = 18  # two players each; browsers bound how many a page may have, phones at a few dozen
MAX_BYTES = 7_000_000  # of all clips in the page, so that the whole of it stays below 8 MB
X264 = {"crf": "20", "preset": "veryfast"}
CANDIDATES = 64  # real clips that are compared with a prompt that is no test caption


@dataclass
class Card:
    """One prompt: the generated clip, and the real one nearest to it with the reason why it was chosen."""

    words: list[Word]
    seed: int
    generated: str
    real: str
    nearest_by: str


def gallery(run_dir: str, samples: Sequence[dict[str, Any]], scores: dict[str, Any], judged: bool) -> list[Card]:
    """Cards for rows of samples/manifest.jsonl, spread evenly over them, few enough that the page stays small.

    Where the judge of shapes was found reliable (`judged`), the prompts are marked with what it sees.
    """
    real = RealClips(run_dir, scores.get("inputs", {}))
    cards = [_card(run_dir, row, real, judged) for row in evenly(samples, AT_MOST)]
    while sum(len(card.generated) + len(card.real) for card in cards) > MAX_BYTES:
        cards = cards[1::2]
    return cards


def evenly(rows: Sequence[Any], at_most: int) -> list[Any]:
    """At most `at_most` of `rows`, spread evenly, the first one included."""
    count = min(at_most, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


class RealClips:
    """The test clips of a run, prepared as the model saw its training clips, each decoded once and only if needed."""

    def __init__(self, run_dir: str, inputs: dict[str, Any]) -> None:
        own = storage.join(run_dir, "corpus", "test.csv")
        self._manifest = own if storage.exists(own) else inputs.get("test", "")
        self._fps = inputs.get("real_fps", DataConfig().fps)
        self._rows = self._read_rows(inputs.get("columns", "msrvtt"))
        self._decoded: dict[str, np.ndarray | None] = {}

    def nearest(self, prompt: str, frames: np.ndarray) -> tuple[np.ndarray, str] | None:
        """The clip with the same caption, otherwise the one whose mean frame has the least L2 distance."""
        same = [path for path, caption in self._rows if caption == prompt]
        paths = same or [path for path, _ in evenly(self._rows, CANDIDATES)]
        clips = [clip for path in paths if (clip := self._clip(path, len(frames), frames.shape[2])) is not None]
        if not clips:
            return None
        return min(clips, key=lambda clip: _distance(frames, clip)), "same caption" if same else "nearest mean frame"

    def _read_rows(self, columns: str) -> list[tuple[str, str]]:
        from pipelines.manifests import read_manifest

        if not self._manifest or not storage.exists(self._manifest):
            return []
        batches = read_manifest(self._manifest, columns)
        return [(row["url"], row["caption"]) for batch in batches for row in batch.to_pylist()]

    def _clip(self, path: str, frames: int, size: int) -> np.ndarray | None:
        """Frames of a test clip; None for one that cannot be read."""
        from pipelines.manifests import beside
        from pipelines.media import MediaError, read_clip

        if path not in self._decoded:
            try:
                data = storage.read_bytes(beside(self._manifest, path))
                self._decoded[path] = read_clip(data, frames, self._fps, size, "middle").frames
            except (MediaError, OSError):
                self._decoded[path] = None
        return self._decoded[path]


def video_uri(frames: np.ndarray, fps: int) -> str:
    """A clip as a data: URI that holds an mp4."""
    from pipelines.video import mp4_bytes

    return "data:video/mp4;base64," + b64encode(mp4_bytes(frames, fps, X264)).decode()


def _card(run_dir: str, row: dict[str, Any], real: RealClips, judged: bool) -> Card:
    from pipelines.sampling import read_frames

    prompt, frames, fps = row["prompt"], read_frames(run_dir, row["key"]), row["fps"]
    words = proof(prompt, frames) if judged else [Word(prompt)]
    found = real.nearest(prompt, frames)
    shown, nearest_by = (video_uri(found[0], fps), found[1]) if found else ("", "")
    return Card(words, row["seed"], video_uri(frames, fps), shown, nearest_by)


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left.mean(axis=0) - right.mean(axis=0)))
