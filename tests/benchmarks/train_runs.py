"""Runs of the miniature that the benchmarks of faults start, watch and compare."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch
from header import PROJECT, PYTHON
from safetensors.torch import load_file

STEP = 46  # samples
SIZES = {"corpus.clips": 32, "corpus.pictures": 64, "corpus.test_clips": 1, "train.log_every_s": 0.1}
ARGUMENTS = {"num_cpus": 4, "object_store_memory": 200_000_000}  # of a cluster's head
LOG = re.compile(r"\[train\] ([\d,]+)/[\d,]+ samples  loss")


def command(job: str, run_dir: str, changes: dict[str, float]) -> list[str]:
    options = [part for key, value in (SIZES | changes).items() for part in (f"--{key}", str(value))]
    return [PYTHON, f"jobs/{job}.py", "--config", "jobs/configs/nano.yaml", *options, "--run_dir", run_dir]


def start(job: str, run: Path, address: str, changes: dict[str, float], run_dir: str = "") -> subprocess.Popen:
    """Starts a job whose log is in `run`, which is its run folder too unless `run_dir` is given."""
    run.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    line = command(job, run_dir or str(run), changes)
    with (run / "log.txt").open("a") as log:
        return subprocess.Popen(line, cwd=PROJECT, stdout=log, stderr=log, env=environment)


def finish(process: subprocess.Popen, run: Path, timeout_s: float = 900) -> None:
    assert process.wait(timeout_s) == 0, f"failed, see {run}/log.txt"


def prepare(folder: Path, address: str) -> None:
    """Makes `folder`/prepared, from which runs are copied, unless it is there."""
    if not (folder / "prepared/data/latents/videos/index.json").exists():
        finish(start("prepare_data", folder / "prepared", address, {}), folder / "prepared")


def new_run(folder: Path, name: str) -> Path:
    """A run folder with latents, that has trained nothing."""
    shutil.rmtree(folder / name, ignore_errors=True)
    return Path(shutil.copytree(folder / "prepared", folder / name, ignore=shutil.ignore_patterns("log.txt")))


def train(folder: Path, name: str, address: str, changes: dict[str, float]) -> Path:
    """A run that nothing disturbs, unless it was made before."""
    if (folder / name / "train/model/t2v.json").exists():
        return folder / name
    run, begun = new_run(folder, name), time.monotonic()
    finish(start("train", run, address, changes), run)
    print(f"{name}: {changes['train.samples']:,} samples in {time.monotonic() - begun:.0f} s", flush=True)
    return run


def seen(run: Path) -> int:
    """Samples of the last line of the log."""
    found = LOG.findall(log_of(run))
    return int(found[-1].replace(",", "")) if found else 0


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text() if (run / "log.txt").exists() else ""


def wait_for(run: Path, process: subprocess.Popen, what: str, number: int = 1, timeout_s: float = 240) -> bool:
    """Until the log of a run has so many more lines with `what`; whether it came to that before the run ended."""
    before, end = log_of(run).count(what), time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        if log_of(run).count(what) >= before + number:
            return True
        time.sleep(0.2)
    assert process.poll() is not None, f"{what!r} did not come {number} times in {timeout_s} s, see {run}/log.txt"
    return False


def wait_for_steps(run: Path, process: subprocess.Popen, number: int = 1) -> bool:
    """Until the log grows, so that what is killed has something to lose."""
    return wait_for(run, process, "samples  loss", number)


def starts(run: Path) -> list[dict]:
    """What each start of the ranks noted: time, samples, ranks."""
    path = run / "train/starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compare_weights(one: Path, other: Path) -> None:
    """Prints how many tensors of two exported models are equal."""
    weights = [load_file(next((run / "train/model/unet").glob("*.safetensors"))) for run in (one, other)]
    same = sum(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(
        f"{same} of {len(weights[0])} tensors of the exported model equal those of the undisturbed run bit for bit",
        flush=True,
    )


def compare_losses(one: Path, other: Path) -> None:
    """Prints how far the losses of two runs are apart, of every step."""
    lines = [[json.loads(line) for line in (run / "train/log.jsonl").read_text().splitlines()] for run in (one, other)]
    losses = [{line["samples"]: (line["loss_images"], line["loss_videos"]) for line in part} for part in lines]
    assert losses[0].keys() == losses[1].keys(), "other steps were logged"
    apart = {
        step: max(abs(a - b) / a for a, b in zip(losses[0][step], losses[1][step], strict=True)) for step in losses[0]
    }
    first = max(apart[step] for step in sorted(apart)[:10])
    print(
        f"{len(apart)} steps: losses differ from the undisturbed run's by {max(apart.values()):.1e} of them at most, "
        f"in the first ten steps by {first:.1e}",
        flush=True,
    )
