"""What a manifest's length costs: time to the first row, rows a second, memory; and 100,000 finished shards skipped.

A synthetic LAION list in Parquet, 1,000 rows a shard, goes through the whole of jobs/prepare_data.py's preparation,
save that no download happens: the stand-in below says of every row that it was empty. So nothing is decoded either,
but ledgers, shards and summaries are written. Each length runs in a process of its own, with a Ray of two CPUs; its
clock starts with the process. The last row of the table has four filters on and looks for duplicates. Memory is the
greatest proportional set size (PSS) seen, every half a second, without the pages of libraries and other files, whose
share changes with whatever else runs on the machine.

    python tests/benchmarks/manifests.py > tests/benchmarks/results/manifests.txt
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.header import PYTHON, header

LENGTHS = (10_000, 200_000, 2_000_000)
FINISHED = 100_000
PLAIN: dict = {}
CHOSEN = {
    "filters": {"min_side": 200, "max_aspect": 3.0, "max_punsafe": 0.9, "min_similarity": 0.1},
    "drop_duplicates": True,
}


def write_list(path: str, rows: int) -> None:
    """A manifest like LAION2B-en's; one URL in a hundred is there twice."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = np.random.default_rng(0)
    urls = [f"http://host{number % 9973}.example/images/{number:012d}.jpg" for number in range(rows)]
    urls[::100] = urls[-1 : -rows - 1 : -100][: len(urls[::100])]
    table = {
        "URL": urls,
        "TEXT": [
            f"picture number {number} with about as many words as captions on the web have" for number in range(rows)
        ],
        "WIDTH": numbers.integers(64, 2000, rows),
        "HEIGHT": numbers.integers(64, 2000, rows),
        "similarity": numbers.random(rows),
        "punsafe": numbers.random(rows),
    }
    pq.write_table(pa.table(table), path)


def write_vae(folder: str) -> None:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, **blocks).save_pretrained(folder)


def fetch_nothing(urls: list[str]) -> list[Any]:
    """An engine whose downloads end at once; sent to Ray's workers by value, being of __main__."""
    from pipelines.fetch import Fetched

    return [Fetched(b"", "empty", "not asked for", 0.0) for _ in urls]


class Peak:
    """Watches this process and the Ray workers below it."""

    def __init__(self) -> None:
        self.mib = {"driver": 0.0, "largest worker": 0.0}
        self._me = psutil.Process()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._see("driver", self._me)
            for process in self._me.children(recursive=True):
                try:
                    if "".join(process.cmdline()[:1]).startswith("ray::"):
                        self._see("largest worker", process)
                except (psutil.Error, OSError):  # it has just ended
                    continue
            time.sleep(0.5)

    def _see(self, who: str, process: psutil.Process) -> None:
        sizes = dict(
            line.split()[:2] for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        )
        self.mib[who] = max(self.mib[who], (int(sizes["Pss_Anon:"]) + int(sizes["Pss_Shmem:"])) / 2**10)


def data_config(manifest: str, shard_rows: int, options: dict) -> Any:
    from pipelines.config import DataConfig, EncodeConfig, RowFilters, StreamConfig

    filters = RowFilters(**options.get("filters", {}))
    images = StreamConfig(manifest, "laion2b-en", shard_rows, filters, options.get("drop_duplicates", False))
    return DataConfig(size=32, images=images, encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1))


def run(manifest: str, vae: str, options: dict) -> dict:
    """One preparation, from the start of this process."""
    peak = Peak()
    begun = psutil.Process().create_time()
    import ray

    from pipelines import prepare

    # The dashboard's agents are no workers of ours.
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=300_000_000)
    times: list[float] = []

    def timed(make: Callable[..., Iterator[dict]]) -> Callable[..., Iterator[dict]]:
        def noted(*stages: Any) -> Iterator[dict]:
            for made in make(*stages):
                times.append(time.time())
                yield made

        return noted

    class Fetcher(prepare.ShardFetcher):
        def __init__(self, data_dir: str, data: Any) -> None:
            self.data_dir, self.data, self.download = data_dir, data, fetch_nothing

    prepare._make, prepare.ShardFetcher = timed(prepare._make), Fetcher
    with tempfile.TemporaryDirectory() as folder:
        funnel = prepare.prepare(folder, data_config(manifest, 1000, options), vae, 0)
    return {
        "funnel": funnel["images"],
        "first_s": times[0] - begun,
        "rows_per_s": funnel["images"].total() / (time.time() - begun),
        **peak.mib,
    }


def skip(manifest: str, vae: str, options: dict) -> dict:
    """All shards are done: one row each, and the summaries as the encoder writes them."""
    from pipelines import prepare
    from t2v.shards import encoder_id

    with tempfile.TemporaryDirectory() as folder:
        data = data_config(manifest, 1, options)
        (plan,) = prepare.plan_streams(f"{folder}/data", data, encoder_id(vae), 0)
        done = Path(folder, "data/done/images")
        done.mkdir(parents=True)
        info = {
            "stream": "images",
            "shape": [4, 1, 4, 4],
            "encoder": "",
            "scale": 1.0,
            "data_hash": "",
            "dtype": "float16",
        }
        seconds = {"fetch": 0.0, "encode": 0.0}
        summary = {"rows": 1, "status": {"ok": 1}, "row_groups": [1], "info": info, "bytes": 9, "seconds": seconds}
        summary |= {"samples": 1, "digest": "0123456789abcdef", "ended": time.time()}
        for name in plan.names:
            (done / f"{name}.json").write_text(json.dumps(summary, indent=1))
        peak, begun = Peak(), time.time()
        missing = plan.tasks(f"{folder}/data", done=False)
        listed_s = time.time() - begun
        funnel = prepare.prepare(folder, data, vae, 0)
        return {
            "missing": len(missing),
            "rows": funnel["images"].total(),
            "listed_s": listed_s,
            "all_s": time.time() - begun - listed_s,
            **peak.mib,
        }


def apart(what: str, manifest: str, vae: str, options: dict) -> dict:
    """The result of `run` or `skip` in a process of its own."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, __file__, what, manifest, vae, json.dumps(options)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{what} failed:\n{answer.stdout[-2000:]}\n{answer.stderr[-4000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        vae = f"{folder}/vae"
        write_vae(vae)
        print(f"\n{'rows':>12}{'first row':>12}{'rows/s':>10}{'driver':>12}{'largest worker':>16}", flush=True)
        for rows, options in [*((rows, PLAIN) for rows in LENGTHS), (LENGTHS[-1], CHOSEN)]:
            write_list(f"{folder}/{rows}.parquet", rows)
            found = apart("run", f"{folder}/{rows}.parquet", vae, options)
            assert sum(found["funnel"].values()) == rows
            print(
                f"{rows:>12,}{found['first_s']:>10.1f} s{found['rows_per_s']:>10,.0f}{found['driver']:>8.0f} MiB"
                f"{found['largest worker']:>12.0f} MiB   {found['funnel']}",
                flush=True,
            )
        write_list(f"{folder}/finished.parquet", FINISHED)
        found = apart("skip", f"{folder}/finished.parquet", vae, {})
        assert (found["missing"], found["rows"]) == (0, FINISHED)
        print(f"\n{FINISHED:,} finished shards: listed and skipped in {found['listed_s']:.1f} s; the whole second run,")
        print(f"with all summaries read for funnel and index, {found['all_s']:.1f} s; driver {found['driver']:.0f} MiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        what, manifest, vae, options = sys.argv[1:]
        print(json.dumps({"run": run, "skip": skip}[what](manifest, vae, json.loads(options))))
    else:
        main()
