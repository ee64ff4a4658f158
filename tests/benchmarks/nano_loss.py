"""Does the miniature learn? Mean loss of the last tenth of training over that of the first tenth, three seeds.

python tests/benchmarks/nano_loss.py FOLDER
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from header import PROJECT, PYTHON, header

SEEDS = (0, 1, 2)
PRESET = ["--config", "jobs/configs/nano.yaml", "--run_dir"]


def job(name: str, run_dir: Path, *arguments: str) -> None:
    command = [PYTHON, f"jobs/{name}.py", *PRESET, str(run_dir), *arguments]
    subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    folder = Path(sys.argv[1])
    print(header(), flush=True)
    job("prepare_data", folder / "data")
    for seed in SEEDS:
        run_dir = folder / f"seed-{seed}"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(folder / "data/data", run_dir / "data")
        job(
            "train", run_dir, "--seed", str(seed), "--train.log_every_s", "0", "--train.sample_every_samples", "1000000"
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
