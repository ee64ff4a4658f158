"""Near duplicates across shards: an exact second pass over the hashes that lie beside the ledger.

Two hashes that differ in at most d of 64 bits agree in at least two of d + 2 bands of them. So rows that agree in two
bands are compared, a Ray task for each choice of two, and no pair is missed. Of the rows in their order each is kept
unless it is like an earlier one that is kept. Shards that lose rows are written anew, with their part of the ledger
and their summary; which rows follows from the hashes, which stay, so that a pass that was cut off is simply run again.

The order of a row is its shard's number times 2 ** 32 plus its place among the hashes of the shard.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations, count, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from pipelines.ledger import Entry, by_size, write_ledger
from pipelines.likeness import hashes_path
from pipelines.windows import row_id_of
from t2v import shards, storage
from t2v.digest import digest_of

_ROWS_A_TASK = 20_000_000  # about two gigabytes


class Hashes(NamedTuple):
    """Rows in their order: int64 [n], and their hashes uint64 [n] each."""

    order: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def at(self, rows: np.ndarray) -> "Hashes":
        return Hashes(self.order[rows], self.first[rows], self.second[rows])


def drop_twins(data_dir: str, stream: str, names: Sequence[str], also_sizes: Sequence[int], max_bits: int) -> None:
    """Leave near duplicates out of the shards `names` of a stream, all of them made, and say how many there were.

    Nothing is done if these shards have been through it already.
    """
    note, digest = storage.join(data_dir, "duplicates", f"{stream}.json"), digest_of([list(names), max_bits])
    if storage.exists(note) and storage.read_json(note)["shards"] == digest:
        return
    twins = find_twins([hashes_path(data_dir, stream, name) for name in names], max_bits)
    losing: dict[int, dict[int, int]] = defaultdict(dict)
    for row, kept in twins.items():
        losing[row >> 32][row & 0xFFFFFFFF] = kept
    for size in (None, *also_sizes):  # an index tells how many rows each shard has
        storage.remove(storage.join(shards.latents_folder(data_dir, stream, size), shards.INDEX))
    tasks = [
        (data_dir, stream, names[number], rows, {kept >> 32: names[kept >> 32] for kept in rows.values()})
        for number, rows in losing.items()
    ]
    for _ in _each_as_task(_write_without, tasks):
        pass
    storage.write_json(note, {"shards": digest, "rows": len(twins)})
    print(f"[prepare_data] {stream}: {len(twins):,} near duplicates across shards", flush=True)


def find_twins(paths: Sequence[str], max_bits: int) -> dict[int, int]:
    """Each row to be left out and the kept one that it is like, both by their order."""
    import ray

    rows = sum(_each_as_task(_rows, [(paths[start : start + 1000],) for start in range(0, len(paths), 1000)]))
    parts = 1 + rows // _ROWS_A_TASK
    choices = len(list(combinations(range(max_bits + 2), 2)))
    shared = ray.put(list(paths))
    tasks = [(shared, max_bits, choice, part, parts) for choice in range(choices) for part in range(parts)]
    copies: dict[int, int] = {}
    near: dict[int, set[int]] = defaultdict(set)
    for same, like in _each_as_task(_alike, tasks):
        copies |= dict(same.tolist())
        for row, earlier in like.tolist():
            near[row].add(earlier)
    twins: dict[int, int] = {}
    for row in sorted(near):
        if kept := [earlier for earlier in near[row] if earlier not in twins]:
            twins[row] = min(kept)
    return twins | {row: twins.get(earlier, earlier) for row, earlier in copies.items()}


def _each_as_task(function: Any, arguments: list[tuple]) -> Iterator[Any]:
    """What a function gives for each of the arguments, as it comes."""
    import ray

    task = ray.remote(function)
    waiting = [task.remote(*each) for each in arguments]
    while waiting:
        (done, *_), waiting = ray.wait(waiting)
        yield ray.get(done)


def _rows(paths: list[str]) -> int:
    return sum(pq.read_metadata(storage.open_read(path)).num_rows for path in paths)


def _alike(paths: Sequence[str], max_bits: int, choice: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (later, earlier) [n, 2] of one part of the rows: those of equal hashes, and others by the choice of bands.

    Of rows with equal hashes only the first is compared with others; they are the same for every choice, and told
    by the first one.
    """
    edges = np.linspace(0, 64, max_bits + 3).astype(int)
    one, other = list(combinations(pairwise(edges.tolist()), 2))[choice]

    def read(numbered: tuple[int, str]) -> tuple[np.ndarray, Hashes]:
        number, path = numbered
        table = pq.read_table(storage.open_read(path), columns=["first", "second"])
        order = (number << 32) + np.arange(table.num_rows, dtype=np.int64)
        hashes = Hashes(order, *(column.to_numpy() for column in table.columns))
        key = (_bits(hashes.first, *one) << np.uint64(32)) | _bits(hashes.first, *other)
        mine = key % np.uint64(parts) == part
        return key[mine], hashes.at(mine)

    with ThreadPoolExecutor(8) as pool:
        keys, rows = zip(*pool.map(read, enumerate(paths)), strict=True)
    key = np.concatenate(keys)
    hashes = Hashes(*map(np.concatenate, zip(*rows, strict=True)))
    unlike, same = _split_copies(hashes)
    like = _near_pairs(key[unlike], hashes.at(unlike), max_bits)
    return same if choice == 0 else same[:0], like


