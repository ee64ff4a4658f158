"""The preparation under fire: workers, actors and the driver are killed, and a node of three; the end must be the same.

python tests/benchmarks/data_faults.py FOLDER [KILLS]
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from header import PROJECT, PYTHON, header

SIZES = {"corpus.clips": 160, "corpus.pictures": 320, "corpus.test_clips": 1, "data.videos.shard_rows": 8}
OPTIONS = [part for key, value in SIZES.items() for part in (f"--{key}", str(value))]
PRESET = ["--config", "jobs/configs/nano.yaml", "--data.images.shard_rows", "16", *OPTIONS]
EVERY_S = (3.0, 8.0)


def start(run_dir: Path, address: str = "") -> subprocess.Popen:
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [PYTHON, "jobs/prepare_data.py", *PRESET, "--run_dir", str(run_dir)]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}
    log = (run_dir / "log.txt").open("a")
    return subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, env=environment)


def end_of(process: subprocess.Popen) -> None:
    for child in psutil.Process(process.pid).children(recursive=True):
        _kill(child)
    process.kill()
    process.wait()


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        return


def state(run_dir: Path) -> dict[str, object]:
    """All that a run leaves: the bytes of its latents, its ledger but for the seconds, how many rows ended how."""
    latents = {path.name: path.read_bytes() for path in sorted(run_dir.glob("data/latents/*/*.parquet"))}
    ledger = [
        [tuple(row[key] for key in ("row_id", "status", "stage", "bytes")) for row in pq.read_table(path).to_pylist()]
        for path in sorted(run_dir.glob("data/ledger/*/*.parquet"))
    ]
    done = sorted(path.name for path in run_dir.glob("data/done/*/*.json"))
    return {"latents": latents, "ledger": ledger, "done": done}


def undisturbed(run_dir: Path) -> None:
    begun, process = time.monotonic(), start(run_dir)
    assert process.wait() == 0, f"failed, see {run_dir}/log.txt"
    rows = sum(len(part) for part in state(run_dir)["ledger"])
    print(f"undisturbed: {rows} rows in {time.monotonic() - begun:.0f} s", flush=True)


def under_fire(run_dir: Path, kills: int) -> None:
    """Kills a random worker, actor or the driver `kills` times; when the driver is gone the job is started again."""
    draw, killed, starts = random.Random(0), Counter(), 0
    while True:
        process, starts = start(run_dir), starts + 1
        while process.poll() is None:
            time.sleep(draw.uniform(*EVERY_S))
            if killed.total() < kills and process.poll() is None:
                name = kill_one(process, draw)
                killed[name] += bool(name)
        if process.returncode == 0 and killed.total() >= kills:
            break
        if process.returncode == 0:  # finished between the kills: some of it is lost again
            shutil.rmtree(run_dir / "data/done", ignore_errors=True)
    print(f"under fire: {killed.total()} processes killed ({dict(killed)}), the job started {starts} times", flush=True)


def kill_one(driver: subprocess.Popen, draw: random.Random) -> str:
    """The driver in one case of five, else one of Ray's workers: what it was called."""
    if draw.random() < 0.2:
        end_of(driver)
        return "driver"
    workers = [
        child for child in psutil.Process(driver.pid).children(recursive=True) if _name(child).startswith("ray::")
    ]
    if not workers:
        return ""
    chosen = draw.choice(workers)
    name = _name(chosen).split("(")[0].split(".")[0]
    _kill(chosen)
    return name


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def node_lost(run_dir: Path) -> None:
    """A cluster of three nodes loses one, with all its processes, while the job runs."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200_000_000})
    others = [cluster.add_node(num_cpus=2, object_store_memory=200_000_000) for _ in range(2)]
    process = start(run_dir, cluster.address)
    while len(list(run_dir.glob("data/done/*/*.json"))) < 8:
        assert process.poll() is None, f"ended early, see {run_dir}/log.txt"
        time.sleep(0.5)
    cluster.remove_node(others[0], allow_graceful=False)
    lost_at = len(list(run_dir.glob("data/done/*/*.json")))
    assert process.wait() == 0, f"failed, see {run_dir}/log.txt"
    cluster.shutdown()
    print(f"a node of three killed after {lost_at} shards: the job went on and ended", flush=True)


def main() -> None:
    folder, kills = Path(sys.argv[1]).absolute(), int((sys.argv[2:] or ["20"])[0])
    print(header(), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    undisturbed(folder / "undisturbed")
    expected = state(folder / "undisturbed")
    for name, disturb in (("fire", lambda path: under_fire(path, kills)), ("node", node_lost)):
        shutil.copytree(folder / "undisturbed/corpus", folder / name / "corpus")  # the same addresses, so the same rows
        disturb(folder / name)
        found = state(folder / name)
        for part, value in expected.items():
            assert found[part] == value, f"{name}: {part} differ"
        print(f"{name}: latents byte for byte, ledger and summaries are those of the undisturbed run", flush=True)


if __name__ == "__main__":
    main()
