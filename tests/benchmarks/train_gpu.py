"""Training at the published size through jobs/train.py, and what its engine costs beside plain PyTorch.

python tests/benchmarks/train_gpu.py FOLDER PART ...      parts: bare, job=N, small=N, packed=N, rank=N, engines=N

N are GPUs. A step trains on 256 images and 7 x 16 clips (latents 4 x 16 x 32 x 32, text 77 x 1024), each a slot of 256
frames, on any number of GPUs, with gates recomputed; `small` in micro-batches of half a slot; `packed` and `rank` on a
tenth of the paper's printed batch sizes. With an x at the end (small=1x) CUDA graphs are replayed (train.graphs).
`bare` is the UNet alone on random inputs: forward and backward of the same slots, AdamW on fp32 masters, on one GPU.
Weights and latents are random. `--tiny` is the same at a size that a CPU bears, to try the script.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from header import PROJECT, PYTHON, header
from train_engines import CLIPS, FRAMES, IMAGES, SIZE, STEP, TINY, UNET, engines

sys.path.insert(0, str(PROJECT))
PRINTED = {"images_per_step": 140, "videos_per_step": 320}  # a tenth of the paper's: its image GPU has 140, others 46
TEXT = {"weights": "random", "width": 64, "heads": 4, "layers": 3} if TINY else {"weights": "random"}
LINES = 4 if TINY else 6  # of the log that are measured, after as many as it takes to warm up
WARM_LINES = 2
AFTER = 2  # lines of the log that follow on the first whole checkpoint


def prepare(folder: Path) -> None:
    """Latent shards of random numbers, with variances, as the preparation writes them."""
    import numpy as np

    from t2v.shards import LatentInfo, encoder_id, write_shard

    rng = np.random.default_rng(0)
    encoder = encoder_id(str(PROJECT / "t2v/assets/nano_vae"))
    for stream, frames, shards in (("images", 1, 2), ("videos", FRAMES, 8)):
        info = LatentInfo(stream, (4, frames, SIZE // 8, SIZE // 8), encoder, 1.0, "settings")
        for index in range(shards):
            rows = 400
            path = folder / "data/latents" / stream / f"{index}.parquet"
            if path.exists():
                continue
            mean = rng.standard_normal((rows, *info.shape), dtype=np.float32).astype(np.float16)
            names = [f"{stream} {index} {row}" for row in range(rows)]
            captions = [
                f"a caption of some fifteen words about {name} that has the length of those on the web"
                for name in names
            ]
            write_shard(str(path), info, names, captions, mean, mean - 4, [3.0] * rows, [0.0] * rows)


def job(folder: Path, gpus: int, mix: dict[str, Any], name: str, checkpoint: bool, graphs: bool) -> dict[str, float]:
    """Runs jobs/train.py until enough lines are logged, then stops it as a cluster would; what its log says.

    With `checkpoint` it begins one once enough lines are logged, and goes on until that is written.
    """
    run_dir = folder / name
    run_dir.mkdir()
    (run_dir / "data").symlink_to(folder / "data")
    settings = {
        "run_dir": str(run_dir),
        "data": {"size": SIZE, "frames": FRAMES},
        "model": {"vae": str(PROJECT / "t2v/assets/nano_vae"), "text": TEXT} | ({"unet": UNET} if TINY else {}),
        "train": {
            "workers": gpus, "gpus_per_worker": 0 if TINY else 1, "cpus_per_worker": 1 if TINY else 8, "samples": 10**8,
            "precision": "fp32" if TINY else "bf16", "recompute": "gates", "shuffle_rows": 800,
            "graphs": graphs and not TINY,
            "log_every_s": 0.5 if TINY else 4.0, "max_failures": 0,
            "keep_checkpoints": 1, "milestone_every_samples": 10**8,
            "checkpoint_every_samples": (8 if TINY else 5 + 5 * gpus) * STEP if checkpoint else 10**8,
            "mix": {"slots": 8} | mix,
        },
        "sample": {"frames": FRAMES},
    }  # fmt: skip
    (run_dir / "config.yaml").write_text(json.dumps(settings))
    log = (run_dir / "log.txt").open("w")
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": "local",
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    command = [PYTHON, "jobs/train.py", "--config", str(run_dir / "config.yaml")]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, env=environment)
    lines: list[dict] = []
    while process.poll() is None and not is_enough(lines, checkpoint) and time.monotonic() - begun < 270:
        time.sleep(0.5)
        path = run_dir / "train/log.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=200)
    text = (run_dir / "log.txt").read_text()
    if process.returncode or len(lines) < WARM_LINES + 2:
        print(f"{name}: failed with code {process.returncode}\n{text[-4000:]}", flush=True)
        return {}
    return summary(name, lines, time.monotonic() - begun, gpus)


def is_enough(lines: list[dict], checkpoint: bool) -> bool:
    """Whether the log has what is to be measured."""
    if checkpoint:
        return sum("checkpoint_s" in line for line in lines) > AFTER
    return len(lines) >= WARM_LINES + LINES


def summary(name: str, lines: list[dict], seconds: float, gpus: int) -> dict[str, float]:
    """Prints the rates before, during and after the writing of a checkpoint; the first is returned."""
    stages = {
        "no checkpoint": [line for line in lines[WARM_LINES:] if "checkpoint_stall_s" not in line],
        "while one is written": [line for line in lines if "checkpoint_stall_s" in line and "checkpoint_s" not in line],
        "after it": [line for line in lines if "checkpoint_s" in line][1:],
    }
    rates = {}
    for stage, some in stages.items():
        if not some:
            continue
        each = [line["samples_per_s"] for line in some]
        rates[stage] = sum(line["samples_per_s"] * line["seconds"] for line in some) / sum(
            line["seconds"] for line in some
        )
        print(
            f"{name:<10} {gpus} GPUs  {rates[stage]:7.2f} samples/s "
            f"({min(each):.2f} to {max(each):.2f} in {len(some)} lines)  "
            f"MFU {statistics.median(line['mfu'] for line in some):.3f}  "
            f"waiting for data {statistics.median(line['data_wait_share'] for line in some):.2%}  {stage}",
            flush=True,
        )
    last = lines[-1]
    print(
        f"{'':<10} memory {last['memory_gib']:.1f} GiB"
        + "".join(f"  {key} {last[key]:.2f}" for key in ("checkpoint_stall_s", "checkpoint_s") if key in last)
        + f"  first line after {lines[0]['seconds']:.0f} s of steps, {seconds:.0f} s in all",
        flush=True,
    )
    return {"rate": rates.get("no checkpoint", 0.0)}


def even(halved: bool) -> dict[str, Any]:
    """Slots of equal frames, as the paper's are read here, each in one micro-batch or in two."""
    return {"frames_per_slot": IMAGES} | ({"micro_frames": IMAGES // 2} if halved else {})


def printed(schedule: str) -> dict[str, Any]:
    sizes = {"images_per_step": 8, "videos_per_step": 14} if TINY else PRINTED
    return {"schedule": schedule, "micro_frames": CLIPS * FRAMES} | sizes


def main() -> None:
    folder, *parts = (argument for argument in sys.argv[1:] if argument != "--tiny")
    print(header(), flush=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(folder) / "triton"))
    if not TINY:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        print(f"devices   {'; '.join(subprocess.check_output(query, text=True).splitlines())}", flush=True)
    prepare(Path(folder))
    rates: dict[str, float] = {}
    for part in parts:
        name, _, number = part.partition("=")
        gpus, graphs = int(number.rstrip("x") or 1), number.endswith("x")
        if name == "bare":
            done = subprocess.run(
                [PYTHON, str(Path(__file__).with_name("train_engines.py")), "bare", *(["--tiny"] if TINY else [])],
                cwd=PROJECT,
                capture_output=True,
                text=True,
            )
            print(done.stdout.strip() or done.stderr[-2000:], flush=True)
            if found := re.search(r"([\d.]+) samples/s", done.stdout):
                rates["bare"] = float(found[1])
        elif name == "engines":
            engines(gpus)
        else:
            mix = even(name == "small") if name in ("job", "small") else printed(name)
            run = f"{name}-{number}"
            rates[part] = job(Path(folder), gpus, mix, run, name == "job" and not graphs, graphs).get("rate", 0)
            if name == "job" and "bare" in rates:
                print(f"             {rates[part] / gpus / rates['bare']:.1%} of the bare step, a GPU", flush=True)
    if "packed=4" in rates and "rank=4" in rates:
        print(f"idle share of `rank`, measured by the time of `packed`: {1 - rates['rank=4'] / rates['packed=4']:.1%}")


if __name__ == "__main__":
    main()
