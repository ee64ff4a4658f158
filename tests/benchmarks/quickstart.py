"""The quickstart's time and memory, undisturbed, run again, and killed in each of its stages.

python tests/benchmarks/quickstart.py FOLDER [undisturbed] [killed]
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from header import PROJECT, PYTHON, header

KILLS = {  # kill when a job's log says so
    "prepare_data": r"\[prepare_data\] [3-9]/\d+ shards",
    "train": r"\[train\] 1,\d+/",
    "generate": r"\[generate\] [1-9]\d*/",
    "evaluate": r"\[evaluate\] [1-9]\d*/\d+ clips",
}


def start(run_dir: Path) -> subprocess.Popen:
    command = [PYTHON, "jobs/quickstart.py", "--run_dir", str(run_dir)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)


def tree(process: subprocess.Popen) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [*root.children(recursive=True), root]


def memory_gib(processes: list[psutil.Process]) -> float:
    """Proportional set size, which counts what processes share once."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**30


def undisturbed(run_dir: Path) -> None:
    """Runs to the end and prints wall time and peak memory."""
    begun, peak = time.monotonic(), 0.0
    process = start(run_dir)
    while process.poll() is None:
        try:
            peak = max(peak, memory_gib(tree(process)))
        except psutil.Error:
            break
        time.sleep(2)
    assert process.wait() == 0, f"the quickstart failed, see {run_dir}/logs"
    print(f"{run_dir.name:<10} {time.monotonic() - begun:6.1f} s, peak memory {peak:.1f} GiB", flush=True)


def killed(run_dir: Path, job: str, pattern: str) -> None:
    """Runs until the job's log shows the pattern, then kills every process of the tree."""
    log, process = run_dir / "logs" / f"{job}.log", start(run_dir)
    seen = log.stat().st_size if log.exists() else 0
    while not (log.exists() and re.search(pattern, log.read_text()[seen:])):
        assert process.poll() is None, f"ended before {job} was under way"
        time.sleep(0.2)
    doomed = tree(process)
    for each in doomed:
        try:
            each.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(doomed, timeout=30)
    process.wait()
    print(f"killed     {len(doomed)} processes in {job}", flush=True)


def finished(run_dir: Path) -> dict[str, int]:
    """Every file that marks finished work, by its time of writing."""
    marks = [*run_dir.glob("data/done/*/*.json"), *run_dir.glob("samples/*.json")]
    return {str(path.relative_to(run_dir)): path.stat().st_mtime_ns for path in marks}


def main() -> None:
    folder, parts = Path(sys.argv[1]), sys.argv[2:] or ["undisturbed", "killed"]
    print(header(), flush=True)
    if "undisturbed" in parts:
        shutil.rmtree(folder, ignore_errors=True)
        undisturbed(folder / "first")
        print("the same again:", flush=True)
        undisturbed(folder / "first")
    if "killed" in parts:
        shutil.rmtree(folder / "disturbed", ignore_errors=True)
        compare(folder)


def compare(folder: Path) -> None:
    """A run that is killed in every job, held against the undisturbed one."""
    disturbed, before = folder / "disturbed", {}
    for job, pattern in KILLS.items():
        killed(disturbed, job, pattern)
        after = finished(disturbed)
        assert before.items() <= after.items(), "finished work was done again"
        before = after
    print("and once more, to the end:", flush=True)
    undisturbed(disturbed)
    assert before.items() <= finished(disturbed).items(), "finished work was done again"
    funnels = [json.loads((folder / name / "data/funnel.json").read_text()) for name in ("first", "disturbed")]
    assert funnels[0] == funnels[1], "the row counts differ"
    print(f"the same row counts after {len(KILLS)} kills, no finished shard or video made again")


if __name__ == "__main__":
    main()
