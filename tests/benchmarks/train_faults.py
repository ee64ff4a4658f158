"""Training under fire: ranks, Ray Train's controller and the driver are killed; the end must be the same.

python tests/benchmarks/train_faults.py FOLDER kills [N]        N processes are killed (20), then weights are compared
python tests/benchmarks/train_faults.py FOLDER soak [MINUTES]   one a minute (for 30), memory and leftovers are watched
python tests/benchmarks/train_faults.py FOLDER MODE            one of train_cluster.MODES: what clusters lose
"""

import os
import random
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import train_cluster
from header import header
from ray.cluster_utils import Cluster
from train_runs import ARGUMENTS, compare_weights, new_run, prepare, seen, start, train, wait_for_steps

FEW = {"train.samples": 46 * 120, "train.checkpoint_every_samples": 46 * 5, "train.milestone_every_samples": 46 * 60}
MANY = {"train.samples": 10**9, "train.checkpoint_every_samples": 46 * 20, "train.milestone_every_samples": 10**9}
VICTIMS = {"rank": "RayTrainWorker", "controller": "TrainController", "driver": "jobs/train.py"}
EVERY_S = (1.0, 12.0)  # from a rank's first steps on


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


def kills(folder: Path, address: str, number: int) -> None:
    undisturbed, fire = train(folder, "undisturbed", address, FEW), new_run(folder, "fire")
    begun, draw, killed, count = time.monotonic(), random.Random(0), Counter(), 0
    while True:
        process, count = start("train", fire, address, FEW), count + 1
        while process.poll() is None:
            wait_for_steps(fire, process)
            time.sleep(draw.uniform(*EVERY_S))
            if killed.total() < number and process.poll() is None and (kind := kill_one(draw)):
                killed[kind] += 1
                print(f"  {kind} killed at {seen(fire):,} samples", flush=True)
        if process.returncode == 0:
            break
    seconds = time.monotonic() - begun
    print(f"under fire: {killed.total()} killed ({dict(killed)}), {count} starts, {seconds:.0f} s", flush=True)
    compare_weights(undisturbed, fire)


def soak(folder: Path, address: str, minutes: int) -> None:
    """Kills one process a minute; prints memory by kind of process just before."""
    run_dir = new_run(folder, "soak")
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


def on_one_node(folder: Path, mode: Callable[[Path, str], None]) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=ARGUMENTS)
    prepare(folder, cluster.address)
    mode(folder, cluster.address)
    started = psutil.Process().children(recursive=True)
    cluster.shutdown()
    time.sleep(5)
    print(f"left over: {alive(started)} of {len(started)} processes", flush=True)


def main() -> None:
    folder, mode, number = Path(sys.argv[1]).absolute(), sys.argv[2], int((sys.argv[3:] or ["0"])[0])
    print(header(), flush=True)
    shared = set(os.listdir("/dev/shm"))
    if mode == "kills":
        on_one_node(folder, lambda run, address: kills(run, address, number or 20))
    elif mode == "soak":
        on_one_node(folder, lambda run, address: soak(run, address, number or 30))
    else:
        train_cluster.MODES[mode](folder)
    print(f"left over: {len(set(os.listdir('/dev/shm')) - shared)} files of shared memory")


if __name__ == "__main__":
    main()
