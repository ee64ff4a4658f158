"""What becomes of a milestone: its averaged weights as a diffusers folder, its loss on rows that training does not see,
and a copy of its checkpoint that stays.
"""

import torch

from t2v import storage
from t2v.checkpoint import read_average
from t2v.config import TextConfig
from t2v.diffusion import Diffusion
from t2v.export import read_unet, write_model
from t2v.feed import held_out_batches
from t2v.frozen import load_text
from t2v.job import STREAMS, TrainJob
from t2v.lora import Adapter, choose_trained, trained_shapes
from t2v.losses import BUCKETS, add_losses, loss_inputs, losses_of
from t2v.published import start_weights
from t2v.unet import UNet


def export(job: TrainJob, checkpoint: str, samples: int) -> None:
    """Writes the model of a checkpoint, as that of a milestone and as `job.model_folder`, the newest one.

    CheckpointError if the checkpoint is not whole.
    """
    train, start = job.train, job.model.start
    with torch.device("meta"):
        unet = UNet(job.model.unet)
        choose_trained(unet, train)
    average = read_average(checkpoint, trained_shapes(unet))
    frozen = start_weights(start, job.model.unet) if start and train.trained != "all" else {}
    adapter = Adapter(train.lora, average, base=start or "") if train.trained == "lora" else None
    weights = adapter.merged(frozen) if adapter else frozen | average
    info, text = {"samples": samples}, load_text(job.model.text)
    for folder in (model_of(job, samples), job.model_folder):
        write_model(folder, weights, job.model, job.diffusion, info, job.size // 8, text, adapter)


def model_of(job: TrainJob, samples: int) -> str:
    """The diffusers folder of a milestone's model, which stays."""
    return storage.join(job.milestone_folder(samples), "model")


def held_out_losses(job: TrainJob, model_folder: str) -> dict[str, float]:
    """Mean loss of an exported model on `train.held_out_rows`, by stream and quarter of the timesteps.

    On this process's GPU if sampling has one, in fp16; chance is the same each time, dropped captions too.
    """
    on_gpu = job.sample.gpus_per_worker > 0 and torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.float16 if on_gpu else torch.float32
    unet = read_unet(model_folder).to(device, dtype).requires_grad_(False)
    text = load_text(TextConfig(weights=model_folder, skip_layers=0), device)
    diffusion, sources = Diffusion(job.diffusion), job.sources()
    tally = torch.zeros(len(STREAMS) * BUCKETS, 2, device=device)
    for stream in STREAMS:
        size = max(1, job.train.mix.frames_per_slot // job.frames_of(stream) // 4)
        scale = sources[stream].info.scale
        for batch in held_out_batches(job, stream, size, diffusion.draw):
            inputs = loss_inputs(batch, scale, text, device, dtype)
            losses = diffusion.loss(lambda z, t, s: unet(z.to(dtype), t, s), *inputs)
            add_losses(tally, stream, losses, inputs[2], of=job.diffusion.timesteps)
    return losses_of(tally, "held_out", of=job.diffusion.timesteps)


def keep(job: TrainJob, checkpoint: str, samples: int) -> None:
    """Copies a checkpoint to where it is not removed."""
    storage.copy_folder(checkpoint, storage.join(job.milestone_folder(samples), "checkpoint"))
