"""What becomes of a milestone: its averaged weights as a diffusers folder, and a copy of its checkpoint that stays."""

import torch

from t2v import storage
from t2v.checkpoint import read_average
from t2v.export import write_model
from t2v.job import TrainJob
from t2v.keys import is_temporal
from t2v.published import start_weights
from t2v.unet import UNet


def export(job: TrainJob, checkpoint: str, samples: int) -> None:
    """Writes the model of a checkpoint as `job.model_folder`; CheckpointError if the checkpoint is not whole."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in UNet(job.model.unet).named_parameters()}
    weights: dict[str, torch.Tensor] = {}
    if job.train.trained == "temporal" and job.model.start:
        weights = start_weights(job.model.start, job.model.unet)
        shapes = {name: shape for name, shape in shapes.items() if is_temporal(name)}
    weights |= read_average(checkpoint, shapes)
    write_model(job.model_folder, weights, job.model, job.diffusion, {"samples": samples}, job.size // 8)


def keep(job: TrainJob, checkpoint: str, samples: int) -> None:
    """Copies a checkpoint to where it is not removed."""
    storage.copy_folder(checkpoint, storage.join(job.run_dir, "train", "milestones", f"{samples:012d}", "checkpoint"))
