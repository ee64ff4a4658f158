"""Training on Ray Train: starts the ranks, gives each its checkpoint, and keeps the new ones."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge

from t2v import storage
from t2v.job import STREAMS, TrainJob
from t2v.published import start_weights

PREVIEW_GRACE_S = 180.0  # for samples of the last model to be drawn, after the last step
GAUGES = {
    "samples_per_s": "Samples of both streams a second",
    "data_wait_share": "Share of the time spent waiting for data",
    "memory_gib": "Peak memory of rank 0",
}
OnExport = Callable[[TrainJob, list[str], int], ray.ObjectRef]


def fit(job: TrainJob, on_export: OnExport) -> None:
    """Trains until `train.samples`, from the run folder's newest checkpoint if it has one.

    ValueError if shards and job do not go together, or the folder was begun with another model, order or batch.
    """
    job.inventory()
    if job.is_fresh and job.model.start and storage.is_local(job.model.start):
        start_weights(job.model.start, job.model.unet)  # mapped, not read: it tells here whether they fit
    _keep_identity(job)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # which prints every line of a rank twice
    train = job.train
    on_gpu = train.gpus_per_worker > 0
    TorchTrainer(
        _work,
        train_loop_config={"job": job, "on_export": on_export},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if on_gpu else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=job.run_dir,
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()


def _work(settings: dict) -> None:
    """What runs on every rank."""
    from t2v.trainer import Trainer  # DeepSpeed and the text tower: the driver does without them

    job: TrainJob = settings["job"]
    context = ray.train.get_context()
    if not job.train.gpus_per_worker:
        torch.set_num_threads(job.train.cpus_per_worker)
    checkpoint = ray.train.get_checkpoint()
    with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
        rank, world = context.get_world_rank(), context.get_world_size()
        trainer = Trainer(job, rank, world, folder, _report, _Gauges().set, settings["on_export"])
    trainer.run()
    if trainer.started:  # tasks end with the process that started them
        ray.wait(trainer.started, num_returns=len(trainer.started), timeout=PREVIEW_GRACE_S)
    trainer.close()


def _report(folder: str, samples: int) -> None:
    ray.train.report({"samples": samples}, checkpoint=Checkpoint.from_directory(folder))


class _Gauges:
    """The log's numbers for Prometheus, which scrapes Ray's metrics port; there the names begin with `ray_`."""

    def __init__(self) -> None:
        self.loss = Gauge("t2v_loss", "Mean loss since the last line of the log", ("stream",))
        self.others = {name: Gauge(f"t2v_{name}", meaning) for name, meaning in GAUGES.items()}

    def set(self, line: dict[str, float]) -> None:
        """Takes one line's numbers."""
        for stream in STREAMS:
            self.loss.set(line[f"loss_{stream}"], {"stream": stream})
        for name, gauge in self.others.items():
            gauge.set(line[name])


def _keep_identity(job: TrainJob) -> None:
    """Writes down what a resumed run must not change, or compares it with what was written down.

    The number of workers is among it because a checkpoint is read back by as many ranks as wrote it.
    """
    path = storage.join(job.run_dir, "train", "identity.json")
    identity = {
        "seed": job.seed,
        "frames": job.frames,
        "workers": job.train.workers,
        "unet": asdict(job.model.unet),
        "text": asdict(job.model.text),
        "mix": asdict(job.train.mix),
        "shuffle_rows": job.train.shuffle_rows,
        "diffusion": asdict(job.diffusion),
    }
    if not storage.exists(path):
        storage.write_json(path, identity)
    elif (begun := storage.read_json(path)) != identity:
        changed = ", ".join(f"{key} (was {begun.get(key)})" for key in identity if identity[key] != begun.get(key))
        raise ValueError(f"{job.run_dir}: its training was begun with another {changed}; choose another run_dir")
