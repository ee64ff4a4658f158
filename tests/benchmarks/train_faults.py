"""Training under fire: ranks, Ray Train's controller and the driver are killed; the end must be the same.

python tests/benchmarks/train_faults.py FOLDER kills [N]        N processes are killed (20), then weights are compared
python tests/benchmarks/train_faults.py FOLDER soak [MINUTES]   one a minute (for 30), memory and leftovers are watched
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import torch
from header import PROJECT, PYTHON, header
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

SIZES = {"corpus.clips": 32, "corpus.pictures": 64, "corpus.test_clips": 1, "train.log_every_s": 0.1}
FEW = {"train.samples": 46 * 120, "train.checkpoint_every_samples": 46 * 5, "train.milestone_every_samples": 46 * 60}
MANY = {"train.samples": 10**9, "train.checkpoint_every_samples": 46 * 20, "train.milestone_every_samples": 10**9}
VICTIMS = {"rank": "RayTrainWorker", "controller": "TrainController", "driver": "jobs/train.py"}
EVERY_S = (1.0, 12.0)  # from a rank's first steps on


def start(job: str, run_dir: Path, address: str, changes: dict[str, float]) -> subprocess.Popen:
    run_dir.mkdir(parents=True, exist_ok=True)
    options = [part for key, value in (SIZES | changes).items() for part in (f"--{key}", str(value))]
    command = [PYTHON, f"jobs/{job}.py", "--config", "jobs/configs/nano.yaml", *options, "--run_dir", str(run_dir)]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    log = (run_dir / "log.txt").open("a")
    return subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, env=environment)


def processes() -> dict[str, list[psutil.Process]]:
    """What may be killed, and the rest of Ray, by what they are."""
    found = defaultdict(list)
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        kinds = [kind for kind, mark in VICTIMS.items() if mark in line]
        others = re.search(r"raylet|gcs_server|ray::IDLE|ray::Watch|ray::\w+|dashboard", line)
        found[kinds[0] if kinds else others[0] if others else "other"].append(process)
    return found


def kill_one(draw: random.Random) -> str:
    """A rank in three cases of five, else the controller or the driver."""
    kind = draw.choice(["rank", "rank", "rank", "controller", "driver"])
    victims = processes()[kind]
    if victims:
        draw.choice(victims).kill()
    return kind if victims else ""


def seen(run_dir: Path) -> int:
    """Samples of the last line of the log."""
    found = re.findall(r"\[train\] ([\d,]+)/[\d,]+ samples  loss", (run_dir / "log.txt").read_text())
    return int(found[-1].replace(",", "")) if found else 0


def kills(folder: Path, address: str, number: int) -> None:
    for name in ("undisturbed", "fire"):
        shutil.copytree(folder / "prepared", folder / name)
    begun = time.monotonic()
    assert start("train", folder / "undisturbed", address, FEW).wait() == 0, "failed, see undisturbed/log.txt"
    print(f"undisturbed: {FEW['train.samples']:,} samples in {time.monotonic() - begun:.0f} s", flush=True)
    begun, draw, killed, starts = time.monotonic(), random.Random(0), Counter(), 0
    while True:
        process, starts = start("train", folder / "fire", address, FEW), starts + 1
        while process.poll() is None:
            wait_for_steps(process, folder / "fire")
            time.sleep(draw.uniform(*EVERY_S))
            if killed.total() < number and process.poll() is None and (kind := kill_one(draw)):
                killed[kind] += 1
                print(f"  {kind} killed at {seen(folder / 'fire'):,} samples", flush=True)
        if process.returncode == 0:
            break
    seconds = time.monotonic() - begun
    print(f"under fire: {killed.total()} killed ({dict(killed)}), {starts} starts, {seconds:.0f} s", flush=True)
    weights = [
        load_file(next((folder / name / "train/model/unet").glob("*.safetensors"))) for name in ("undisturbed", "fire")
    ]
    same = sum(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(f"{same} of {len(weights[0])} tensors of the exported model equal those of the undisturbed run bit for bit")


def wait_for_steps(process: subprocess.Popen, run_dir: Path, timeout_s: float = 180) -> None:
    """Until the log grows, so that what is killed has something to lose."""
    before, end = (run_dir / "log.txt").read_text().count("samples  loss"), time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        if (run_dir / "log.txt").read_text().count("samples  loss") > before:
            return
        time.sleep(0.5)


def soak(folder: Path, address: str, minutes: int) -> None:
    """Kills one process a minute; prints memory by kind of process just before."""
    run_dir = folder / "soak"
    shutil.copytree(folder / "prepared", run_dir)
    draw, killed = random.Random(0), Counter()
    process = start("train", run_dir, address, MANY)
    for minute in range(minutes):
        time.sleep(60)
        memory = {kind: sum(map(memory_mib, found)) for kind, found in sorted(processes().items())}
        line = "  ".join(f"{kind} {mib:.0f}" for kind, mib in memory.items())
        print(f"minute {minute + 1:2}: {seen(run_dir):,} samples; MiB: {line}", flush=True)
        if minute < minutes - 1:
            kind = kill_one(draw)
            killed[kind] += 1
            if kind == "driver":
                process.wait()
                process = start("train", run_dir, address, MANY)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0, "asked to stop, it failed"
    print(f"killed {dict(killed)}; then SIGTERM, a checkpoint and an orderly end at {seen(run_dir):,} samples")


def memory_mib(process: psutil.Process) -> float:
    """Proportional set size, which counts what processes share once."""
    try:
        return process.memory_full_info().pss / 2**20
    except psutil.Error:
        return 0.0


def alive(started: list[psutil.Process]) -> int:
    return sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started)


def main() -> None:
    folder, mode = Path(sys.argv[1]).absolute(), sys.argv[2]
    print(header(), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    shared = set(os.listdir("/dev/shm"))
    arguments = {"num_cpus": 4, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    assert start("prepare_data", folder / "prepared", cluster.address, {}).wait() == 0, "failed, see prepared/log.txt"
    modes = {
        "kills": lambda n: kills(folder, cluster.address, n or 20),
        "soak": lambda n: soak(folder, cluster.address, n or 30),
    }
    modes[mode](int((sys.argv[3:] or ["0"])[0]))
    started = psutil.Process().children(recursive=True)
    cluster.shutdown()
    time.sleep(5)
    files = len(set(os.listdir("/dev/shm")) - shared)
    print(f"left over: {alive(started)} of {len(started)} processes, {files} files of shared memory")


if __name__ == "__main__":
    main()
