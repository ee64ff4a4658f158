"""Samples from a model that is still being trained: a grid of one row a prompt, its frames from left to right.

It is a Ray task of its own, so that no rank waits for it; it runs when a worker of `sample` finds room.
"""

import os
import tempfile

import numpy as np
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
    from t2v.record import Record

    sampler = Sampler(job.model_folder, even_batches(job.sample, len(prompts)), job.size)
    clips = sampler.sample([Prompt(prompt, job.sample.seed + index) for index, prompt in enumerate(prompts)])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"samples-{samples:012d}.png")
        cv2.imwrite(path, cv2.cvtColor(grid(clips), cv2.COLOR_RGB2BGR))
        Record(job.run_dir, "train", {}).file(path, "samples")


def grid(clips: np.ndarray) -> np.ndarray:
    """uint8 clips [b, f, y, x, 3] -> one picture [b * y, 8 * x, 3] of at most eight frames each."""
    some = clips[:, :: -(-clips.shape[1] // 8)]
    return np.concatenate(list(np.concatenate(list(some.transpose(1, 0, 2, 3, 4)), axis=2)), axis=0)
