"""One rank of a training run without Ray: torchrun tests/t2v/train_ranks.py FOLDER PLAN

PLAN is JSON: a list of legs, each trained after the other as {"run": name of a folder in FOLDER, "samples": where it
ends, "from": checkpoints to go on from, newest first, "dropout": of the UNet, "train": changes of TrainConfig,
"stop_at": samples at which the last rank is asked to stop, "news_from": samples from which on the cluster has news,
"broken": how many steps in a row, the first one being "broken_at", have losses that are not finite}. A run's folder
holds latents and a VAE; a folder `start` in it is `model.start`. Every checkpoint is kept as RUN/checkpoint-SAMPLES,
the averaged weights at the end as RUN/average.safetensors.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file

import t2v.trainer
from t2v.checkpoint import read_average
from t2v.config import DiffusionConfig, MixConfig, ModelConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig
from t2v.engine import Staged
from t2v.job import TrainJob
from t2v.trainer import Diverged, Trainer

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


class Alone:
    """A host that writes checkpoints at once and is asked nothing."""

    def __init__(self, run_dir: str, stop_at: int | None, news_from: int | None) -> None:
        self.run_dir, self.stop_at, self.news_from, self.samples = run_dir, stop_at, news_from, 0

    def report(self, staged: Staged, samples: int, milestone: bool) -> None:
        staged.write(f"{self.run_dir}/checkpoint-{samples}")
        torch.distributed.barrier()

    def observe(self, line: dict[str, float]) -> None: ...

    def beat(self, samples: int) -> None:
        self.samples = samples

    def wants_stop(self) -> bool:
        """The last rank alone is asked."""
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return last and self.samples + STEP_SAMPLES == self.stop_at

    def news(self) -> str:
        return "a machine goes" if self.news_from and self.samples >= self.news_from else ""


def run(folder: str, leg: dict) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    run_dir = f"{folder}/{leg['run']}"
    whole = job(run_dir, world)
    whole.model.unet.dropout = leg.get("dropout", whole.model.unet.dropout)
    whole.train = replace(whole.train, **{"samples": leg["samples"]} | leg.get("train", {}))
    checkpoints = [f"{folder}/{name}" for name in leg.get("from", [])]
    trainer = Trainer(whole, rank, world, checkpoints, Alone(run_dir, leg.get("stop_at"), leg.get("news_from")))
    if "broken" in leg:
        break_losses(trainer, leg["broken_at"], leg["broken"])
    try:
        trainer.run()
    except Diverged as error:
        print(f"Diverged: {error}")
    trainer.close()
    torch.distributed.barrier()
    if not os.path.exists(f"{run_dir}/checkpoint-{trainer.samples}"):
        return
    if rank == 0:
        trained = trainer.engine.engine.module.named_parameters()
        shapes = {
            name: torch.Size(getattr(weight, "ds_shape", weight.shape))
            for name, weight in trained
            if weight.requires_grad
        }
        average = read_average(f"{run_dir}/checkpoint-{trainer.samples}", shapes)
        save_file(average, f"{run_dir}/average.safetensors")
    torch.distributed.barrier()


def break_losses(trainer: Trainer, first: int, count: int) -> None:
    """Makes the losses of one rank infinite, in `count` steps from the one numbered `first` on."""
    loss, bad = trainer.diffusion.loss, range(first * STEP_SAMPLES, (first + count) * STEP_SAMPLES)

    def broken(*inputs: Any) -> torch.Tensor:
        is_bad = trainer.rank == 0 and trainer.samples in bad
        return loss(*inputs) / (0 if is_bad else 1)

    trainer.diffusion.loss = broken  # type: ignore[method-assign]


def main() -> None:
    folder, plan = sys.argv[1:]
    torch.set_num_threads(1)
    t2v.trainer.LOOK_S = -1.0  # for news, at every step
    torch.distributed.init_process_group("gloo")
    for leg in json.loads(plan):
        run(folder, leg)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
