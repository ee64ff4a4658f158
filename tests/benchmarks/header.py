"""What every result says first: when, on what, of which commit, by which command."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil

PROJECT = Path(__file__).parents[2]
PYTHON = sys.executable


def header() -> str:
    """One line each: date, commit, hardware, versions, command."""
    from importlib.metadata import PackageNotFoundError, version

    commit = subprocess.getoutput(f"git -C {PROJECT} describe --always --dirty")
    memory_gib = psutil.virtual_memory().total / 2**30
    versions = []
    for name in ("torch", "triton", "ray", "deepspeed", "diffusers"):
        with suppress(PackageNotFoundError):  # a benchmark of the model alone needs not all
            versions.append(f"{name} {version(name)}")
    return "\n".join(
        [
            f"date      {datetime.now():%Y-%m-%d %H:%M}",
            f"commit    {commit}",
            f"hardware  {_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB",
            f"load      {os.getloadavg()[0]:.1f} at the start",
            f"versions  Python {platform.python_version()}, {', '.join(versions)}",
            f"command   python {Path(sys.argv[0]).resolve().relative_to(PROJECT)} {' '.join(sys.argv[1:])}",
        ]
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
