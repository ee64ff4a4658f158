"""The whole path in miniature: a corpus, latents, training, videos, scores and a report, on this machine.

    make quickstart

It starts a Ray of its own (or joins the one that RAY_ADDRESS names) and submits the four jobs through the job API, as
`ray job submit` does. What an earlier run has finished, even one that was killed, is not done again. Any key of the
configuration may be overridden and is handed on to the jobs.
"""

import asyncio
import logging
import os
import re
import shlex
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.config import Config, parse, parser

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
JOBS = ("prepare_data", "train", "generate", "evaluate")
PROGRESS = re.compile(r"\[\w+\] ([\d,]+)/([\d,]+) (\w+)(.*)")  # what jobs print: [train] 46/2,760 samples ...
OBJECT_STORE_BYTES = 1_000_000_000


def main() -> None:
    os.chdir(PROJECT)
    given = ["--config", "jobs/configs/nano.yaml", "--run_dir", f"{PROJECT}/runs/quickstart", *sys.argv[1:]]
    config, _ = parse(parser(__doc__), given)
    run_dir, prompts = config.run_dir, f"{config.run_dir}/prompts.jsonl"
    # A Ray that this process starts runs jobs in this folder; any other one gets a copy of it.
    environment = {"working_dir": PROJECT} if os.environ.get("RAY_ADDRESS") else {}
    begun = time.monotonic()
    with _job_api() as client:
        for name in JOBS:
            extra = []
            if name == "generate":
                _write_prompts(prompts, config)
                extra = ["--prompts", prompts]
            entrypoint = shlex.join(["python", f"jobs/{name}.py", *given, *extra])
            job = _submit(client, entrypoint, environment)
            asyncio.run(_follow(client, job, name, f"{run_dir}/logs/{name}.log"))
    _show(run_dir, begun)


@contextmanager
def _job_api() -> Iterator["JobSubmissionClient"]:
    """The job API of the cluster in RAY_ADDRESS, or of a Ray that ends with this process."""
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # so that jobs find this python
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:  # of one's own and on loopback: no token is needed
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray.job_submission import JobSubmissionClient

    if address.startswith("http"):
        yield JobSubmissionClient(address)
        return
    if address:
        print(f"joining Ray at {address}", flush=True)
        yield JobSubmissionClient(f"http://{ray.init(logging_level='warning', log_to_driver=False).dashboard_url}")
        ray.shutdown()
        return
    print("starting Ray", flush=True)
    with tempfile.TemporaryDirectory(prefix="t2v-ray-", ignore_cleanup_errors=True) as folder:
        local = {
            "address": "local",  # not another Ray that happens to run here
            "num_cpus": max(2, os.cpu_count() or 2),
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": True,
            "dashboard_port": _free_port(),
            "_temp_dir": folder,
        }
        context = ray.init(**local, logging_level="warning", log_to_driver=False)
        # Where jobs look for the Ray that they belong to; without it they may take another one of this machine.
        with open(f"{folder}/ray_current_cluster", "w") as file:
            file.write(context.address_info["gcs_address"])
        yield JobSubmissionClient(f"http://{context.dashboard_url}")
        ray.shutdown()


def _submit(client: "JobSubmissionClient", entrypoint: str, environment: dict[str, str]) -> str:
    """Submits a job, again and again while the agent that takes jobs is still starting."""
    for _ in range(60):
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(1)
    raise SystemExit(
        "error: Ray's job agent does not start. Does another Ray hold its port, 52365? Join it by RAY_ADDRESS"
    )


async def _follow(client: "JobSubmissionClient", job: str, name: str, path: str) -> None:
    """Draws a job's progress until it ends, keeps its log, and ends this process if it fails."""
    from ray.job_submission import JobStatus
    from tqdm import tqdm

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)  # it tells of every connection it closes
    os.makedirs(os.path.dirname(path), exist_ok=True)
    last: deque[str] = deque(maxlen=30)
    layout = "{desc:<13}{percentage:3.0f}% |{bar:24}| {n:,}/{total:,} {unit} [{elapsed}]{postfix}"
    with open(path, "a") as log, tqdm(desc=name, total=1, unit="", bar_format=layout, file=sys.stdout) as bar:
        async for lines in client.tail_job_logs(job):
            log.write(lines)
            log.flush()
            for line in lines.splitlines():
                last.append(line)
                if found := PROGRESS.search(line):
                    done, total, bar.unit, rest = found.groups()
                    bar.n, bar.total = int(done.replace(",", "")), int(total.replace(",", ""))
                    bar.set_postfix_str(" ".join(rest.split()))
    if client.get_job_status(job) != JobStatus.SUCCEEDED:
        print(*last, f"{name} failed; its whole log is {path}", sep="\n")
        raise SystemExit(1)


def _write_prompts(path: str, config: Config) -> None:
    """The captions and seeds that the evaluation draws, so that its videos are these."""
    from pipelines.scoring import choose
    from t2v import storage

    captions = [caption for _, caption in choose(config.evaluate)]
    seeds = range(config.sample.seed, config.sample.seed + len(captions))
    storage.write_lines(path, [{"prompt": text, "seed": seed} for text, seed in zip(captions, seeds, strict=True)])


def _show(run_dir: str, begun: float) -> None:
    """What came out, where it lies, and how long it took."""
    from dashboards.report import write_report
    from pipelines.ledger import funnel_text
    from pipelines.scoring import table
    from t2v import storage

    funnel = {stream: row["status"] for stream, row in storage.read_json(f"{run_dir}/data/funnel.json").items()}
    print(f"\n{funnel_text(funnel)}\n\n{table(storage.read_json(f'{run_dir}/scores/scores.json'))}\n")
    print(f"videos   {run_dir}/samples")
    report, parts = f"{run_dir}/report.html", (f"{run_dir}/train/log.jsonl", f"{run_dir}/scores/scores.json")
    if not os.path.exists(report) or os.path.getmtime(report) < max(map(os.path.getmtime, parts)):
        write_report(run_dir)
    print(f"report   {report}")
    print(f"MLflow   make mlflow RUN={os.path.relpath(run_dir)}")
    print(f"done in {time.monotonic() - begun:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
