"""A training step on random data at the real shapes, on one rank: what can break in a step breaks before the run."""

import os
import tempfile
import time

import torch
import torch.distributed
from torch import Tensor

from t2v import frozen
from t2v.diffusion import Diffusion
from t2v.engine import Engine
from t2v.job import STREAMS, TrainJob
from t2v.mix import Slot
from t2v.unet import UNet

CAPTION = "a red cube slides over the floor"


def largest_slots(job: TrainJob) -> list[Slot]:
    """The largest micro-batch of each stream, over all ranks."""
    world = job.train.workers
    slots = [slot for rank in range(world) for slot in job.step.of_rank(rank, world)]
    return [max((s for s in slots if s.stream == stream), key=lambda slot: slot.count) for stream in STREAMS]


def rehearse(job: TrainJob, slots: list[Slot], steps: int = 1) -> float:
    """Seconds of the last of some steps, each of these micro-batches, by a world of one.

    It makes and ends the process's torch.distributed group. ValueError if a gradient is not finite.
    """
    on_gpu = torch.cuda.is_available() and job.train.gpus_per_worker > 0
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
        )
        try:
            return _rehearse(job, slots, steps)
        finally:
            torch.distributed.destroy_process_group()


def _rehearse(job: TrainJob, slots: list[Slot], steps: int) -> float:
    torch.manual_seed(job.seed)
    engine = Engine(UNet(job.model.unet), job.train, len(slots))
    text, diffusion = frozen.load_text(job.model.text, engine.device), Diffusion(job.diffusion)
    for _ in range(steps):
        begun = time.monotonic()
        for slot in slots:
            engine.backward(_losses(job, engine, text, diffusion, slot).mean(), 1 / len(slots))
        if not engine.update(job.train.learning_rate, 0.5):
            raise ValueError("the rehearsed step's gradient is not finite; try another train.precision")
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
    return time.monotonic() - begun


def _losses(job: TrainJob, engine: Engine, text: frozen.TextEncoder, diffusion: Diffusion, slot: Slot) -> Tensor:
    frames, size, unet = job.frames_of(slot.stream), job.size // 8, job.model.unet
    latents = torch.randn(slot.count, unet.channels, frames, size, size, device=engine.device)
    timesteps = torch.randint(job.diffusion.timesteps, (slot.count,), device=engine.device)
    states = text.encode([CAPTION] * slot.count).to(engine.dtype)
    return diffusion.loss(
        lambda x, t, s: engine.unet(x.to(engine.dtype), t, s), latents, states, timesteps, torch.randn_like(latents)
    )