def _bits(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    return (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def _split_copies(hashes: Hashes) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are the first with their hashes, and pairs (order of a later one, order of the first) [n, 2]."""
    by_hash = np.lexsort((hashes.order, hashes.second, hashes.first))
    ordered = hashes.at(by_hash)
    new = np.ones(len(by_hash), bool)
    new[1:] = (np.diff(ordered.first) != 0) | (np.diff(ordered.second) != 0)
    firsts = ordered.order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return by_hash[new], np.stack([ordered.order, firsts], axis=1)[~new]


def _near_pairs(key: np.ndarray, hashes: Hashes, max_bits: int) -> np.ndarray:
    """Pairs (later, earlier) [n, 2] of rows whose keys are equal and whose hashes differ by at most `max_bits` each."""
    by_key = np.lexsort((hashes.order, key))
    key, hashes = key[by_key], hashes.at(by_key)
    pairs = [np.empty((0, 2), np.int64)]
    at = np.arange(len(key))
    for lag in count(1):  # each row with the one that many places on, while that still has its key
        at = at[at + lag < len(key)]
        at = at[key[at + lag] == key[at]]
        if not len(at):
            return np.concatenate(pairs)
        one, other = hashes.at(at), hashes.at(at + lag)
        like = np.bitwise_count(one.first ^ other.first) <= max_bits
        like &= np.bitwise_count(one.second ^ other.second) <= max_bits
        pairs.append(np.stack([other.order[like], one.order[like]], axis=1))
    raise AssertionError("count never ends")


def _write_without(data_dir: str, stream: str, name: str, twins: dict[int, int], names: dict[int, str]) -> None:
    """Write a shard anew without the rows `twins`: place among its hashes -> order of the kept row that it is like.

    `names` has the names of the shards of the kept rows.
    """
    row_ids = _row_ids(data_dir, stream, name)
    kept = {number: _row_ids(data_dir, stream, other) for number, other in names.items()}
    told = {row_ids[row]: kept[order >> 32][order & 0xFFFFFFFF] for row, order in twins.items()}
    done = storage.join(data_dir, "done", stream, f"{name}.json")
    summary = storage.read_json(done)
    for size, said in by_size(summary).items():
        path = shards.latents_path(data_dir, stream, name, size)
        shard, digest = shards.drop_rows(path, lambda sample: row_id_of(sample) in told)
        said.update(samples=shard.rows, row_groups=shard.row_groups, digest=digest)
    path = storage.join(data_dir, "ledger", stream, f"{name}.parquet")
    entries = [Entry(**row) for row in pq.read_table(storage.open_read(path)).to_pylist()]
    entries = [_told(entry, told) for entry in entries]
    write_ledger(path, entries)
    storage.write_json(done, summary | {"status": Counter(entry.status for entry in entries)})


def _row_ids(data_dir: str, stream: str, name: str) -> list[str]:
    path = hashes_path(data_dir, stream, name)
    return pq.read_table(storage.open_read(path), columns=["row_id"])["row_id"].to_pylist()


def _told(entry: Entry, twins: dict[str, str]) -> Entry:
    if entry.status != "ok" or entry.row_id not in twins:
        return entry
    return replace(entry, status="filtered_duplicate", stage="filter", message=f"like row {twins[entry.row_id]}")
