"""Checkpoints: the fp32 state of training, written by every rank for itself and read by any number of ranks.

A checkpoint is a folder. Rank r's share of it is `rank-r-*.safetensors`, parts of 128 MiB, and `rank-r.json`, which
comes last: what each part holds and its hash. A part holds stretches of flattened weights, under `KIND/WEIGHT`, so a
reader takes what it needs from whichever ranks wrote it, and neither their number nor their ZeRO stage matters.
DeepSpeed's own universal checkpoints do that too, after a conversion that reads and writes everything once more.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from t2v import storage

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")  # the weights, AdamW's two moments, and the moving average
PART_BYTES = 2**27


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or is not this model's."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, end) of a flattened weight, which a rank keeps from `offset` on in its flat tensor `group`."""

    name: str
    start: int
    end: int
    group: int = 0
    offset: int = 0

    def of(self, flats: Sequence[Tensor], start: int | None = None, end: int | None = None) -> Tensor:
        """The view of these elements, or of [start, end) among them."""
        first, last = self.start if start is None else start, self.end if end is None else end
        return flats[self.group][self.offset + first - self.start : self.offset + last - self.start]


def write_share(
    folder: str, rank: int, flats: Mapping[str, Sequence[Tensor]], pieces: Sequence[Piece], state: Mapping[str, Any]
) -> None:
    """Writes one rank's share: `pieces` of the flat fp32 host tensors of every kind; `state` is JSON, kept by all."""
    parts = []
    for number, group in enumerate(_parts(pieces)):
        name = f"rank-{rank:05d}-{number:03d}.safetensors"
        tensors = {f"{kind}/{piece.name}": piece.of(flats[kind]) for piece in group for kind in KINDS}
        digest = _write_part(storage.join(folder, name), tensors)
        stretches = {piece.name: [piece.start, piece.end] for piece in group}
        parts.append({"file": name, "sha256": digest, "pieces": stretches})
    storage.write_json(storage.join(folder, _share(rank)), {"state": dict(state), "parts": parts})


def read_state(folder: str) -> dict[str, Any]:
    """What was kept as `state`; CheckpointError where no rank has finished its share."""
    return _shares(folder)[0]["state"]


def newest_first(train_folder: str) -> list[str]:
    """The checkpoints of a run, the half-written ones too: the newest first, copies of milestones last."""
    own = [name for name in storage.folders(train_folder) if name.startswith("checkpoint_")]
    milestones = storage.join(train_folder, "milestones")
    kept = [storage.join(milestones, name, "checkpoint") for name in storage.folders(milestones)]
    found = [storage.join(train_folder, name) for name in reversed(own)]
    return found + [folder for folder in reversed(kept) if storage.exists(folder)]


def furthest_first(train_folder: str, tell: Callable[[str], None]) -> list[tuple[int, str]]:
    """Samples and folder of each checkpoint that all ranks have finished; `tell` hears of the others.

    Of equal ones the newest comes first: names tell the time, but by the clock of whichever machine gave them. Copies
    of milestones come last, so that a run goes back where its newer checkpoints are deleted.
    """
    found = []
    for folder in newest_first(train_folder):
        try:
            found.append((int(read_state(folder)["samples"]), folder))
        except CheckpointError as error:
            tell(str(error))
    return sorted(found, key=lambda one: (is_copy(one[1]), -one[0]))


def is_copy(folder: str) -> bool:
    """Whether a checkpoint is a milestone's copy."""
    return folder.endswith("/checkpoint")


def read_pieces(folder: str, wanted: Sequence[Piece]) -> Iterator[tuple[Piece, int, int, dict[str, Tensor]]]:
    """Stretches that make up the wanted pieces: (piece, start, end, elements by kind), in no order.

    CheckpointError if a share or a part is missing or damaged, or if the parts do not cover what is wanted.
    """
    left = {piece.name: piece.end - piece.start for piece in wanted}
    by_name = {piece.name: piece for piece in wanted}
    for share in _shares(folder):
        for part in share["parts"]:
            overlaps = [
                (piece, max(start, piece.start), min(end, piece.end), start)
                for name, (start, end) in part["pieces"].items()
                if (piece := by_name.get(name)) and max(start, piece.start) < min(end, piece.end)
            ]
            if overlaps:
                tensors = _read_part(storage.join(folder, part["file"]), part["sha256"])
                for piece, first, last, start in overlaps:
                    elements = {kind: tensors[f"{kind}/{piece.name}"][first - start : last - start] for kind in KINDS}
                    yield piece, first, last, elements
                    left[piece.name] -= last - first
    if lacking := [name for name, count in left.items() if count]:
        raise CheckpointError(f"{folder}: the checkpoint is of another model, it lacks {lacking[0]} wholly or in part")


def read_average(folder: str, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The moving average of whole weights, by name, fp32; errors as `read_pieces`."""
    average = {name: torch.empty(shape.numel()) for name, shape in shapes.items()}
    for piece, start, end, elements in read_pieces(folder, [Piece(n, 0, s.numel()) for n, s in shapes.items()]):
        average[piece.name][start:end] = elements["ema"]
    return {name: weight.view(shapes[name]) for name, weight in average.items()}


def _share(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _shares(folder: str) -> list[dict[str, Any]]:
    names = [name for name in storage.listing(folder, ".json") if name.startswith("rank-")]
    try:
        found = [json.loads(content) for content in storage.read_many([storage.join(folder, name) for name in names])]
        ranks = {share["state"]["ranks"] for share in found if isinstance(share["parts"], list)}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: what a rank says of its share is damaged ({error!r})") from None
    if ranks != {len(found)}:
        of = " or ".join(map(str, ranks)) or "all"
        raise CheckpointError(f"{folder}: the checkpoint is half-written, {len(found)} of {of} ranks have finished it")
    return found


def _write_part(path: str, tensors: Mapping[str, Tensor]) -> str:
    """Writes flat fp32 tensors as safetensors does, and returns the hash.

    The library's own writer copies them while it holds the interpreter, for which training would wait.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with storage.open_atomic(path) as file:
        content: list[Any] = [tensor.numpy() for tensor in tensors.values()]  # views, of which nothing is copied
        for block in (len(text).to_bytes(8, "little"), text, *content):
            file.write(block)
            sha256.update(block)
    return sha256.hexdigest()


def _read_part(path: str, sha256: str) -> dict[str, Tensor]:
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this part of the checkpoint is gone") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(f"{path}: this part of the checkpoint is damaged, its hash is not the one written down")
    try:
        return load(content)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _parts(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += (piece.end - piece.start) * 4 * len(KINDS)
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
