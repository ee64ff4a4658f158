"""The preparation end to end on one GPU, from Parquet of encoded media to latent shards, beside the bare encoder.

    python tests/benchmarks/encode_job.py > tests/benchmarks/results/encode_job.txt
    python tests/benchmarks/encode_job.py --apart     (and with the VAE in an actor of its own)
    python tests/benchmarks/encode_job.py --tiny      (on a CPU, to see that it runs)

H.264 clips of 336 x 596, 25 fps, 8 s, and pictures of about 640 x 480, in a column of Parquet files on this machine;
Stable Diffusion's VAE with random weights. The job's rates are from the third finished shard to the last.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from header import PROJECT, header

sys.path.insert(0, str(PROJECT))
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
FIRST = 2  # shards before the clock starts
SCHEMA = pa.schema([("media", pa.binary()), ("txt", pa.string())])


class Size(NamedTuple):
    """How much of it: rows of each stream and of a shard, channels of the VAE, frames of the bare encoder's call."""

    clips: int
    pictures: int
    shard_clips: int
    shard_pictures: int
    channels: tuple[int, int, int, int]
    frames: int


FULL = Size(2000, 20_000, 100, 1000, (128, 256, 512, 512), 512)
TINY = Size(24, 120, 4, 20, (8, 8, 8, 8), 8)


def write_media(folder: Path, files: list[bytes], count: int, a_file: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count // a_file):
        with pq.ParquetWriter(folder / f"{number:05d}.parquet", SCHEMA, use_dictionary=False) as writer:
            for start in range(0, a_file, 100):  # as img2dataset writes them
                rows = range(number * a_file + start, number * a_file + min(start + 100, a_file))
                media = [files[row % len(files)] for row in rows]
                writer.write_table(pa.table({"media": media, "txt": ["a film"] * len(media)}, SCHEMA))


def films() -> list[bytes]:
    from tests.benchmarks import decode

    decode.SECONDS = 8
    return [decode.movie(gop) for gop in (12, 50, 250)]


def pictures() -> list[bytes]:
    numbers = np.random.default_rng(0)
    plane = cv2.resize(numbers.integers(0, 256, (60, 80, 3), np.uint8), (800, 600), interpolation=cv2.INTER_CUBIC)
    grainy = [np.clip(plane + numbers.normal(0, 6, plane.shape), 0, 255).astype(np.uint8) for _ in range(8)]
    return [cv2.imencode(".jpg", one[:480, :640])[1].tobytes() for one in grainy]


def write_vae(folder: str, channels: tuple[int, ...]) -> None:
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": channels, "norm_num_groups": min(32, channels[0]), "layers_per_block": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **blocks).save_pretrained(folder)


def bare(vae: str, count: int) -> float:
    """Frames a second of the encoder alone, on frames that are on its device."""
    import torch

    from t2v.frozen import load_vae

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_vae(vae, device, chunk_frames=128)
    frames = torch.randint(0, 256, (count, 256, 256, 3), dtype=torch.uint8, device=device)
    for _ in range(2):
        encoder.encode(frames)[0].cpu()
    begun = time.perf_counter()
    for _ in range(4):
        made, _ = encoder.encode(frames)
    made.cpu()  # waits for all
    return 4 * count / (time.perf_counter() - begun)


def job(data: Any, vae: str, run_dir: str, stream: str) -> float:
    """Rows a second of the job."""
    from pipelines.prepare import prepare

    prepare(run_dir, data, vae, 0)
    done = [json.loads(path.read_text()) for path in Path(run_dir).glob(f"data/done/{stream}/*.json")]
    done.sort(key=lambda one: one["ended"])
    return sum(one["status"]["ok"] for one in done[FIRST + 1 :]) / (done[-1]["ended"] - done[FIRST]["ended"])


def main(tiny: bool, apart: bool) -> None:
    import ray

    from pipelines.config import DataConfig, EncodeConfig, FetchConfig, StreamConfig

    print(header(), flush=True)
    size = TINY if tiny else FULL
    with tempfile.TemporaryDirectory() as folder:
        vae = f"{folder}/vae"
        write_vae(vae, size.channels)
        write_media(Path(folder, "videos"), films(), size.clips, size.shard_clips)
        write_media(Path(folder, "images"), pictures(), size.pictures, size.shard_pictures)
        frames_per_s = bare(vae, size.frames)
        print(f"the bare encoder: {frames_per_s:.0f} frames/s, {frames_per_s / 16:.1f} clips/s", flush=True)
        ray.init(address="local", include_dashboard=False, object_store_memory=20_000_000_000 if not tiny else 10**9)
        cores = os.cpu_count() or 1
        for stream, frames, shard_rows in (("videos", 16, size.shard_clips), ("images", 1, size.shard_pictures)):
            source = StreamConfig(f"{folder}/{stream}", "bytes=media,caption=txt", shard_rows)
            for workers, vaes in [(1, 0)] + ([(1 if tiny else 4, 1)] if apart else []):
                cpus = max(1, (cores - 2) // workers) if not (tiny and vaes) else 0.5
                gpus = 0 if tiny else 1 if vaes else 1 / workers
                encode = EncodeConfig(workers, gpus, cpus, batch_frames=128, vae_workers=vaes)
                data = replace(DataConfig(encode=encode, fetch=FetchConfig(workers=2)), **{stream: source})
                rate = job(data, vae, f"{folder}/{stream} {workers} {vaes}", stream)
                print(
                    f"{stream}, {workers} encoders {'beside' if vaes else 'on'} the GPU: {rate:.1f} rows/s, "
                    f"{rate * frames / frames_per_s:.0%} of the bare encoder",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="little of everything, on a CPU")
    parser.add_argument("--apart", action="store_true", help="also with data.encode.vae_workers 1")
    main(**vars(parser.parse_args()))
