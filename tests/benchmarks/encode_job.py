"""The preparation end to end on one GPU, from tars of encoded media to latent shards, beside the bare encoder.

    python tests/benchmarks/encode_job.py > tests/benchmarks/results/encode_job.txt

H.264 clips of 336 x 596, 25 fps, 8 s, and pictures of about 640 x 480, in WebDataset tars on this machine; Stable
Diffusion's VAE with random weights. The job's rates are from the third finished shard to the last.
"""

import io
import json
import os
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from header import PROJECT, header

sys.path.insert(0, str(PROJECT))
os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
CLIPS, PICTURES, SHARD_CLIPS, SHARD_PICTURES = 2000, 20_000, 100, 1000
FIRST, FRAMES = 2, 512  # of the bare encoder's call


def write_tars(folder: Path, files: list[bytes], kind: str, count: int, a_tar: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count // a_tar):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(number * a_tar, (number + 1) * a_tar):
                for name, body in ((f"{index:09d}.{kind}", files[index % len(files)]), (f"{index:09d}.txt", b"a film")):
                    member = tarfile.TarInfo(name)
                    member.size = len(body)
                    tar.addfile(member, io.BytesIO(body))


def films() -> list[bytes]:
    from tests.benchmarks import decode

    decode.SECONDS = 8
    return [decode.movie(gop) for gop in (12, 50, 250)]


def pictures() -> list[bytes]:
    numbers = np.random.default_rng(0)
    plane = cv2.resize(numbers.integers(0, 256, (60, 80, 3), np.uint8), (800, 600), interpolation=cv2.INTER_CUBIC)
    grainy = [np.clip(plane + numbers.normal(0, 6, plane.shape), 0, 255).astype(np.uint8) for _ in range(8)]
    return [cv2.imencode(".jpg", one[:480, :640])[1].tobytes() for one in grainy]


def write_vae(folder: str) -> None:
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **blocks).save_pretrained(folder)


def bare(vae: str) -> float:
    """Frames a second of the encoder alone, on frames that are on the GPU."""
    import torch

    from t2v.frozen import load_vae

    encoder = load_vae(vae, "cuda", chunk_frames=128)
    frames = torch.randint(0, 256, (FRAMES, 256, 256, 3), dtype=torch.uint8, device="cuda")
    for _ in range(2):
        encoder.encode(frames)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(4):
        encoder.encode(frames)
    torch.cuda.synchronize()
    return 4 * FRAMES / (time.perf_counter() - begun)


def job(data: Any, vae: str, run_dir: str, stream: str) -> float:
    """Rows a second of the job."""
    from pipelines.prepare import prepare

    prepare(run_dir, data, vae, 0)
    done = [json.loads(path.read_text()) for path in Path(run_dir).glob(f"data/done/{stream}/*.json")]
    done.sort(key=lambda one: one["ended"])
    return sum(one["status"]["ok"] for one in done[FIRST + 1 :]) / (done[-1]["ended"] - done[FIRST]["ended"])


def main() -> None:
    import ray

    from pipelines.config import DataConfig, DecodeConfig, EncodeConfig, FetchConfig, StreamConfig

    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        vae = f"{folder}/vae"
        write_vae(vae)
        write_tars(Path(folder, "films"), films(), "mp4", CLIPS, SHARD_CLIPS)
        write_tars(Path(folder, "pictures"), pictures(), "jpg", PICTURES, SHARD_PICTURES)
        frames_per_s = bare(vae)
        print(f"the bare encoder: {frames_per_s:.0f} frames/s, {frames_per_s / 16:.1f} clips/s", flush=True)
        ray.init(address="local", include_dashboard=False, object_store_memory=20_000_000_000)
        cores = os.cpu_count() or 1
        for stream, frames in (("videos", 16), ("images", 1)):
            source = StreamConfig(f"{folder}/{ {'videos': 'films', 'images': 'pictures'}[stream] }", "generic")
            source.shard_rows = SHARD_CLIPS if stream == "videos" else SHARD_PICTURES
            for workers in (1, 2, 4):
                encode = EncodeConfig(workers, 1 / workers, (cores - 2) // workers, batch_frames=128)
                fetch = FetchConfig(workers=2, cpus_per_task=0.5)
                data = DataConfig(encode=encode, fetch=fetch, decode=DecodeConfig(max_memory_mb=4096))
                data = replace(data, **{stream: source})
                rate = job(data, vae, f"{folder}/{stream} {workers}", stream)
                print(
                    f"{stream}, {workers} encoders on the GPU: {rate:.1f} rows/s, "
                    f"{rate * frames / frames_per_s:.0%} of the bare encoder",
                    flush=True,
                )


if __name__ == "__main__":
    main()
