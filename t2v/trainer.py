"""The training loop as every rank runs it (paper 3.3, 4.1.3): slots -> losses -> one step; logs and checkpoints.

It knows nothing of how ranks are started: t2v/worker.py is its Host.

b samples.
"""

import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from t2v import frozen, storage
from t2v.cards import mfu
from t2v.checkpoint import CheckpointError
from t2v.config import Stream, TrainConfig
from t2v.diffusion import Diffusion
from t2v.engine import Engine, Staged
from t2v.feed import Batch, Feed, ReadAhead
from t2v.graphs import Graphs
from t2v.job import STREAMS, TrainJob
from t2v.losses import BUCKETS, add_losses, first_timestep, loss_inputs, losses_of
from t2v.online import OnlineFeed, Tables
from t2v.order import generator
from t2v.plan import sample_flops
from t2v.published import start_weights
from t2v.unet import UNet

LOOK_S = 5.0  # between two looks for machines that are about to go or have come


class Host(Protocol):
    """What surrounds a rank."""

    def report(self, staged: Staged, samples: int, milestone: bool) -> None:
        """Has a checkpoint written in the background, by every rank its share."""

    def tables(self, begun: Mapping[Stream, int]) -> Mapping[Stream, Tables]:
        """With `train.feed: online`, both streams from so many raw shards on; all ranks ask at once."""

    def observe(self, line: dict[str, float]) -> None:
        """Takes the numbers of a line of the log, on rank 0."""

    def beat(self, samples: int) -> None:
        """Hears of every step: where it hears nothing for too long, something hangs."""

    def wants_stop(self) -> bool:
        """Whether this rank has been asked to write a checkpoint and end."""

    def news(self) -> str:
        """What is about to have all ranks started anew, if anything; all ranks ask at once, and hear the same."""


class Diverged(ArithmeticError):
    """Too many steps after each other whose gradient was not finite."""


def learning_rate(config: TrainConfig, samples: int) -> float:
    """Linear warm-up, then constant (the paper gives no decay), or falling to `final_learning_rate` at the end."""
    if samples < config.warmup_samples:
        return config.learning_rate * samples / config.warmup_samples
    done = min(1.0, (samples - config.warmup_samples) / max(1, config.samples - config.warmup_samples))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        config.learning_rate_schedule
    ]
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left


def ema_decay(config: TrainConfig, samples: int, step_samples: int) -> float:
    """One step's decay for a half-life in samples, which is shorter while the run is young (EDM2: 5 % of its age)."""
    return 0.5 ** (step_samples / min(config.ema_halflife_samples, 0.05 * samples))


