"""Shared by all tests: one Ray for the session."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
if not os.path.exists("/dev/nvidiactl"):  # without a GPU Triton's kernels are interpreted; read at its first import
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of three CPUs, started once: two for ranks, one for what encodes beside them."""
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=300_000_000, log_to_driver=True)
    yield
    ray.shutdown()
