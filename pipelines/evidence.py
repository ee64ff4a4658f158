"""What the features of many pairs add up to: rows of scores, each with the controls that tell what it is worth.

A row says what was measured, by which network (and the hash of its weights), of which clips, against what and over how
many. Distances by stand-in networks go by the networks' names; they are neither FID nor FVD.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from pipelines.features import Features
from pipelines.judge import Scores, tabulate
from pipelines.shapes import Fields
from t2v.metrics import Gaussian, alignment_score, conse, frechet_distance

JUDGE_MUST_REACH = 0.97

Row = dict[str, Any]


class NetworkScores:
    """What the stand-in networks say of all pairs, streamed: two Frechet distances and the alignment with text."""

    def __init__(self, networks: Mapping[str, tuple[str, str]]) -> None:
        self._frames = Distances("Frechet distance of frames", *networks["frames"])
        self._clips = Distances("Frechet distance of clips", *networks["clips"])
        self._text = networks["text"]
        self._concepts: dict[int, np.ndarray] = {}

    def add(self, features: Features, class_vectors: np.ndarray) -> None:
        """Takes in one pair; `class_vectors` [k, d] are those of the names of the classes."""
        real, generated = features.frames
        frozen = np.repeat(real[:1], len(real), axis=0)
        self._frames.add(features.index, {"real": real, "generated": generated, "frozen": frozen})
        real, generated, frozen = features.clips[:, None]
        self._clips.add(features.index, {"real": real, "generated": generated, "frozen": frozen})
        self._concepts[features.index] = np.stack([conse(side, class_vectors) for side in features.probabilities])

    def rows(self, captions: np.ndarray, seed: int) -> list[Row]:
        """All rows; `captions` [p, d] are the vectors of all pairs' captions, of which some pairs may be left out."""
        return [*self._frames.rows(), *self._clips.rows(), *self._alignment(captions[sorted(self._concepts)], seed)]

    def _alignment(self, texts: np.ndarray, seed: int) -> Iterator[Row]:
        shuffled = texts[someone_else(len(texts), seed)]
        name, weights = self._text
        about = {"score": "text alignment", "network": name, "network_id": weights, "clips": len(texts)}
        for side, of in ((1, "generated"), (0, "real")):
            frames = [concepts[side] for _, concepts in sorted(self._concepts.items())]
            for against, vectors in (("captions", texts), ("shuffled captions", shuffled)):
                yield about | {"of": of, "against": against, "value": alignment_score(frames, vectors)}


class Distances:
    """Frechet distances by one network, streamed: of all pairs, and of halves of them as controls.

    Even pairs are one half, odd pairs the other. A control compares clips of one half with the real clips of the other,
    for real and frozen clips must not meet themselves.
    """

    def __init__(self, score: str, network: str, network_id: str) -> None:
        self._about = {"score": score, "network": network, "network_id": network_id}
        self._halves: dict[str, tuple[Gaussian, Gaussian]] = {}
        self._clips = [0, 0]

    def add(self, index: int, sides: dict[str, np.ndarray]) -> None:
        """Takes in the features [n, d] of pair `index`, by side: real, generated and frozen."""
        self._clips[index % 2] += 1
        for side, features in sides.items():
            width = features.shape[1]
            self._halves.setdefault(side, (Gaussian(width), Gaussian(width)))[index % 2].add(features)

    def rows(self) -> Iterator[Row]:
        """Generated against real clips, then each side against the other half of the real ones."""
        yield self._row("generated", "real", sum(self._clips), self._whole("generated"), self._whole("real"))
        reference = self._halves["real"][0]
        for side in ("generated", "real", "frozen"):
            yield self._row(side, "real, other half", self._clips[1], self._halves[side][1], reference)

    def _whole(self, side: str) -> Gaussian:
        whole = Gaussian(self._halves[side][0].width)
        for half in self._halves[side]:
            whole.merge(half)
        return whole

    def _row(self, of: str, against: str, clips: int, a: Gaussian, b: Gaussian) -> Row:
        about = self._about | {"of": of, "against": against, "clips": clips, "samples": a.count}
        return about | {"value": frechet_distance(a, b)}


class Shapes(NamedTuple):
    """The shapes scores. Where the judge misreads real clips, `refused` says so and generated ones are not scored.

    `confusion` has by field how often each true label (rows) was read as each label, the last column for nothing read.
    """

    rows: list[Row]
    confusion: dict[str, Any]
    refused: str | None


def shapes(
    real: Sequence[Fields], generated: Sequence[Fields], said: Sequence[Fields], new_colours: Sequence[str], seed: int
) -> Shapes:
    """Shares of clips in which the judge sees what the caption says, by field.

    Of real clips, which tells what the judge is worth; of the generated ones against their own captions, each other's
    and by chance; and apart for the captions whose colour is one of `new_colours`, which no training clip had.
    """
    judge = _shape_row("real", "captions", tabulate(real, said))
    if refused := _refusal(judge):
        return Shapes([judge], {}, refused)
    scores = tabulate(generated, said)
    others = [said[other] for other in someone_else(len(said), seed)]
    rows = [
        judge,
        _shape_row("generated", "captions", scores),
        _shape_row("generated", "shuffled captions", tabulate(generated, others)),
        {"of": "generated", "against": "chance", "clips": scores.n, **scores.chance, "all": scores.chance_all_fields},
    ]
    for of, new in (("generated, colours seen in clips", False), ("generated, colours only in pictures", True)):
        part = [index for index, fields in enumerate(said) if (fields.colour in new_colours) == new]
        if new_colours and part:
            scored = tabulate([generated[index] for index in part], [said[index] for index in part])
            rows.append(_shape_row(of, "captions", scored))
    return Shapes(rows, asdict(scores)["confusion"], None)


def _refusal(judge: Row) -> str | None:
    poor = [f"{name} {judge[name]:.3f}" for name in Fields._fields if judge[name] < JUDGE_MUST_REACH]
    if not poor:
        return None
    return f"Shapes scores refused: of real clips the judge reads {', '.join(poor)}, below {JUDGE_MUST_REACH}."


def someone_else(count: int, seed: int) -> np.ndarray:
    """For each of `count` captions the place of another one, in one random round: none keeps its own."""
    order = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, int)
    others[order] = np.roll(order, 1)
    return others


def _shape_row(of: str, against: str, scores: Scores) -> Row:
    return {"of": of, "against": against, "clips": scores.n, **scores.accuracy, "all": scores.all_fields}
