"""What reading latents costs: t2v/feed.py beside webdataset, mosaicml-streaming and Ray Data, on the same rows.

    pip install mosaicml-streaming  # no dependency of the project
    python tests/benchmarks/feed.py > tests/benchmarks/results/feed.txt

Every reader gives batches of 32 clips as the trainer takes them, fp16 tensors [32, 4, 16, 32, 32] (131 kB a clip)
and captions, shuffled by files and within 1,000 rows, from files that are in the page cache. Each is one fresh
process a round, in alternating rounds; CPU seconds are those of the process and, for Ray Data, of all that it
started, over three epochs after a first. Each of the others has one layout: raw bytes, no compression.
t2v/feed.py compares checksums when it reads rows for the first time, `verifying` whenever it does; others never do.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from header import PROJECT, PYTHON, header

sys.path.insert(0, str(PROJECT))
ROUNDS, EPOCHS = 3, 3
ROWS, SHARD_ROWS, BATCH, WINDOW = 4000, 500, 32, 1000
SHAPE = (4, 16, 32, 32)
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1"}

Batches = Iterator[tuple[list[torch.Tensor], list[str]]]  # latents (mean, perhaps logvar), captions
Epochs = Generator[Batches, None, None]


def latents(first: int, count: int, columns: int) -> list[np.ndarray]:
    """Random ones for rows numbered from `first`, in one array or two."""
    numbers = np.random.default_rng(first).standard_normal((columns, count, *SHAPE), np.float32)
    return list(numbers.astype(np.float16))


def caption(row: int) -> str:
    return f"a red square moves over row {row:06}"


def write(folder: Path, columns: int) -> None:
    """The same rows in every layout."""
    write_parquet(folder / "feed", columns)
    write_tars(folder / "webdataset", columns)
    write_mds(folder / "streaming", columns)


def write_parquet(folder: Path, columns: int) -> None:
    from t2v.shards import LatentInfo, write_shard

    for stream, frames, rows in (("images", 1, BATCH), ("videos", SHAPE[1], ROWS)):
        info = LatentInfo(stream, (SHAPE[0], frames, *SHAPE[2:]), "vae", 1.0, "settings")  # type: ignore[arg-type]
        for first in range(0, rows, SHARD_ROWS):
            count = min(SHARD_ROWS, rows - first)
            mean, *logvar = (part[:, :, :frames] for part in latents(first, count, columns))
            names, zeros = [caption(first + row) for row in range(count)], [0.0] * count
            path = folder / "data/latents" / stream / f"{first:06}.parquet"
            write_shard(str(path), info, names, names, mean, logvar[0] if logvar else None, zeros, zeros)


def write_tars(folder: Path, columns: int) -> None:
    import webdataset

    folder.mkdir()
    for first in range(0, ROWS, SHARD_ROWS):
        with webdataset.TarWriter(str(folder / f"{first:06}.tar")) as tar:
            for row, parts in enumerate(zip(*latents(first, SHARD_ROWS, columns), strict=True), first):
                named = {f"{index}.bin": part.tobytes() for index, part in enumerate(parts)}
                tar.write({"__key__": f"{row:06}", "txt": caption(row), **named})


def write_mds(folder: Path, columns: int) -> None:
    from streaming import MDSWriter

    names = [f"latents{index}" for index in range(columns)]
    with MDSWriter(out=str(folder), columns={"caption": "str", **dict.fromkeys(names, "bytes")}) as mds:
        for first in range(0, ROWS, SHARD_ROWS):
            for row, parts in enumerate(zip(*latents(first, SHARD_ROWS, columns), strict=True), first):
                mds.write({"caption": caption(row), **dict(zip(names, map(np.ndarray.tobytes, parts), strict=True))})


class Forgets(set):
    """A set that never knows what it was given."""

    def __contains__(self, value: object) -> bool:
        return False


def by_feed(folder: Path, columns: int, verifying: bool = False) -> Epochs:
    """One image a step beside 32 videos, because a step has both; images are not counted."""
    from dataclasses import replace

    from t2v.config import MixConfig
    from t2v.diffusion import Draw
    from t2v.feed import Feed
    from tests.t2v.train_ranks import job as tiny_job

    mix = MixConfig(slots=2, image_every=2, images_per_step=1, videos_per_step=BATCH)
    job = replace(tiny_job(str(folder), 1), frames=SHAPE[1])
    job = replace(job, train=replace(job.train, mix=mix, shuffle_rows=WINDOW))
    nothing = Draw(*[torch.empty(0)] * 4)
    feed = Feed(job, 0, 1, 0, draw=lambda *_: nothing)
    if verifying:
        feed._reader._verified = Forgets()
    steps = iter(feed)

    def epoch() -> Batches:
        for _, batch in islice(steps, ROWS // BATCH):
            yield [part for part in (batch.mean, batch.logvar) if part is not None], batch.captions

    with closing(feed):
        while True:
            yield epoch()


def stacked(parts: list[list[bytes]]) -> list[torch.Tensor]:
    """Latents of a batch, each a list of bytes, as tensors."""
    tensors = []
    for latents in parts:
        tensor = torch.empty((len(latents), *SHAPE), dtype=torch.float16)
        np.stack([np.frombuffer(one, np.float16).reshape(SHAPE) for one in latents], out=tensor.numpy())
        tensors.append(tensor)
    return tensors


def by_webdataset(folder: Path, columns: int) -> Epochs:
    import webdataset

    names = [f"{index}.bin" for index in range(columns)]
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    def epoch() -> Batches:
        source = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False)
        rows = iter(source.shuffle(WINDOW, initial=WINDOW))
        while batch := list(islice(rows, BATCH)):
            yield stacked([[row[name] for row in batch] for name in names]), [row["txt"].decode() for row in batch]

    while True:
        yield epoch()


def by_streaming(folder: Path, columns: int) -> Epochs:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(
        local=str(folder), shuffle=True, shuffle_algo="py1e", shuffle_block_size=WINDOW, batch_size=BATCH
    )

    def collate(rows: list[dict]) -> tuple[list[torch.Tensor], list[str]]:
        parts = [[row[f"latents{index}"] for row in rows] for index in range(columns)]
        return stacked(parts), [row["caption"] for row in rows]

    while True:
        yield iter(DataLoader(dataset, BATCH, collate_fn=collate))


def by_ray(folder: Path, columns: int) -> Epochs:
    """The Parquet files of t2v/feed.py, whose binary columns become tensors in the collate function."""
    import ray
    from ray.data.collate_fn import ArrowBatchCollateFn

    names = ["mean", "logvar"][:columns]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(str(folder / "data/latents/videos"), columns=["caption", *names], shuffle="files")

    class Collate(ArrowBatchCollateFn):
        def __call__(self, table: Any) -> Any:
            parts = []
            for name in names:
                array = table.column(name).combine_chunks()
                flat = np.frombuffer(array.buffers()[1], np.float16)[array.offset * int(np.prod(SHAPE)) :]
                parts.append(torch.from_numpy(flat[: len(array) * int(np.prod(SHAPE))].reshape(-1, *SHAPE).copy()))
            return parts, table.column("caption").to_pylist()

    while True:
        yield iter(dataset.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=WINDOW, collate_fn=Collate()))


READERS: dict[str, tuple[Callable[[Path, int], Epochs], str]] = {
    "t2v/feed.py": (by_feed, "feed"),
    "  verifying": (partial(by_feed, verifying=True), "feed"),
    "webdataset": (by_webdataset, "webdataset"),
    "mosaicml-streaming": (by_streaming, "streaming"),
    "Ray Data": (by_ray, "feed"),
}


OTHERS = (by_webdataset, by_streaming, by_ray)


def cpu_seconds() -> float:
    """Of this process and of those it started, running or ended."""
    import psutil

    seconds = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for child in psutil.Process().children(recursive=True):
        try:
            seconds += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return seconds


def measure(name: str, folder: Path, columns: int) -> float:
    """Clips a CPU second, where every epoch has every row once."""
    reader, layout = READERS[name]
    used = []
    with closing(reader(folder / layout, columns)) as epochs:
        for epoch in islice(epochs, 1 + EPOCHS):
            begun = cpu_seconds()
            captions = []
            for parts, names in epoch:
                assert len(parts) == columns and parts[0].shape[1:] == SHAPE and parts[0].dtype == torch.float16
                captions += names
            used.append(cpu_seconds() - begun)
            assert len(captions) == len(set(captions)) == ROWS
    return EPOCHS * ROWS / sum(used[1:])


def main() -> None:
    print(header())
    print("others   ", ", ".join(f"{name} {version(name)}" for name in ("webdataset", "mosaicml-streaming")))
    for columns, title in ((1, "mean"), (2, "mean and variance")):
        folder = Path(tempfile.mkdtemp(prefix="feed-"))
        write(folder, columns)
        rates: dict[str, list[float]] = {name: [] for name in READERS}
        for _ in range(ROUNDS):
            for name in READERS:
                command = [PYTHON, __file__, name, str(folder), str(columns)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                rates[name].append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(folder)
        best = max(median(found) for name, found in rates.items() if READERS[name][0] in OTHERS)
        for name, found in rates.items():
            each = ", ".join(f"{rate:,.0f}" for rate in found)
            print(f"{title:18}{name:20}{median(found):8,.0f} clips per CPU second  ({each})")
        print(f"{title:18}t2v/feed.py reads {median(rates['t2v/feed.py']) / best:.2f} x the best of the others")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
