"""Samples from a model that is still being trained: a grid of one row a prompt, its frames from left to right.

It is a Ray task of its own, so that no rank waits for it; it runs when a worker of `sample` finds room.
"""

import os
import tempfile
from contextlib import closing

import ray

from t2v.job import TrainJob


def start_preview(job: TrainJob, prompts: list[str], samples: int) -> ray.ObjectRef:
    """Starts the task that samples the newest model; on a machine without GPUs it takes no core from the ranks."""
    gpus = job.sample.gpus_per_worker
    task = _preview.options(num_gpus=gpus, num_cpus=job.sample.cpus_per_worker if gpus else 0)
    return task.remote(job, prompts, samples)


@ray.remote(max_retries=0)
def _preview(job: TrainJob, prompts: list[str], samples: int) -> None:
    import cv2

    from pipelines.prompts import Prompt
    from pipelines.sampling import Sampler, even_batches
    from pipelines.sheet import grid
    from t2v.record import Record

    sampler = Sampler(job.model_folder, even_batches(job.sample, len(prompts)), job.size)
    clips = sampler.sample([Prompt(prompt, job.sample.seed + index) for index, prompt in enumerate(prompts)])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"samples-{samples:012d}.png")
        cv2.imwrite(path, cv2.cvtColor(grid(clips), cv2.COLOR_RGB2BGR))
        with closing(Record(job.run_dir, "train", {})) as record:
            record.file(path, "samples")
