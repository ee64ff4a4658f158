"""One rank of a training run without Ray: torchrun tests/t2v/train_ranks.py FOLDER

Trains six steps straight into FOLDER/straight with a checkpoint after three, then those after three anew from that
checkpoint into FOLDER/resumed, and writes what it exported and logged there. A folder `start` in them is `model.start`.
"""

import os
import shutil
import sys

import torch
import torch.distributed

from t2v.config import DiffusionConfig, MixConfig, ModelConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig
from t2v.job import TrainJob
from t2v.trainer import Trainer

STEP_SAMPLES = 4 + 3 * 2


def job(run_dir: str, workers: int) -> TrainJob:
    """A tiny model that trains on four slots: one of images, three of videos."""
    unet = UNetConfig(block_out_channels=[16, 32], layers_per_block=1, head_dim=8, text_dim=16, norm_groups=8)
    text = TextConfig("random", width=16, heads=2, layers=2)
    start = f"{run_dir}/start" if os.path.exists(f"{run_dir}/start") else None
    return TrainJob(
        run_dir=run_dir,
        seed=0,
        size=32,
        frames=2,
        model=ModelConfig(unet, f"{run_dir}/vae", text, start),
        diffusion=DiffusionConfig(),
        train=TrainConfig(
            workers=workers,
            precision="fp32",
            learning_rate=1e-3,
            warmup_samples=20,
            ema_halflife_samples=100,
            samples=6 * STEP_SAMPLES,
            checkpoint_every_samples=3 * STEP_SAMPLES,
            log_every_s=0,
            shuffle_rows=8,
            mix=MixConfig(slots=4, image_every=4, frames_per_slot=4),
        ),
        sample=SampleConfig(),
    )


def run(run_dir: str, resume_from: str | None) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def keep(folder: str, samples: int) -> None:
        shutil.copytree(folder, f"{run_dir}/checkpoint-{samples}", dirs_exist_ok=True)
        torch.distributed.barrier()

    Trainer(job(run_dir, world), rank, world, resume_from, keep, lambda _: None, lambda *_: None).run()
    torch.distributed.barrier()


def main() -> None:
    folder = sys.argv[1]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    run(f"{folder}/straight", None)
    run(f"{folder}/resumed", f"{folder}/straight/checkpoint-{3 * STEP_SAMPLES}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
