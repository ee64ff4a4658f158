"""What the README says of a cluster: `ray start --head`, then `ray job submit`."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head of its own, on loopback and free ports; it and its children end with the test."""
    port, folder = free_port(), tmp_path_factory.mktemp("r")
    options = {
        "port": free_port(),
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": free_port(),  # the usual one may be held by the Ray of other tests
        "num-cpus": 2,
        "object-store-memory": 300_000_000,
        "temp-dir": f"/tmp/{folder.name}{os.getpid()}",  # short: sockets lie in it
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as head:
        yield f"http://127.0.0.1:{port}"
        started = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in started:
            process.kill()
        psutil.wait_procs(started, timeout=30)


def environment(**changes: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "PATH": path,
        "RAY_AUTH_MODE": "disabled",
        **changes,
    }


def submit(dashboard: str, *job: str) -> subprocess.CompletedProcess:
    """`ray job submit`; again while the head's job agent is not up yet, as the message asks for."""
    command = [RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *job]
    for _ in range(30):
        done = subprocess.run(command, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=400)
        if done.returncode == 0 or not re.search("No available agent|Failed to connect", done.stderr):
            break
        time.sleep(2)
    return done


def test_prepare_data_runs_as_a_submitted_job(dashboard: str, tmp_path: Path) -> None:
    small = ["--corpus.clips", "4", "--corpus.pictures", "4", "--corpus.test_clips", "1", "--corpus.faults", "false"]
    run_dir = tmp_path / "run"
    preset = ["--config", "jobs/configs/nano.yaml", "--run_dir", str(run_dir)]
    done = submit(dashboard, "python", "jobs/prepare_data.py", *preset, *small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "yield" in done.stdout and "100.0 %" in done.stdout
    assert (run_dir / "data/funnel.json").exists()
