"""What the README says of a cluster: `ray start --head`, then `ray job submit`."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
        "num-cpus": 2,
        "object-store-memory": 300_000_000,
        "temp-dir": f"/tmp/{folder.name}{os.getpid()}",  # short: sockets lie in it
    }
    command = [RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True) as head:
        yield f"http://127.0.0.1:{port}"
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def environment(**changes: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "PATH": path,
        "RAY_AUTH_MODE": "disabled",
        **changes,
    }


def test_prepare_data_runs_as_a_submitted_job(dashboard: str, tmp_path: Path) -> None:
    import time

    import requests

    for _ in range(120):
        try:
            if requests.get(f"{dashboard}/api/version", timeout=5).ok:
                break
        except requests.ConnectionError:
            time.sleep(1)
    small = ["--corpus.clips", "4", "--corpus.pictures", "4", "--corpus.test_clips", "1", "--corpus.faults", "false"]
    job = ["python", "jobs/prepare_data.py", "--config", "jobs/configs/nano.yaml", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *job, *small],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "yield" in done.stdout and "100.0 %" in done.stdout
    assert (tmp_path / "run/data/funnel.json").exists()
