"""How every stage runs on Ray Data: pools of actors, lines of progress instead of bars, and a word where one waits."""

import logging
from typing import Any

from t2v.config import SampleConfig


def actor_pool(config: SampleConfig, batches: int) -> dict[str, Any]:
    """How a stage runs whose actors hold networks: no more of them than there are batches."""
    import ray.data

    workers = min(config.workers, batches)
    return {
        # One batch at a time each: a second one queued would wait while another actor has none.
        "compute": ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        "num_gpus": config.gpus_per_worker,
        "num_cpus": config.cpus_per_worker,
    }


def quieten(dataset: Any) -> None:
    """Turns off Ray Data's bars and plans, in which the lines of progress would drown."""
    dataset.context.enable_progress_bars = False
    dataset.context.enable_operator_progress_bars = False
    dataset.context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # which says that there are no bars


def tell_if_too_small(job: str, cpus: float, gpus: float, what: str) -> None:
    """A cluster without room for `what` lets the job wait for ever, unless it is still growing."""
    import ray

    if not ray.is_initialized():
        ray.init()
    there = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if there.get(kind, 0) < needed:
            print(f"[{job}] waiting for {needed:g} {kind}s, the cluster has {there.get(kind, 0):g}: {what}", flush=True)
