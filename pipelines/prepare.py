"""From manifests to latent shards: Ray Data downloads, decodes and encodes what is not done yet.

The unit of work is a shard: one row group of a normalised manifest becomes one latent shard of each size, one part of
the ledger and one summary, which is written last. Shards are named after their rows and the settings that matter,
so running this again makes what is missing and nothing else.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.archives import read_members
from pipelines.cells import read_cells
from pipelines.config import ClipFilters, DataConfig, StreamConfig
from pipelines.download import open_engine
from pipelines.fetch import Fetched
from pipelines.ledger import Funnel, by_size, funnel_text, read_done, yield_percent
from pipelines.manifests import Manifest, Source, normalise, read_shard, stored
from pipelines.raw import write_raw
from pipelines.ray_data import quieten, tell_if_too_small
from pipelines.vaes import vae_pool
from t2v import storage
from t2v.config import Stream
from t2v.digest import digest_of
from t2v.shards import Shard, encoder_id, info_from_json, latents_folder, latents_path, write_index

# Ray's driver keeps kilobytes for each block until its dataset ends (ray-project/ray#66016). So a block holds several
# shards where there are many, and one dataset covers no more than that its end and new encoders weigh little.
BLOCKS = 1000
_SHARDS_AT_ONCE = 10_000

# Each counts up when equal settings come to give other frames: since 2 HDR is tone-mapped, and pictures are area means;
# since 3 pixels that are no squares are seen as they are shown.
_VERSIONS: dict[Stream, int] = {"videos": 3, "images": 2}

_FETCHED = {"body": pa.large_binary(), "status": pa.string(), "message": pa.string(), "seconds": pa.float32()}


@dataclass(frozen=True)
class StreamPlan:
    """The shards of one stream under the present settings; `names[k]` is made from row group k of the manifest."""

    stream: Stream
    manifest: Manifest
    data_hash: str

    @property
    def names(self) -> list[str]:
        return [self._name(index, rows) for index, rows in enumerate(self.manifest.shards["digest"].to_pylist())]

    def task(self, index: int) -> dict:
        """What the stages are told of one shard."""
        shard = self.manifest.shards.slice(index, 1).to_pylist()[0]
        whole = {"stream": self.stream, "data_hash": self.data_hash}
        whole |= {"manifest": self.manifest.path, "source": self.manifest.source}
        return {"name": self._name(index, shard["digest"]), "index": index, "rows": shard["rows"]} | whole

    def _name(self, index: int, rows_digest: str) -> str:
        return f"{index:06d}-{digest_of([rows_digest, self.data_hash], digits=12)}"

    def tasks(self, data_dir: str, done: bool) -> pa.Table:
        """What the stages are told of each shard that has a summary, or has none yet: one row a shard."""
        names = pa.array(self.names, pa.string())
        folder = storage.join(data_dir, "done", self.stream)
        there = [summary.removesuffix(".json") for summary in storage.listing(folder, ".json")]
        tasks = pa.table({"name": names, "index": range(len(names)), "rows": self.manifest.shards["rows"]})
        tasks = tasks.filter(pc.equal(pc.is_in(names, pa.array(there, pa.string())), done))
        for name, value in (("stream", self.stream), ("data_hash", self.data_hash), ("manifest", self.manifest.path)):
            tasks = tasks.append_column(name, pa.repeat(value, tasks.num_rows).dictionary_encode())
        return tasks.append_column("source", pa.repeat(self.manifest.source, tasks.num_rows))


def prepare(run_dir: str, data: DataConfig, vae_path: str | None, seed: int) -> Funnel:
    """Make every shard of both streams that is not there yet; print, write and return the funnel.

    `vae_path` is a diffusers AutoencoderKL folder. Manifests, VAE and run folder are tried before Ray is
    touched, and with nothing to do it is not touched at all.
    """
    if data.size in data.also_sizes:
        raise ValueError(f"data.also_sizes: {data.size} is data.size as well")
    encoder = encoder_id(vae_path)
    if data.filters != ClipFilters():
        from pipelines.filters import check_filters

        check_filters(data.filters)
    data_dir = storage.join(storage.absolute(run_dir), "data")
    storage.sweep(data_dir)
    plans = plan_streams(data_dir, data, encoder, seed)
    if not plans:
        raise ValueError("data.videos.manifest and data.images.manifest are both unset: nothing to prepare")
    storage.write_json(storage.join(data_dir, "plan.json"), {plan.stream: plan.data_hash for plan in plans})
    tasks = pa.concat_tables([plan.tasks(data_dir, done=False) for plan in plans]).unify_dictionaries()
    total = sum(plan.manifest.shards.num_rows for plan in plans)
    print(f"[prepare_data] {total - len(tasks)}/{total} shards are done already", flush=True)
    if len(tasks):
        for stream in tasks["stream"].unique().to_pylist():
            storage.remove(storage.join(data_dir, "duplicates", f"{stream}.json"))  # its shards are to be compared anew
        settings = {
            "data_dir": data_dir,
            "data": data,
            "vae_path": storage.absolute(str(vae_path)),
            "encoder": encoder,
            "seed": seed,
        }
        rows, ok = 0, 0
        windows = (tasks.slice(start, _SHARDS_AT_ONCE) for start in range(0, len(tasks), _SHARDS_AT_ONCE))
        _tell_needs(data)
        with vae_pool(data.encode, storage.absolute(str(vae_path)), encoder, data.sizes) as vaes:
            made_shards = chain.from_iterable(_make(window, data, settings | {"vaes": vaes}) for window in windows)
            for done, made in enumerate(made_shards, start=total - len(tasks) + 1):
                rows, ok = rows + made["rows"], ok + made["ok"]
                print(f"[prepare_data] {done}/{total} shards  {ok:,}/{rows:,} rows ok", flush=True)
    if data.filters.duplicates_across and data.filters.duplicate_bits is not None:
        from pipelines.twins import drop_twins

        for plan in plans:
            drop_twins(data_dir, plan.stream, plan.names, data.also_sizes, data.filters.duplicate_bits)
    return _finish(data_dir, plans)


def stored_plans(data_dir: str) -> list[StreamPlan]:
    """What a run is making or has made, from its storage alone; FileNotFoundError if nothing was begun there."""
    note = storage.join(data_dir, "plan.json")
    if not storage.exists(note):
        raise FileNotFoundError(f"{note}: no such file, so nothing was prepared in this run folder")
    return [
        StreamPlan(stream, stored(storage.join(data_dir, "manifest", stream)), data_hash)
        for stream, data_hash in storage.read_json(note).items()
    ]


class ShardFetcher:
    """Ray Data's first stage: holds a download engine, its connections and its DNS cache, and serves a shard a call."""

    def __init__(self, data_dir: str, data: DataConfig) -> None:
        self.data_dir, self.data = data_dir, data
        self.download = open_engine(data.fetch)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row, a shard that is to be made -> the same row and its downloads.

        All the downloads of a shard travel as one value, a table in Arrow's stream format, so that Ray Data never
        splits a shard between two encoders.
        """
        begun = time.monotonic()
        (task,) = batch.to_pylist()
        rows = read_shard(task["manifest"], task["index"])
        answers = iter(self._fetch(task["source"], [row for row in rows if not row["status"]]))
        fetched = [Fetched(b"", row["status"], row["message"], 0.0) if row["status"] else next(answers) for row in rows]
        if self.data.raw == "webdataset" and task["source"] == "urls":
            write_raw(storage.join(self.data_dir, "raw", task["stream"]), task["name"], rows, fetched)
        return _with_downloads(batch, rows, fetched, begun)

    def _fetch(self, source: Source, rows: list[dict]) -> list[Fetched]:
        if source == "cells":
            return read_cells([row["address"] for row in rows], self.data.fetch.max_bytes)
        urls = [row["url"] for row in rows]
        return read_members(urls, self.data.fetch.max_bytes) if source == "archive" else self.download(urls)


def _with_downloads(batch: pa.Table, rows: list[dict], fetched: list[Fetched], begun: float) -> pa.Table:
    downloads = pa.table(
        {name: pa.array([row[name] for row in rows], pa.string()) for name in ("row_id", "url", "caption")}
        | {name: pa.array([getattr(one, name) for one in fetched], kind) for name, kind in _FETCHED.items()}
        | {"stage": ["manifest" if row["status"] else "fetch" for row in rows]}
    )
    packed = pa.BufferOutputStream()
    with pa.ipc.new_stream(packed, downloads.schema) as writer:
        writer.write_table(downloads)
    buffer = packed.getvalue()
    ends = pa.array([0, buffer.size], pa.int64()).buffers()[1]
    value = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, buffer])  # without copying what may be gigabytes
    seconds = pa.array([time.monotonic() - begun])
    return batch.append_column("fetch_s", seconds).append_column("downloads", value)


def _make(tasks: pa.Table, data: DataConfig, settings: dict[str, Any]) -> Iterator[dict]:
    """Run the two stages over the missing shards; yields how many rows of each are ok, once it is committed."""
    import ray.data

    from pipelines.encode import ShardEncoder

    made = (
        ray.data.from_arrow(tasks, override_num_blocks=min(len(tasks), BLOCKS))
        .map_batches(
            ShardFetcher,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs={"data_dir": settings["data_dir"], "data": data},
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(data.fetch.workers, len(tasks))),
            num_cpus=data.fetch.cpus_per_task,
        )
        .map_batches(
            ShardEncoder,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs=settings,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=min(data.encode.workers, len(tasks)),
                max_concurrent_calls_per_actor=data.encode.shards_at_once,
                enable_true_multi_threading=True,
            ),
            num_cpus=data.encode.cpus_per_worker,
            num_gpus=0 if settings["vaes"] else data.encode.gpus_per_worker,
        )
    )
    quieten(made)
    for summaries in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from summaries.to_pylist()  # type: ignore[union-attr]


def _tell_needs(data: DataConfig) -> None:
    encode = data.encode
    cpus = encode.cpus_per_worker + data.fetch.cpus_per_task + encode.vae_workers * encode.vae_cpus
    vaes = f"{encode.vae_workers} VAEs (data.encode.vae_workers), " if encode.vae_workers else ""
    what = f"{vaes}one encoder (data.encode) with one download (data.fetch) needs them"
    tell_if_too_small("prepare_data", cpus, encode.gpus_needed, what)


def plan_streams(data_dir: str, data: DataConfig, encoder: str, seed: int) -> list[StreamPlan]:
    """The plans of the streams that have a manifest, which is normalised if it is not yet."""
    inputs: list[tuple[Stream, StreamConfig]] = [("videos", data.videos), ("images", data.images)]
    plans = []
    for stream, config in inputs:
        if config.manifest is not None:
            path = storage.join(data_dir, "manifest", stream)
            manifest = normalise(config, path)
            plans.append(StreamPlan(stream, manifest, _settings_hash(stream, data, encoder, seed)))
    return plans


def _settings_hash(stream: Stream, data: DataConfig, encoder: str, seed: int) -> str:
    """Stands for all that decides what a row's latent is; how it is fetched does not."""
    settings: dict[str, Any] = {
        "stream": stream,
        "size": data.size,
        "keep_variance": data.keep_variance,
        "encoder": encoder,
        "version": _VERSIONS[stream],
    }
    if stream == "videos":
        settings |= {"frames": data.frames, "fps": data.fps, "seed": seed}
        if data.windows > 1:
            settings["windows"] = data.windows
    if data.also_sizes:
        settings["also_sizes"] = sorted(data.also_sizes)
    if data.filters != ClipFilters():
        settings["filters"] = asdict(data.filters)
    return digest_of(settings, digits=12)


