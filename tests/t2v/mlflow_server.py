"""A real MLflow server on a loopback port, which a test starts, stops and starts again."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

SLOWEST_START_S = 120


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Server:
    """`folder` keeps what it is told from one start to the next."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns once it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        stores = ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        stores += ["--artifacts-destination", str(self._folder / "artifacts"), "--workers", "1"]
        lean = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")} | lean
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command + stores, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + SLOWEST_START_S
        while True:
            try:
                return urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
            except OSError:
                died = self._process.poll() is not None
                assert not died and time.monotonic() < deadline, (self._folder / "server.log").read_text()[-3000:]
                time.sleep(0.2)

    def stop(self) -> None:
        """Ends it and its workers, who share its session."""
        if self._process:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None
