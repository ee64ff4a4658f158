"""Training without latents: Ray Data downloads and encodes raw shards while ranks train on them.

The raw shards of a stream are those of the preparation, one row group of a normalised manifest each, in the endless
order of t2v/order.py. An actor of each stream runs Ray Data over stretches of that order and gives what is made to
whichever rank asks. Ray Data works ahead of the ranks as far as its share of the object store holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import ClipFilters, DataConfig
from pipelines.ledger import write_ledger
from pipelines.manifests import read_shard, stored
from pipelines.prepare import ShardFetcher, StreamPlan, plan_streams
from pipelines.ray_data import quieten
from pipelines.vaes import VaeFacts, vae_facts
from t2v import storage
from t2v.config import Stream
from t2v.job import STREAMS, Source, TrainJob
from t2v.online import NUMBER, numbered
from t2v.order import shard_order
from t2v.shards import LatentInfo, encoder_id, rows_table

# Of one dataset, the first one and the largest, each next one being twice the last: a block takes 0.8 ms before the
# first is begun and kilobytes until all are done (ray-project/ray#66016), a dataset's end and new encoders seconds.
SHARDS_AT_FIRST, SHARDS_AT_ONCE = 250, 4000
PROMPTS = 8


class Pool(NamedTuple):
    """Actors of one stream."""

    fetchers: int
    encoders: int


@dataclass(frozen=True)
class Online:
    """How raw shards are encoded; called on rank 0, it begins that for both streams (t2v/worker.py's Encode)."""

    data_dir: str
    data: DataConfig
    vae_path: str
    encoder: str
    seed: int
    hashes: Mapping[Stream, str]  # of the settings that rows depend on

    def __call__(self, job: TrainJob, world: int, begun: Mapping[Stream, int]) -> dict[Stream, ray.actor.ActorHandle]:
        """An actor for each stream, which ends with the process that calls."""
        pools = share(job, self.data, world, ray.cluster_resources())
        # By a node: or what an actor starts would have to find room in the ranks' placement group.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = Encoding.options(scheduling_strategy=here)  # type: ignore[attr-defined]
        return {stream: actor.remote(self, stream, begun[stream], pools[stream]) for stream in STREAMS}

    def plan(self, stream: Stream) -> StreamPlan:
        return StreamPlan(stream, stored(storage.join(self.data_dir, "manifest", stream)), self.hashes[stream])


@ray.remote(num_cpus=0)
class Encoding:
    """The rows of one stream from the raw shard numbered `begun` on, for ever."""

    def __init__(self, online: Online, stream: Stream, begun: int, pool: Pool) -> None:
        self._online, self._pool, self._plan = online, pool, online.plan(stream)
        self._shards = self._plan.manifest.shards.num_rows
        self._order = shard_order(online.seed, stream, self._shards, begun)
        self._stretch = SHARDS_AT_FIRST
        self._made = iter(())
        self._dealt = self._rows = 0

    def next(self) -> list[ray.ObjectRef]:
        """References to tables as t2v/online.py takes them.

        ValueError if no row at all came of two epochs.
        """
        while (bundle := next(self._made, None)) is None:
            self._made = self._dataset().iter_internal_ref_bundles()
        self._dealt += len(bundle.block_refs)
        self._rows += bundle.num_rows()
        if self._dealt >= 2 * self._shards and not self._rows:
            ledger = _ledger(self._online.data_dir, self._plan.stream)
            raise ValueError(f"{self._plan.stream}: none of {self._shards} raw shards has a usable row; see {ledger}")
        return bundle.block_refs

    def _dataset(self) -> Any:
        """The next stretch of the order, whose shards are begun one after another: a block each."""
        import ray.data

        data, encode = self._online.data, self._online.data.encode
        tasks = [self._plan.task(index) | {NUMBER: number} for number, index in islice(self._order, self._stretch)]
        self._stretch = min(2 * self._stretch, SHARDS_AT_ONCE)
        rows = (
            ray.data.from_items(tasks, override_num_blocks=len(tasks))
            .map_batches(
                ShardFetcher,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs={"data_dir": self._online.data_dir, "data": data},
                compute=ray.data.ActorPoolStrategy(size=self._pool.fetchers),
                num_cpus=data.fetch.cpus_per_task,
            )
            .map_batches(
                RowEncoder,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs={"online": self._online},
                compute=ray.data.ActorPoolStrategy(
                    size=self._pool.encoders,
                    max_concurrent_calls_per_actor=encode.shards_at_once,
                    enable_true_multi_threading=True,
                ),
                num_cpus=encode.cpus_per_worker,
                num_gpus=encode.gpus_per_worker,
            )
        )
        quieten(rows)
        return rows


class RowEncoder:
    """Ray Data's second stage: holds the VAE and gives the rows of one shard a call, the others to the ledger."""

    def __init__(self, online: Online) -> None:
        from pipelines.encode import MediaEncoder
        from pipelines.meters import Meters

        self._data_dir = online.data_dir
        self._media = MediaEncoder(online.data, online.vae_path, online.encoder, online.seed)
        self._meters = Meters()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """One row, a shard with its downloads (pipelines/prepare.py) -> its rows that are ok."""
        made = self._media.encode(batch)
        name, stream, number = (made.task[key] for key in ("name", "stream", NUMBER))
        write_ledger(storage.join(_ledger(self._data_dir, stream), f"{name}.parquet"), made.entries)
        took = {"fetch": made.task["fetch_s"], "encode": made.seconds}
        ((info, rows),) = made.latents.values()
        self._meters.shard(stream, made.entries, len(rows) * info.frames, took)
        return numbered(rows_table(name, info, rows), number)


def open_online(run_dir: str, data: DataConfig, vae_path: str | None, seed: int) -> tuple[Online, dict[Stream, Source]]:
    """What encodes both streams, and what they are; ValueError or FileNotFoundError if that cannot work."""
    from t2v.frozen import load_vae
    from t2v.memory import encoder_bytes

    encoder = encoder_id(vae_path)
    if data.filters != ClipFilters():
        from pipelines.filters import check_filters

        check_filters(data.filters)
    if data.filters.duplicates_across:
        raise ValueError("data.filters.duplicates_across needs all latents; with train.feed online set it to false")
    if data.encode.vae_workers:
        raise ValueError("data.encode.vae_workers: VAEs apart are for prepare_data; with train.feed online set it to 0")
    if data.also_sizes:
        raise ValueError("data.also_sizes: further sizes are for prepare_data; with train.feed online set it to []")
    for stream in STREAMS:
        if getattr(data, stream).manifest is None:
            raise ValueError(
                f"data.{stream}.manifest is not set: train.feed online trains on manifests of both streams"
            )
    data_dir = storage.join(storage.absolute(run_dir), "data")
    plans = plan_streams(data_dir, data, encoder, seed)
    hashes = {plan.stream: plan.data_hash for plan in plans}
    vae = load_vae(str(vae_path))
    facts = vae_facts(vae, data.size)
    on_gpu = encoder_bytes(vae.model, data.encode.batch_frames, data.size)
    online = Online(data_dir, data, storage.absolute(str(vae_path)), encoder, seed, hashes)
    return online, {plan.stream: _source(plan, data, facts, on_gpu) for plan in plans}


def _source(plan: StreamPlan, data: DataConfig, facts: VaeFacts, on_gpu: float) -> Source:
    channels, height, width = facts.shape
    shape = (channels, data.frames if plan.stream == "videos" else 1, height, width)
    info = LatentInfo(plan.stream, shape, facts.id, facts.scale, plan.data_hash)
    manifest = plan.manifest
    captions = [row["caption"] for row in read_shard(manifest.path, 0) if not row["status"]]
    needs = {"CPU": data.fetch.cpus_per_task + data.encode.cpus_per_worker, "GPU": data.encode.gpus_per_worker}
    rows, shards = manifest.rows, manifest.shards.num_rows
    return Source(info, manifest.path, manifest.digest, rows, shards, tuple(captions[:PROMPTS]), needs, on_gpu)


def share(job: TrainJob, data: DataConfig, world: int, resources: Mapping[str, float]) -> dict[Stream, Pool]:
    """How many of `data.fetch.workers` and `data.encode.workers` each stream has, beside `world` ranks.

    They are shared as the streams are in a step, at least one each, and no more than there is room for: actors that
    one stream waits for while the other holds what they need would wait for ever.
    """
    asked = {"fetch": data.fetch.workers, "encode": data.encode.workers}
    counts = {(s, what): max(1, round(n * job.step.shares[s])) for what, n in asked.items() for s in STREAMS}
    each = {
        "CPU": {"fetch": data.fetch.cpus_per_task, "encode": data.encode.cpus_per_worker},
        "GPU": {"fetch": 0.0, "encode": data.encode.gpus_per_worker},
    }
    ranks = {"CPU": job.train.cpus_per_worker, "GPU": job.train.gpus_per_worker}
    for kind, cost in each.items():
        left = resources.get(kind, 0) - world * ranks[kind] + 1e-6
        while sum(n * cost[what] for (_, what), n in counts.items()) > left:
            costly = max(counts, key=lambda one: counts[one] * cost[one[1]] if counts[one] > 1 else -1)
            if counts[costly] == 1 or not cost[costly[1]]:
                break  # t2v/checks.py has seen room for one of each: the cluster is still growing
            counts[costly] -= 1
    return {stream: Pool(counts[stream, "fetch"], counts[stream, "encode"]) for stream in STREAMS}


def _ledger(data_dir: str, stream: str) -> str:
    return storage.join(data_dir, "ledger_online", stream)
