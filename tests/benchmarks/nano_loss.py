"""Does the miniature learn? Mean loss of the last tenth of training over that of the first tenth, three seeds.

python tests/benchmarks/nano_loss.py FOLDER
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from header import PROJECT, PYTHON, header

SEEDS = (0, 1, 2)
PRESET = ["--config", "jobs/configs/nano.yaml", "--run_dir"]


def job(name: str, run_dir: Path, *arguments: str) -> None:
    """Runs a job on a Ray of its own, whatever else runs here; its output goes to a file beside `run_dir`."""
    command = [PYTHON, f"jobs/{name}.py", *PRESET, str(run_dir), *arguments]
    environment = os.environ | {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    with run_dir.with_name(f"{run_dir.name}-{name}.log").open("w") as log:
        subprocess.run(command, cwd=PROJECT, env=environment, check=True, stdout=log, stderr=subprocess.STDOUT)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(header(), flush=True)
    job("prepare_data", folder / "data")
    for seed in SEEDS:
        run_dir = folder / f"seed-{seed}"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(folder / "data/data", run_dir / "data")
        job(
            "train",
            run_dir,
            "--seed",
            str(seed),
            "--train.log_every_s",
            "0",
            "--train.milestone_every_samples",
            "1000000",
        )
        lines = [json.loads(line) for line in (run_dir / "train/log.jsonl").read_text().splitlines()]
        tenth = len(lines) // 10
        for stream in ("images", "videos"):
            losses = [line[f"loss_{stream}"] for line in lines]
            first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
            steps = f"{len(lines)} steps, tenths of {tenth}"
            print(f"seed {seed} {stream}: {first:.3f} -> {last:.3f}, ratio {last / first:.2f} ({steps})", flush=True)


if __name__ == "__main__":
    main()
