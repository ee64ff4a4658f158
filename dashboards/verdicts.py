"""What the page shows of the scores: grouped rows, heat tables, and captions marked like a proof."""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

NOTHING = "nothing"  # the last column of a confusion table


@dataclass
class Heat:
    """One confusion table: a row a true label, a column a label that was read; shares are of the row."""

    field: str
    accuracy: float
    columns: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]  # label, (count, share) of each column


@dataclass
class Word:
    """A piece of a prompt: `seen` is None where nothing is asked, else what the clip shows in its place."""

    text: str
    seen: str | None = None

    @property
    def kind(self) -> str:
        return "plain" if self.seen is None else "right" if self.seen == self.text else "wrong"


def distances(scores: dict[str, Any]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The rows of scores.json by score: what all rows of a score share, and the rows."""
    rows = scores.get("scores", [])
    return [(group[0], group) for _, same in groupby(rows, key=lambda row: row["score"]) if (group := list(same))]


def heats(confusion: dict[str, Any]) -> list[Heat]:
    """The tables of confusion.json; labels that no caption asks for have no row."""
    found = []
    for field, table in confusion.items():
        counts = np.array(table["matrix"])
        totals = counts.sum(axis=1)
        rows = [
            (label, [(int(count), float(count / total)) for count in row])
            for label, row, total in zip(table["labels"], counts, totals, strict=True)
            if total
        ]
        found.append(Heat(field, float(np.trace(counts) / totals.sum()), [*table["labels"], NOTHING], rows))
    return found


def proof(prompt: str, frames: np.ndarray) -> list[Word]:
    """The prompt in pieces, each field that it states beside what the judge of shapes sees in the frames.

    Prompts that are no captions of shapes are one plain piece.
    """
    from pipelines.judge import judge
    from pipelines.shapes import parse_caption

    try:
        said = parse_caption(prompt)
    except ValueError:
        return [Word(prompt)]
    seen = judge(frames)
    read = {text: other or NOTHING for text, other in zip(said, seen, strict=True) if text}
    pieces = re.split(rf"\b({'|'.join(map(re.escape, read))})\b", prompt)
    return [Word(piece, read.get(piece)) for piece in pieces if piece]
