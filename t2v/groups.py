"""Row groups of an epoch -> their rows; where a shard is missing or corrupt, training stops or other rows stand in."""

import errno
import threading

from t2v import storage
from t2v.epochs import Epochs, Group
from t2v.job import TrainJob
from t2v.order import generator
from t2v.shards import Rows, open_shard, read_rows

STAND_INS = 20  # groups tried in place of a bad one: where none of them can be read, it is not the shards


class BadShard(ValueError):
    """A shard that is missing, corrupt or not as it was when its epoch began."""


class Reader:
    """Reads groups, and with `bad_shards: skip` others in place of those that cannot be read.

    Which others depends on (seed, stream, epoch, group). Each bad group becomes a line of train/skipped/RANK.jsonl;
    what these files name is not tried again in that epoch, so a resumed run reads the same rows even if the shard
    has been mended since. Checksums are compared when a group is read for the first time. Several threads may read at
    once.
    """

    def __init__(self, job: TrainJob, rank: int) -> None:
        self._seed, self._skips = job.seed, job.train.bad_shards == "skip"
        folder = storage.join(job.folder, "skipped")
        self._path = storage.join(folder, f"{rank}.jsonl")
        self._lock = threading.Lock()
        self._verified: set[tuple[str, int]] = set()
        found = {name: storage.read_lines(storage.join(folder, name)) for name in storage.listing(folder, ".jsonl")}
        self._lines = found.get(f"{rank}.jsonl", [])
        self._bad = {_key(line) for lines in found.values() for line in lines}

    def read(self, epochs: Epochs, epoch: int, index: int) -> Rows:
        """The rows that an epoch trains on in the place of its group `index`: its own, or others as often as needed.

        BadShard, which names the shard, if they cannot be read and none may stand in.
        """
        groups = epochs[epoch].groups
        if not self._skips:
            return self._read(groups[index])
        others = generator(self._seed, epochs.stream, "stand-in", epoch, index).integers(len(groups), size=STAND_INS)
        for group in (groups[place] for place in [index, *others.tolist()]):
            line = {"stream": epochs.stream, "epoch": epoch, "shard": group.path.rsplit("/", 1)[-1]}
            line |= {"group": group.number}
            if _key(line) in self._bad:
                continue
            try:
                return self._read(group)
            except BadShard as error:
                self._note(line | {"reason": str(error.__cause__ or error)})
        raise BadShard(f"{groups[index].path}: neither it nor any of {STAND_INS} groups in its place can be read")

    def _read(self, group: Group) -> Rows:
        rows = read_group(group, verify=group[:2] not in self._verified)
        self._verified.add(group[:2])
        return rows

    def _note(self, line: dict) -> None:
        with self._lock:
            self._bad.add(_key(line))
            self._lines.append(line)
            storage.write_lines(self._path, self._lines)
        print(f"[train] skipped {line['shard']}, row group {line['group']}: {line['reason']}", flush=True)


def read_group(group: Group, verify: bool = True) -> Rows:
    """Rows [first, end) of a row group; BadShard if it cannot be read or is another than was listed."""
    try:
        rows = read_rows(open_shard(group.path, verify), group.number)
        if len(rows) != group.rows:
            raise ValueError(f"has {len(rows)} rows, but had {group.rows} when its epoch began")
        return rows[group.first : group.end]
    except (OSError, ValueError) as error:
        if not _is_bad(error):
            raise
        raise BadShard(
            f"{group.path}: row group {group.number} cannot be read ({error}); bring the shard back, or set "
            "train.bad_shards to skip, and run again"
        ) from error


def _is_bad(error: OSError | ValueError) -> bool:
    """Whether the shard is at fault, and not the way to it; Arrow's errors of what it reads have no number."""
    if isinstance(error, (ValueError, FileNotFoundError)):
        return True
    return type(error) is OSError and error.errno in (None, errno.EIO)


def _key(line: dict) -> tuple[str, int, str, int]:
    return line["stream"], line["epoch"], line["shard"], line["group"]
