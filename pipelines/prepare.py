"""From manifests to latent shards: Ray Data downloads, decodes and encodes what is not done yet.

The unit of work is a shard: one row group of a normalised manifest becomes one latent shard, one part of the
ledger and one summary, which is written last. Shards are named after their rows and the settings that matter,
so running this again makes what is missing and nothing else.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipelines.config import ClipFilters, DataConfig, FetchConfig, StreamConfig
from pipelines.fetch import fetch_all
from pipelines.ledger import Funnel, funnel_text, read_done, yield_percent
from pipelines.manifests import Manifest, normalise, read_shard
from pipelines.ray_data import quieten, tell_if_too_small
from t2v import storage
from t2v.config import Stream
from t2v.digest import digest_of
from t2v.shards import Shard, encoder_id, info_from_json, write_index

_FETCHED = {"body": pa.large_binary(), "status": pa.string(), "message": pa.string(), "seconds": pa.float32()}


@dataclass(frozen=True)
class StreamPlan:
    """The shards of one stream under the present settings; `names[k]` is made from row group k of the manifest."""

    stream: Stream
    manifest: Manifest
    data_hash: str

    @property
    def names(self) -> list[str]:
        digests = [digest_of([digest, self.data_hash], digits=12) for _, digest in self.manifest.shards]
        return [f"{index:06d}-{digest}" for index, digest in enumerate(digests)]

    def missing(self, data_dir: str) -> Iterator[dict]:
        """What the stages are told of each shard that has no summary yet."""
        done = set(storage.listing(storage.join(data_dir, "done", self.stream), ".json"))
        for index, (name, (rows, _)) in enumerate(zip(self.names, self.manifest.shards, strict=True)):
            if f"{name}.json" not in done:
                place = {"manifest": self.manifest.path, "index": index, "rows": rows}
                yield {"stream": self.stream, "name": name, "data_hash": self.data_hash, **place}


def prepare(run_dir: str, data: DataConfig, vae_path: str | None, seed: int) -> Funnel:
    """Make every shard of both streams that is not there yet; print, write and return the funnel.

    `vae_path` is a diffusers AutoencoderKL folder. Manifests, VAE and run folder are tried before Ray is
    touched, and with nothing to do it is not touched at all.
    """
    encoder = encoder_id(vae_path)
    if data.filters != ClipFilters():
        from pipelines.filters import check_filters

        check_filters(data.filters)
    data_dir = storage.join(storage.absolute(run_dir), "data")
    plans = _plans(data_dir, data, encoder, seed)
    tasks = [task for plan in plans for task in plan.missing(data_dir)]
    total = sum(len(plan.names) for plan in plans)
    print(f"[prepare_data] {total - len(tasks)}/{total} shards are done already", flush=True)
    if tasks:
        for stream in {task["stream"] for task in tasks}:
            storage.remove(storage.join(data_dir, "duplicates", f"{stream}.json"))  # its shards are to be compared anew
        settings = {
            "data_dir": data_dir,
            "data": data,
            "vae_path": storage.absolute(str(vae_path)),
            "encoder": encoder,
            "seed": seed,
        }
        rows, ok = 0, 0
        for done, made in enumerate(_make(tasks, data, settings), start=total - len(tasks) + 1):
            rows, ok = rows + made["rows"], ok + made["ok"]
            print(f"[prepare_data] {done}/{total} shards  {ok:,}/{rows:,} rows ok", flush=True)
    if data.filters.duplicates_across and data.filters.duplicate_bits is not None:
        from pipelines.twins import drop_twins

        for plan in plans:
            drop_twins(data_dir, plan.stream, plan.names, data.filters.duplicate_bits)
    return _finish(data_dir, plans)


def fetch_shard(batch: pa.Table, config: FetchConfig) -> pa.Table:
    """Ray Data's first stage: one row, a shard that is to be made -> the same row and its downloads.

    All the downloads of a shard travel as one value, a table in Arrow's stream format, so that Ray Data never
    splits a shard between two encoders.
    """
    begun = time.monotonic()
    (task,) = batch.to_pylist()
    rows = read_shard(task["manifest"], task["index"])
    fetched = asyncio.run(fetch_all([row["url"] for row in rows], config))
    downloads = pa.table(
        {name: pa.array([row[name] for row in rows], pa.string()) for name in ("row_id", "url", "caption")}
        | {name: pa.array([getattr(one, name) for one in fetched], kind) for name, kind in _FETCHED.items()}
    )
    packed = pa.BufferOutputStream()
    with pa.ipc.new_stream(packed, downloads.schema) as writer:
        writer.write_table(downloads)
    value = pa.array([packed.getvalue().to_pybytes()], pa.large_binary())
    seconds = pa.array([time.monotonic() - begun])
    return batch.append_column("fetch_s", seconds).append_column("downloads", value)


def _make(tasks: list[dict], data: DataConfig, settings: dict[str, Any]) -> Iterator[dict]:
    """Run the two stages over the missing shards; yields how many rows of each are ok, once it is committed."""
    import ray.data

    from pipelines.encode import ShardEncoder

    cpus = data.encode.cpus_per_worker + data.fetch.cpus_per_task
    what = "one encoder (data.encode) with one download (data.fetch) needs them"
    tell_if_too_small("prepare_data", cpus, data.encode.gpus_per_worker, what)
    made = (
        ray.data.from_items(tasks, override_num_blocks=len(tasks))
        .map_batches(
            fetch_shard,  # type: ignore[arg-type]
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"config": data.fetch},
            num_cpus=data.fetch.cpus_per_task,
        )
        .map_batches(
            ShardEncoder,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_kwargs=settings,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(data.encode.workers, len(tasks))),
            num_cpus=data.encode.cpus_per_worker,
            num_gpus=data.encode.gpus_per_worker,
        )
    )
    quieten(made)
    for summaries in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from summaries.to_pylist()  # type: ignore[union-attr]


def _plans(data_dir: str, data: DataConfig, encoder: str, seed: int) -> list[StreamPlan]:
    inputs: list[tuple[Stream, StreamConfig]] = [("videos", data.videos), ("images", data.images)]
    plans = []
    for stream, config in inputs:
        if config.manifest is not None:
            path = storage.join(data_dir, "manifest", f"{stream}.parquet")
            manifest = normalise(config.manifest, config.columns, config.shard_rows, path)
            plans.append(StreamPlan(stream, manifest, _settings_hash(stream, data, encoder, seed)))
    if not plans:
        raise ValueError("data.videos.manifest and data.images.manifest are both unset: nothing to prepare")
    return plans


def _settings_hash(stream: Stream, data: DataConfig, encoder: str, seed: int) -> str:
    """Stands for all that decides what a row's latent is; how it is fetched does not."""
    settings: dict[str, Any] = {
        "stream": stream,
        "size": data.size,
        "keep_variance": data.keep_variance,
        "encoder": encoder,
    }
    if stream == "videos":
        settings |= {"frames": data.frames, "fps": data.fps, "seed": seed}
        if data.windows > 1:
            settings["windows"] = data.windows
    if data.filters != ClipFilters():
        settings["filters"] = asdict(data.filters)
    return digest_of(settings, digits=12)


def _finish(data_dir: str, plans: list[StreamPlan]) -> Funnel:
    """Check that every shard is there; write the index for training and the funnel."""
    funnel: Funnel = {}
    samples: dict[str, int] = {}
    for plan in plans:
        done = read_done(data_dir, plan.stream, plan.names)
        if len(done) < len(plan.names):
            raise RuntimeError(f"{plan.stream}: {len(plan.names) - len(done)} shards were not made; run this again")
        folder = storage.join(data_dir, "latents", plan.stream)
        made = [
            Shard(storage.join(folder, f"{name}.parquet"), tuple(one["row_groups"]), info_from_json(one["info"]))
            for name, one in zip(plan.names, done, strict=True)
        ]
        write_index(folder, made)
        samples[plan.stream] = sum(shard.rows for shard in made)
        funnel[plan.stream] = sum((Counter(one["status"]) for one in done), Counter())
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
