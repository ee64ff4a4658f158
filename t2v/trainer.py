"""The training loop as every rank runs it (paper 3.3, 4.1.3): slots -> losses -> one step; logs and checkpoints.

It knows nothing of how ranks are started: t2v/worker.py hands it a rank, a checkpoint and a way to report one.

b samples, c channels, f frames, h w latent size, l tokens, d text width.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from t2v import frozen, shards, storage
from t2v.config import TrainConfig
from t2v.diffusion import Diffusion
from t2v.engine import Engine
from t2v.export import write_model
from t2v.feed import Batch, Feed
from t2v.job import STREAMS, TrainJob
from t2v.order import generator
from t2v.published import start_weights
from t2v.unet import UNet


def learning_rate(config: TrainConfig, samples: int) -> float:
    """Linear warm-up, then constant (the paper gives no decay)."""
    return config.learning_rate * min(1.0, samples / max(1, config.warmup_samples))


def ema_decay(config: TrainConfig, samples: int, step_samples: int) -> float:
    """One step's decay for a half-life in samples, which is shorter while the run is young (EDM2: 5 % of its age)."""
    return 0.5 ** (step_samples / min(config.ema_halflife_samples, 0.05 * samples))


class Trainer:
    """One rank of a training run.

    `resume_from` is a checkpoint's local folder; `report(folder, samples)` takes the folder that every rank has
    written its part of a new one into. On rank 0 `observe` gets the numbers of every line of the log, and
    `on_export(job, prompts, samples)` is told of a newly exported model; what it starts is kept in `started`.
    """

    def __init__(
        self,
        job: TrainJob,
        rank: int,
        world: int,
        resume_from: str | None,
        report: Callable[[str, int], None],
        observe: Callable[[dict[str, float]], None],
        on_export: Callable[[TrainJob, list[str], int], Any],
    ) -> None:
        self.job, self.step, self.rank = job, job.step, rank
        self.report, self.observe, self.on_export = report, observe, on_export
        self.slots = self.step.of_rank(rank, world)
        self.inventory = job.inventory()
        torch.manual_seed(job.seed)
        unet = UNet(job.model.unet)
        if job.model.start and not resume_from:
            unet.load_state_dict(start_weights(job.model.start, job.model.unet), strict=False)
        self.engine = Engine(unet, job.train, len(self.slots))
        self.text = frozen.load_text(job.model.text, self.engine.device)
        self.diffusion = Diffusion(job.diffusion)
        self.samples = self.engine.load(resume_from)["samples"] if resume_from else 0
        self.lines = _read_log(job.log_path, self.samples) if rank == 0 else []
        self.record = None
        if rank == 0:
            from t2v.record import Record  # MLflow, which the other ranks need not load

            self.record = Record(job.run_dir, "train", asdict(job))
        self.started: list[Any] = []
        self.losses: list[Tensor] = []  # of each step since the last line, [streams], left on the device

    def run(self) -> None:
        """Trains until `job.samples`."""
        if self.record:
            print(f"[train] {self.samples:,}/{self.job.samples:,} samples at the start", flush=True)
        feed = Feed(
            self.inventory,
            self.step,
            self.slots,
            self.job.seed,
            self.job.train.shuffle_rows,
            first_step=self.samples // self.step.total,
            pin=self.engine.device.type == "cuda",
        )
        with closing(feed):
            self._train(feed)

    def _train(self, feed: Feed) -> None:
        self._begin_interval(feed)
        steps = iter(feed)
        while self.samples < self.job.samples:
            self._train_step(next(steps))
            due = _crossed(self.samples, self.step.total, self.job.train.checkpoint_every_samples)
            due = due or self.samples == self.job.samples
            if self.record and (due or time.monotonic() - self.begun > self.job.train.log_every_s):
                self._log(feed)
            if due:
                self._checkpoint()
                self._begin_interval(feed)

    def close(self) -> None:
        """Ends the run in MLflow; whatever `started` was to add to it should have done so."""
        if self.record:
            self.record.close()

    def _train_step(self, batches: list[Batch]) -> None:
        """One step. The mean loss of each stream over all ranks stays on the device until it is logged."""
        sums = torch.zeros(len(STREAMS), device=self.engine.device)
        for batch in batches:
            loss = self._loss(batch)
            self.engine.backward(loss, batch.slot.weight)
            share = batch.slot.count / self.step.samples[batch.slot.stream]
            sums[STREAMS.index(batch.slot.stream)] += loss.detach() * share
        torch.distributed.all_reduce(sums)
        if self.record:
            self.losses.append(sums)
        self.samples += self.step.total
        train = self.job.train
        self.engine.update(learning_rate(train, self.samples), ema_decay(train, self.samples, self.step.total))

    def _loss(self, batch: Batch) -> Tensor:
        """Mean of eq. 5 over one slot's samples; their random numbers are keyed by (seed, stream, sample)."""
        device = self.engine.device
        latents = batch.mean.to(device, non_blocking=True).float()  # b c f h w
        draw = self.diffusion.draw(f"{self.job.seed} {batch.slot.stream}", batch.sample, latents.shape[1:])
        if batch.logvar is not None:
            deviation = (0.5 * batch.logvar.to(device, non_blocking=True).float()).exp()
            latents += deviation * draw.posterior_noise.to(device, non_blocking=True)
        latents *= self.inventory[batch.slot.stream][0].info.scale
        text = self.text.encode(draw.kept(batch.captions)).to(self.engine.dtype)  # b l d
        dropout_seed = generator(self.job.seed, batch.slot.stream, "dropout", batch.sample[0]).integers(2**31)
        torch.manual_seed(int(dropout_seed))
        noise, timesteps = draw.noise.to(device, non_blocking=True), draw.timesteps.to(device, non_blocking=True)
        return self.diffusion.loss(self._predict, latents, text, timesteps, noise).mean()

    def _predict(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return self.engine.unet(latents.to(self.engine.dtype), timesteps, text)

    def _begin_interval(self, feed: Feed) -> None:
        self.losses.clear()
        self.begun, self.waited_s = time.monotonic(), feed.waited_s

    def _log(self, feed: Feed) -> None:
        """One line of what happened since the last one; the same numbers go to MLflow and train/log.jsonl."""
        assert self.record
        images, videos = torch.stack(self.losses).mean(0).tolist()
        seconds = time.monotonic() - self.begun
        line = {
            "loss_images": images,
            "loss_videos": videos,
            "samples_per_s": len(self.losses) * self.step.total / seconds,
            "data_wait_share": (feed.waited_s - self.waited_s) / seconds,
            "gradient_norm": self.engine.gradient_norm(),
            "learning_rate": learning_rate(self.job.train, self.samples),
            "memory_gib": _memory_gib(self.engine.device),
            "seconds": seconds,
        }
        print(
            f"[train] {self.samples:,}/{self.job.samples:,} samples  loss images {images:.3f} videos {videos:.3f}  "
            f"{line['samples_per_s']:.1f} samples/s  waiting for data {line['data_wait_share']:.1%}  "
            f"memory {line['memory_gib']:.1f} GiB",
            flush=True,
        )
        self.lines.append({"samples": self.samples, "step": self.samples // self.step.total} | line)
        storage.write_lines(self.job.log_path, self.lines)
        self.record.metrics(line, self.samples)
        self.observe(line)
        self._begin_interval(feed)

    def _checkpoint(self) -> None:
        """Exports the averaged weights, then reports a checkpoint: where there is one, there is its model."""
        with self.engine.ema_weights() as weights:
            averaged = {name: weight.cpu() for name, weight in weights}
        if self.record:
            job = self.job
            info = {"samples": self.samples}
            latent_size = job.size // 8
            write_model(job.model_folder, averaged, job.model, job.diffusion, info, latent_size, self.text)
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save(folder, {"samples": self.samples})
            self.report(folder, self.samples)
        train = self.job.train
        if self.record and _crossed(self.samples, train.checkpoint_every_samples, train.sample_every_samples):
            prompts = shards.read_rows(self.inventory["videos"][0].path, 0).caption[:8]
            self.started.append(self.on_export(self.job, prompts, self.samples))


def _crossed(samples: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies within the last `before` samples."""
    return samples // every > (samples - before) // every


def _read_log(path: str, samples: int) -> list[dict]:
    """The lines up to the checkpoint that training resumes from."""
    return [line for line in storage.read_lines(path) if line["samples"] <= samples] if storage.exists(path) else []


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
