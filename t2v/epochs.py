"""What each epoch of a stream holds: fixed when the epoch begins, and written down so that a resumed run finds it.

Shards that are added while training runs join at the next epoch. The rows that are kept for validation are chosen
from the first epoch's list, and no epoch trains on them.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from t2v import storage
from t2v.config import Stream
from t2v.job import STREAMS, TrainJob
from t2v.order import generator
from t2v.shards import Shard, from_index, index_of, list_shards


class Group(NamedTuple):
    """Rows [first, end) of a row group that has `rows`."""

    path: str
    number: int
    first: int
    end: int
    rows: int


class Epoch(NamedTuple):
    """The groups that an epoch trains on, and how many rows of each."""

    groups: list[Group]
    rows: np.ndarray


def begin_anew(job: TrainJob) -> None:
    """Lists the shards of now for the first epoch of a run that has trained nothing, whatever a start before listed."""
    for part in ("epochs", "skipped"):
        folder = storage.join(job.folder, part)
        for name in storage.listing(folder):
            storage.remove(storage.join(folder, name))
    for stream in STREAMS:
        Epochs(job, stream)


class Epochs:
    """The epochs of one stream by their number, and `held_out`: the groups of the rows that none of them trains on.

    ValueError if no row is left to train on, or if the shards of an epoch do not go together with the first's.
    """

    def __init__(self, job: TrainJob, stream: Stream) -> None:
        self.stream = stream
        self._latents = job.latents_folder(stream)
        self._lists = storage.join(job.folder, "epochs")
        self._shards = [self._listed(0)]
        self.held_out = _held_out(self._shards[0], job, stream)
        self._held = {(group.path, group.number): group.end for group in self.held_out}
        self._epochs = [self._epoch(self._shards[0])]

    def __getitem__(self, number: int) -> Epoch:
        while len(self._epochs) <= number:
            listed = self._listed(len(self._epochs))
            self._epochs.append(self._epochs[-1] if listed == self._shards[-1] else self._epoch(listed))
            self._shards.append(listed)
        return self._epochs[number]

    def _listed(self, number: int) -> list[Shard]:
        """The shards of an epoch, as whoever needed it first found them."""
        path = storage.join(self._lists, f"{self.stream}-{number:04}.json")
        if storage.exists(path):
            return from_index(self._latents, storage.read_json(path))
        found = list_shards(self._latents)
        if number and not _alike(found[0], self._shards[0][0]):
            raise ValueError(
                f"{found[0].path} cannot join epoch {number}: it has latents of {found[0].info.shape} by VAE "
                f"{found[0].info.encoder}, training began with {self._shards[0][0].info.shape} by "
                f"{self._shards[0][0].info.encoder}; encode it again, or choose another run_dir"
            )
        return from_index(self._latents, storage.write_json_once(path, index_of(found)))

    def _epoch(self, listed: list[Shard]) -> Epoch:
        groups = [group._replace(first=self._held.get(group[:2], 0)) for group in _groups(listed)]
        trained = [group for group in groups if group.first < group.end]
        if not trained:
            rows = sum(group.rows for group in groups)
            raise ValueError(f"train.held_out_rows: none of the {rows} rows of {self.stream} are left to train on")
        return Epoch(trained, np.array([group.end - group.first for group in trained]))


def _groups(listed: list[Shard]) -> list[Group]:
    return [
        Group(shard.path, number, 0, rows, rows) for shard in listed for number, rows in enumerate(shard.row_groups)
    ]


def _held_out(listed: list[Shard], job: TrainJob, stream: Stream) -> list[Group]:
    """Whole groups, in random order, and the first rows of one more."""
    groups, left = _groups(listed), job.train.held_out_rows
    kept = []
    for index in generator(job.seed, stream, "held out").permutation(len(groups)):
        if not left:
            break
        kept.append(groups[index]._replace(end=min(left, groups[index].rows)))
        left -= kept[-1].end
    return kept


def _alike(one: Shard, other: Shard) -> bool:
    return replace(one.info, data_hash="") == replace(other.info, data_hash="")
