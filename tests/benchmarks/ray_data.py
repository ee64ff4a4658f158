"""What Ray Data costs: the preparation by Ray Data beside the same functions in a bare pool of two processes.

    python tests/benchmarks/ray_data.py > tests/benchmarks/results/ray_data.txt

A corpus of shapes is served on loopback; both make the same shards on two cores, one thread each, in alternating
rounds. Rates are rows a second from the sixth finished shard to the last, so that neither's start counts.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from header import PROJECT, header

sys.path.insert(0, str(PROJECT))
ROUNDS, FIRST = 3, 5
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


def settings(corpus: Path, run_dir: str) -> tuple[Any, dict]:
    from pipelines.config import DataConfig, EncodeConfig, FetchConfig, StreamConfig
    from t2v.shards import encoder_id

    data = DataConfig(
        size=64,
        videos=StreamConfig(str(corpus / "webvid.csv"), "webvid", shard_rows=16),
        images=StreamConfig(str(corpus / "laion.parquet"), "laion2b-en", shard_rows=32),
        fetch=FetchConfig(allow_networks=["127.0.0.0/8"], workers=2, cpus_per_task=0.2),
        encode=EncodeConfig(workers=2, gpus_per_worker=0, cpus_per_worker=0.8),
    )
    vae = str(PROJECT / "t2v/assets/nano_vae")
    given = {"data_dir": f"{run_dir}/data", "data": data, "vae_path": vae, "encoder": encoder_id(vae), "seed": 0}
    return data, given


def by_ray(corpus: Path, run_dir: str) -> None:
    from pipelines.prepare import prepare

    data, given = settings(corpus, run_dir)
    prepare(run_dir, data, given["vae_path"], 0)


def by_pool(corpus: Path, run_dir: str) -> None:
    from pipelines.prepare import plan_streams

    data, given = settings(corpus, run_dir)
    plans = plan_streams(given["data_dir"], data, given["encoder"], 0)
    tasks = [task for plan in plans for task in plan.tasks(given["data_dir"], done=False).to_pylist()]
    with multiprocessing.get_context("spawn").Pool(2, _start, (given,)) as pool:
        for _ in pool.imap_unordered(_work, tasks):
            pass


def _start(given: dict) -> None:
    global fetcher, encoder
    import torch

    from pipelines.encode import ShardEncoder
    from pipelines.prepare import ShardFetcher

    torch.set_num_threads(1)
    fetcher, encoder = ShardFetcher(given["data_dir"], given["data"]), ShardEncoder(**given)


def _work(task: dict) -> None:
    import pyarrow as pa

    encoder(fetcher(pa.Table.from_pylist([task])))  # type: ignore[name-defined]


def rate(run_dir: str) -> float:
    done = [json.loads(path.read_text()) for path in Path(run_dir).glob("data/done/*/*.json")]
    done.sort(key=lambda one: one["ended"])
    return sum(one["rows"] for one in done[FIRST + 1 :]) / (done[-1]["ended"] - done[FIRST]["ended"])


def main() -> None:
    import ray

    from pipelines.config import CorpusConfig
    from pipelines.corpus import write_corpus
    from pipelines.web import serve

    print(header(), flush=True)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=500_000_000)
    rates: dict[str, list[float]] = {"Ray Data": [], "bare pool": []}
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder) / "corpus") as base_url:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus, CorpusConfig(clips=400, pictures=800, test_clips=1, faults=False), base_url)
        for number in range(ROUNDS):
            for name, make in (("Ray Data", by_ray), ("bare pool", by_pool)):
                make(corpus, f"{folder}/{name} {number}")
                rates[name].append(rate(f"{folder}/{name} {number}"))
    for name, found in rates.items():
        print(f"{name:<10} {median(found):6.1f} rows/s  ({', '.join(f'{one:.1f}' for one in found)})")
    print(f"Ray Data keeps {median(rates['Ray Data']) / median(rates['bare pool']):.0%} of the bare pool's rate")


if __name__ == "__main__":
    main()
