"""Whether what the preparation has finished is what it says: shards are read again, and damaged ones queued again."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ledger import by_size
from pipelines.manifests import read_shard
from pipelines.prepare import BLOCKS, stored_plans
from pipelines.ray_data import quieten
from pipelines.windows import row_id_of
from t2v import shards, storage

# What reading raises where bits have changed: Arrow, JSON, and whoever looks for what is not there.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException)


def verify(run_dir: str) -> int:
    """Reads every finished shard of a run again, on all nodes; says what is wrong and returns how many are damaged.

    A damaged shard loses its summary, so that the next run of the preparation makes it anew. FileNotFoundError if
    nothing was prepared there.
    """
    data_dir = storage.join(storage.absolute(run_dir), "data")
    plans = stored_plans(data_dir)
    tasks = pa.concat_tables([plan.tasks(data_dir, done=True) for plan in plans]).unify_dictionaries()
    damaged = 0
    for row in _checked(data_dir, tasks) if len(tasks) else ():
        if row["damage"]:
            damaged += 1
            print(f"[verify] {row['stream']} {row['name']}: {row['damage']}", flush=True)
            storage.remove(storage.join(data_dir, "done", row["stream"], f"{row['name']}.json"))
    print(f"[verify] {len(tasks):,} shards read again, {damaged:,} damaged", flush=True)
    if damaged:
        print("[verify] run jobs/prepare_data.py again: it makes these anew, and nothing else", flush=True)
    return damaged


def damage(data_dir: str, task: dict) -> str:
    """What is wrong with a finished shard: its ledger, its latents, or what both say of the manifest; '' if nothing.

    `task` names it: stream, name, and manifest and index, the row group that it was made of.
    """
    try:
        return _damage(data_dir, task)
    except _UNREADABLE as error:
        return f"cannot be read: {type(error).__name__} {error}"


def _damage(data_dir: str, task: dict) -> str:
    stream, name = task["stream"], task["name"]
    summary = storage.read_json(storage.join(data_dir, "done", stream, f"{name}.json"))
    with storage.open_read(storage.join(data_dir, "ledger", stream, f"{name}.parquet")) as file:
        entries = pq.read_table(file).to_pylist()
    asked = [row["row_id"] for row in read_shard(task["manifest"], task["index"])]
    if [entry["row_id"] for entry in entries] != asked:
        return "its ledger does not hold the rows of its manifest, one for one"
    if Counter(entry["status"] for entry in entries) != Counter(summary["status"]):
        return "its ledger and its summary count differently"
    ok = [entry["row_id"] for entry in entries if entry["status"] == "ok"]
    for size, said in by_size(summary).items():
        if wrong := _damage_of_latents(shards.latents_path(data_dir, stream, name, size), ok, said["digest"]):
            return f"at {size} pixels, {wrong}" if size else wrong
    return ""


def _damage_of_latents(path: str, ok: list[str], digest: str) -> str:
    """The same of the latents of one size, which are to be those of the rows `ok`."""
    try:
        rows = shards.read_shard(path)
    except _UNREADABLE as error:
        return f"cannot be read: {type(error).__name__} {error}"
    if list(dict.fromkeys(row_id_of(sample) for sample in rows.row_id)) != list(dict.fromkeys(ok)):
        return "its latents are not those of the rows that its ledger calls ok"
    times = Counter(ok)  # more than once where the manifest has a URL more than once
    if any(count > times[row_id_of(sample)] for sample, count in Counter(rows.row_id).items()):
        return "it holds a row twice"
    if not all(np.isfinite(latents).all() for latents in (rows.mean, rows.logvar) if latents is not None):
        return "it holds latents that are not finite"
    if shards.digest_rows(rows) != digest:
        return "its content is not what was written"
    return ""


def _checked(data_dir: str, tasks: pa.Table) -> Iterator[dict]:
    import ray.data

    blocks = ray.data.from_arrow(tasks, override_num_blocks=min(len(tasks), BLOCKS))
    checked = blocks.map(lambda task: task | {"damage": damage(data_dir, task)})
    quieten(checked)
    yield from checked.iter_rows()