def _finish(data_dir: str, plans: list[StreamPlan]) -> Funnel:
    """Check that every shard is there; write the index for training and the funnel."""
    funnel: Funnel = {}
    samples: dict[str, int] = {}
    for plan in plans:
        made: dict[int | None, list[Shard]] = defaultdict(list)
        funnel[plan.stream] = Counter()
        for name, one in read_done(data_dir, plan.stream, plan.names):
            funnel[plan.stream].update(one["status"])
            for size, said in by_size(one).items():
                path = latents_path(data_dir, plan.stream, name, size)
                info = made[size][0].info if made[size] else info_from_json(said["info"])  # of all shards of a plan
                made[size].append(Shard(path, tuple(said["row_groups"]), info))
        if missing := plan.manifest.shards.num_rows - len(made[None]):
            raise RuntimeError(f"{plan.stream}: {missing} shards were not made; run this again")
        for size, of_size in made.items():
            write_index(latents_folder(data_dir, plan.stream, size), of_size)
        samples[plan.stream] = sum(shard.rows for shard in made[None])
    storage.write_json(
        storage.join(data_dir, "funnel.json"),
        {
            stream: {
                "rows": statuses.total(),
                "status": statuses,
                "yield_percent": yield_percent(statuses),
                "samples": samples[stream],
            }
            for stream, statuses in funnel.items()
        },
    )
    print(funnel_text(funnel), flush=True)
    for stream, statuses in funnel.items():
        if samples[stream] != statuses["ok"]:
            print(f"{stream}: {samples[stream]:,} samples came of {statuses['ok']:,} rows", flush=True)
    return funnel
