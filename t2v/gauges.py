"""The numbers of training's log and of milestones for Prometheus, which scrapes Ray's metrics port.

There the names begin with `ray_`.
"""

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

MEANINGS = {  # of the log (t2v/trainer.py) and of milestones; streams and quarters of the timesteps are tags
    "loss": "Mean loss since the last line of the log",
    "loss_by_timestep": "Mean loss since the last line of the log, from this timestep to the next tagged one",
    "held_out": "Mean loss of the newest milestone on held-out rows",
    "held_out_by_timestep": "Mean loss of the newest milestone on held-out rows, from this timestep to the next tagged",
    "stream_samples_per_s": "Samples of one stream a second",
    "samples_per_s": "Samples of both streams a second",
    "samples": "Samples that the model has seen",
    "data_wait_share": "Share of the time spent waiting for data",
    "gradient_norm": "Norm of the gradient before it is clipped",
    "learning_rate": "Learning rate",
    "memory_gib": "Peak memory of rank 0",
    "mfu": "Counted FLOPs over the card's limit, 0 where that is not known",
    "skipped_steps": "Steps left out because their gradient was not finite",
    "restarts": "How often ranks were started anew",
    "seconds": "Seconds since the last line of the log",
    "checkpoint_s": "Seconds that the last checkpoint took to write, in the background",
    "checkpoint_stall_s": "Seconds that training waited for the last checkpoint",
}


def gauge_of(key: str) -> tuple[str, dict[str, str]]:
    """The gauge, and its tags, that shows a number of the log."""
    if found := re.fullmatch(r"(loss|held_out)_([a-z]+)_t(\d+)", key):
        return f"{found[1]}_by_timestep", {"stream": found[2], "timestep": found[3]}
    if found := re.fullmatch(r"(loss|held_out)_([a-z]+)", key):
        return found[1], {"stream": found[2]}
    if found := re.fullmatch(r"(images|videos)_per_s", key):
        return "stream_samples_per_s", {"stream": found[1]}
    return key, {}


class Gauges:
    """One gauge a number, made when the number first comes."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def set(self, line: Mapping[str, float]) -> None:
        """Takes a line of the log, or a milestone's losses."""
        for key, value in line.items():
            name, tags = gauge_of(key)
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"t2v_{name}", MEANINGS.get(name, name), tuple(tags))
            self._gauges[name].set(value, tags)
