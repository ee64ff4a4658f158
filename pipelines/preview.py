"""Samples from a model that is still being trained, kept for each milestone and shown on a page of all of them, and its
loss on held-out rows.

It is a Ray task of its own, so that no rank waits for it; it runs when a worker of `sample` finds room.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import closing

import numpy as np
import ray

from t2v import storage
from t2v.job import TrainJob

X264 = {"crf": "20", "preset": "veryfast"}
Page = Callable[[str], str]


def start_preview(job: TrainJob, prompts: list[str], samples: int, page: Page | None = None) -> ray.ObjectRef:
    """Starts the task that samples a milestone's model; on a machine without GPUs it takes no core from the ranks.

    Its result is that model's losses on held-out rows (t2v/validation.py), if any are kept.
    `page` makes the HTML of all milestones of a run folder (dashboards/milestones.py).
    """
    gpus = job.sample.gpus_per_worker
    task = _preview.options(num_gpus=gpus, num_cpus=job.sample.cpus_per_worker if gpus else 0)
    return task.remote(job, prompts, samples, page)


@ray.remote(max_retries=0)
def _preview(job: TrainJob, prompts: list[str], samples: int, page: Page | None) -> dict[str, float]:
    from pipelines.prompts import Prompt
    from pipelines.sampling import Sampler, even_batches
    from t2v.record import Record
    from t2v.validation import held_out_losses, model_of

    model = model_of(job, samples)
    sampler = Sampler(model, even_batches(job.sample, len(prompts)), job.size)
    asked = [Prompt(prompt, job.sample.seed + index) for index, prompt in enumerate(prompts)]
    clips = sampler.sample(asked)
    milestone = job.milestone_folder(samples)
    milestones, name = milestone.rsplit("/", 1)
    with tempfile.TemporaryDirectory() as folder, closing(Record(job.run_dir, "train", {})) as record:
        losses = held_out_losses(job, model) if job.train.held_out_rows else {}
        record.metrics(losses, samples)
        for path in _write(folder, name, clips, job.sample.fps):
            record.file(path, "samples" if path.endswith(".png") else f"milestones/{name}")
        storage.copy_folder(folder, milestone)
        if losses:
            storage.write_json(storage.join(milestone, "held_out.json"), losses)
        rows = [{"prompt": prompt.text, "seed": prompt.seed} for prompt in asked]
        storage.write_json(storage.join(milestone, "prompts.json"), rows)
        if page:
            html = page(job.run_dir).encode()
            with storage.open_atomic(storage.join(milestones, "index.html")) as file:
                file.write(html)
            path = os.path.join(folder, "index.html")
            with open(path, "wb") as copy:
                copy.write(html)
            record.file(path, "milestones")
    return losses


def _write(folder: str, name: str, clips: np.ndarray, fps: int) -> list[str]:
    """Writes uint8 clips [b, f, y, x, 3]: one grid of all, and each as an mp4; returns their paths."""
    import cv2

    from pipelines.sheet import grid
    from pipelines.video import mp4_bytes

    paths = [os.path.join(folder, f"samples-{name}.png")]
    cv2.imwrite(paths[0], cv2.cvtColor(grid(clips), cv2.COLOR_RGB2BGR))
    for index, clip in enumerate(clips):
        paths.append(os.path.join(folder, f"{index}.mp4"))
        with open(paths[-1], "wb") as file:
            file.write(mp4_bytes(clip, fps, X264))
    return paths