class Trainer:
    """One rank of a training run, which goes on from the first of `checkpoints` (furthest first) that is whole."""

    def __init__(self, job: TrainJob, rank: int, world: int, checkpoints: Sequence[str], host: Host) -> None:
        self.job, self.step, self.rank, self.world, self.host = job, job.step, rank, world, host
        self.slots = self.step.of_rank(rank, world)
        self.sources = job.sources()
        torch.manual_seed(job.seed)
        unet = UNet(job.model.unet)
        if job.model.start and (not checkpoints or job.train.trained != "all"):
            whole = job.train.trained == "lora"
            unet.load_state_dict(start_weights(job.model.start, job.model.unet, whole), strict=False)
        self.engine = Engine(unet, job.train, len(self.slots))
        self.text = frozen.load_text(job.model.text, self.engine.device)
        self.diffusion = Diffusion(job.diffusion)
        self.passes = Graphs(self._pass, 2 * len(self.slots)) if job.train.graphs else self._pass
        state = self._resume(checkpoints)
        self.samples, self.skipped_steps = state["samples"], state["skipped_steps"]
        self.raw_begun: dict[Stream, int] = dict.fromkeys(STREAMS, 0) | state.get("raw_begun", {})
        self.checkpointed = self.samples
        self.skipped_in_a_row = 0
        self.staged: Staged | None = None  # the last checkpoint, perhaps still on its way
        self.stall_s = 0.0
        self.looked = time.monotonic()
        self.tallies: list[Tensor] = []  # since the last line of the log
        self.record = None
        if rank == 0:
            from t2v.record import Record  # MLflow, which the other ranks need not load

            self.lines = _read_log(job.log_path, self.samples)
            self.next_write = 0.0
            self.restarts = _count_start(job, self.samples, world)
            self.rank_flops = sum(self.step.work(world, sample_flops(job))) / world  # of a step
            self.record = Record(job.run_dir, "train", asdict(job))
            for stream, source in self.sources.items():
                name = f"{stream} manifest" if job.raw else f"{stream} latents"
                self.record.dataset(name, source.path, source.digest, source.rows)

    def run(self) -> None:
        """Trains until `job.samples`, or until a rank is asked to stop; either way its last step is in a checkpoint.

        Diverged, on all ranks alike, after `max_skipped_steps` steps in a row without a finite gradient.
        """
        if self.record:
            print(f"[train] {self.samples:,}/{self.job.samples:,} samples at the start", flush=True)
        with closing(self._feed()) as feed:
            self._train(feed)
        if self.record:
            storage.write_lines(self.job.log_path, self.lines)
        if self.staged:
            self.staged.written.wait()

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run in MLflow, as FINISHED, FAILED or KILLED: the latter two soon, since ranks are to start anew."""
        if self.record:
            self.record.close(status, timeout_s=30 if status == "FINISHED" else 5)

    def _resume(self, checkpoints: Sequence[str]) -> dict[str, Any]:
        for folder in checkpoints:
            try:
                return self.engine.load(folder)
            except CheckpointError as error:
                if self.rank == 0:
                    print(f"[train] skipped a checkpoint: {error}", flush=True)
        if checkpoints:
            raise CheckpointError(
                f"{self.job.run_dir}: none of its {len(checkpoints)} checkpoints can be read; bring one back from a "
                "milestone, or choose another run_dir"
            )
        return {"samples": 0, "skipped_steps": 0}

    def _feed(self) -> ReadAhead:
        place = self.job, self.rank, self.world, self.samples // self.step.total, self.diffusion.draw
        pin = self.engine.device.type == "cuda"
        if self.job.raw:
            return OnlineFeed(*place, self.host.tables(self.raw_begun), self.raw_begun, pin)
        return Feed(*place, pin)

    def _train(self, feed: ReadAhead) -> None:
        self._begin_interval(feed)
        every = self.job.train.checkpoint_every_samples
        known, steps = {""}, iter(feed)
        while self.samples < self.job.samples:
            looks, wants_stop = self._train_step(next(steps))
            self.host.beat(self.samples)
            due = _crossed(self.samples, self.step.total, every) or self.samples == self.job.samples or wants_stop
            if looks and (news := self.host.news()) not in known:
                known.add(news)  # and training goes on until it comes to that
                due = True
                if self.record:
                    print(f"[train] {news}: all ranks write a checkpoint", flush=True)
            wants_log = time.monotonic() - self.begun > self.job.train.log_every_s
            if wants_log or due:
                self._log(feed)
            if due:
                self._checkpoint(feed)
                self._begin_interval(feed)
            if wants_stop:
                return

    def _train_step(self, batches: Iterator[Batch]) -> tuple[bool, bool]:
        """One step; returns whether to look for preemption and whether a rank is to stop, the same on all ranks.

        One all-reduce carries those votes and what the log tells of losses: their sum and number in each stream and
        quarter of the timesteps. It is read once `update`, which waits for the gradient, has let it arrive.
        """
        tally = torch.zeros(len(STREAMS) * BUCKETS + 1, 2, device=self.engine.device)
        own = []  # what this rank trains on, for a diagnosis
        for batch in batches:
            own.append(f"{batch.slot.stream} {batch.sample[0]}-{batch.sample[-1]}")
            losses, timesteps = self._learn(batch)
            add_losses(tally, batch.slot.stream, losses, timesteps, of=self.diffusion.config.timesteps)
        looks = self.rank == 0 and time.monotonic() - self.looked > LOOK_S
        votes = torch.tensor([looks, self.host.wants_stop()], dtype=torch.float32)
        tally[-1] = votes.to(tally.device, non_blocking=True)
        torch.distributed.all_reduce(tally)
        arrived = torch.empty(tally.shape, pin_memory=tally.is_cuda).copy_(tally, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if tally.is_cuda else None
        self.samples += self.step.total
        train = self.job.train
        rate, decay = learning_rate(train, self.samples), ema_decay(train, self.samples, self.step.total)
        applied = self.engine.update(rate, decay)
        if copied:
            copied.synchronize()
        self._count(applied, own, arrived)
        look, stop = arrived[-1].tolist()
        if look:
            self.looked = time.monotonic()
        self.tallies.append(arrived[:-1])
        return look > 0, stop > 0

    def _count(self, applied: bool, own: list[str], tally: Tensor) -> None:
        """Keeps count of the steps that were left out, and gives up with a diagnosis after too many in a row."""
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.skipped_steps += not applied
        if self.skipped_in_a_row >= self.job.train.max_skipped_steps:
            sums = tally[:-1, 0].view(len(STREAMS), BUCKETS)
            of = self.diffusion.config.timesteps
            bad = [f"{stream} timesteps {first_timestep(place, of)}" for stream, row in zip(STREAMS, sums, strict=True)
                   for place, value in enumerate(row.tolist()) if not math.isfinite(value)]  # fmt: skip
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite; the last at "
                f"{self.samples:,} samples, learning rate {learning_rate(self.job.train, self.samples):.3g}, "
                f"losses not finite: {', '.join(bad) or 'none, so they overflow in the backward pass'}; rank "
                f"{self.rank} trained on {', '.join(own)}. The last checkpoint is from before: try a lower "
                "train.learning_rate or train.clip_norm, another train.precision, or look for these samples' rows"
            )

    def _learn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one slot's samples; returns their losses [b] and timesteps [b]."""
        dropout_seed = generator(self.job.seed, batch.slot.stream, "dropout", batch.sample[0]).integers(2**31)
        torch.manual_seed(int(dropout_seed))
        scale, engine = self.sources[batch.slot.stream].info.scale, self.engine
        inputs = loss_inputs(batch, scale, self.text, engine.device, engine.dtype)
        weight = torch.full((), batch.slot.weight, device=engine.device)
        return self.passes(weight, *inputs), inputs[2]

    def _pass(self, weight: Tensor, *inputs: Tensor) -> Tensor:
        """Forward and backward of what loss_inputs gives; losses (eq. 5), fp32 [b]."""
        engine = self.engine
        losses = self.diffusion.loss(lambda z, t, s: engine.unet(z.to(engine.dtype), t, s), *inputs)
        engine.backward(losses.mean(), weight)
        return losses.detach()

    def _begin_interval(self, feed: ReadAhead) -> None:
        self.tallies.clear()
        self.begun, self.waited_s = time.monotonic(), feed.waited_s

    def _log(self, feed: ReadAhead) -> None:
        """One line of what happened since the last one; the same numbers go to MLflow and train/log.jsonl."""
        if self.record:
            seconds = time.monotonic() - self.begun
            rates = {f"{stream}_per_s": len(self.tallies) * n / seconds for stream, n in self.step.samples.items()}
            line = {
                **losses_of(torch.stack(self.tallies).sum(0), "loss", of=self.diffusion.config.timesteps),
                **rates,
                "samples_per_s": sum(rates.values()),
                "data_wait_share": (feed.waited_s - self.waited_s) / seconds,
                "gradient_norm": self.engine.gradient_norm(),
                "learning_rate": learning_rate(self.job.train, self.samples),
                "memory_gib": _memory_gib(self.engine.device),
                "mfu": self._mfu(seconds),
                "skipped_steps": self.skipped_steps,
                "restarts": self.restarts,
                "seconds": seconds,
            }
            if self.staged:
                line["checkpoint_stall_s"] = self.stall_s
                if self.staged.written.is_set():
                    line["checkpoint_s"] = self.staged.write_s
            self._tell(line)
        self._begin_interval(feed)

    def _mfu(self, seconds: float) -> float:
        """Counted FLOPs over the card's limit, of ranks on average; 0 where the limit is not known."""
        if self.engine.device.type != "cuda":
            return 0.0
        return mfu(len(self.tallies) * self.rank_flops, seconds, torch.cuda.get_device_name()) or 0.0

    def _tell(self, line: dict[str, float]) -> None:
        print(
            f"[train] {self.samples:,}/{self.job.samples:,} samples  "
            f"loss images {line['loss_images']:.3f} videos {line['loss_videos']:.3f}  "
            f"{line['samples_per_s']:.1f} samples/s  waiting for data {line['data_wait_share']:.1%}  "
            f"memory {line['memory_gib']:.1f} GiB"
            + (f"  {self.skipped_steps} steps skipped" if self.skipped_steps else ""),
            flush=True,
        )
        self.lines.append({"samples": self.samples, "step": self.samples // self.step.total} | line)
        self._write_log_if_cheap()
        assert self.record
        self.record.metrics(line, self.samples)
        self.host.observe({"samples": self.samples} | line)

    def _write_log_if_cheap(self) -> None:
        """Writes the whole log anew, if that takes less than a hundredth of the time since it was last done."""
        begun = time.monotonic()
        if begun > self.next_write:
            storage.write_lines(self.job.log_path, self.lines)
            self.next_write = begun + 100 * (time.monotonic() - begun)

    def _checkpoint(self, feed: ReadAhead) -> None:
        """Starts the writing of a checkpoint, once the one before, whose memory it uses again, is written."""
        begun = time.monotonic()
        if self.staged:
            self.staged.written.wait()
        state = {"samples": self.samples, "skipped_steps": self.skipped_steps, "job": asdict(self.job)}
        if self.job.raw:
            state["raw_begun"] = self._furthest(feed.begun)
        self.staged = self.engine.stage(state)
        train = self.job.train
        milestone = _crossed(self.samples, self.samples - self.checkpointed, train.milestone_every_samples)
        self.host.report(self.staged, self.samples, milestone or self.samples == self.job.samples)
        self.checkpointed = self.samples
        self.stall_s = time.monotonic() - begun

    def _furthest(self, begun: Mapping[Stream, int]) -> dict[Stream, int]:
        """The raw shards that any rank has begun."""
        counts = torch.tensor([begun[stream] for stream in STREAMS], device=self.engine.device)
        torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        return dict(zip(STREAMS, counts.tolist(), strict=True))


def _crossed(samples: int, before: int, every: int) -> bool:
    """Whether a multiple of `every` lies within the last `before` samples."""
    return samples // every > (samples - before) // every


def _read_log(path: str, samples: int) -> list[dict]:
    """The lines up to the checkpoint that training resumes from."""
    return [line for line in storage.read_lines(path) if line["samples"] <= samples] if storage.exists(path) else []


def _count_start(job: TrainJob, samples: int, ranks: int) -> int:
    """Notes that ranks were started, and returns how often they had been before."""
    path = storage.join(job.folder, "starts.jsonl")
    before = storage.read_lines(path) if storage.exists(path) else []
    storage.write_lines(path, [*before, {"time": time.time(), "samples": samples, "ranks": ranks}])
    return len(before)


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
