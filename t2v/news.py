"""What will have a run's ranks started anew: machines that are about to go, and machines that have come."""

import time
from collections.abc import Sequence

import ray

from t2v.config import TrainConfig

LATE_S = 60.0  # before a machine is taken away, ranks are told again


def news(train: TrainConfig, world: int, lost: Sequence[int], deadline: float | None) -> str:
    """What ranks are told, mostly nothing; `deadline` (seconds since 1970) is when `lost` ranks lose their machines."""
    if lost:
        is_late = deadline is not None and deadline - time.time() < LATE_S
        return f"ranks {', '.join(map(str, lost))} lose their machines{' soon' if is_late else ''}"
    if train.min_workers is None or world == train.workers or (room := room_for_workers(train)) <= world:
        return ""
    return f"the cluster has room for {room} ranks"


def needs_of_worker(train: TrainConfig) -> dict[str, float]:
    """The resources that one worker takes."""
    needs = {"CPU": float(train.cpus_per_worker), "GPU": float(train.gpus_per_worker)}
    return {kind: count for kind, count in needs.items() if count}


def room_for_workers(train: TrainConfig) -> int:
    """How many workers the nodes of now have room for, as Ray Train counts it when it resizes a run."""
    alive, needs = [node["Resources"] for node in ray.nodes() if node["Alive"]], needs_of_worker(train)
    return sum(min(int(node.get(kind, 0) // count) for kind, count in needs.items()) for node in alive)
