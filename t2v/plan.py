"""What a training run will do: who computes what in a step, who waits, how long it takes and how much it writes."""

from dataclasses import dataclass

from t2v.cards import Card
from t2v.config import Stream
from t2v.cost import unet_cost
from t2v.job import STREAMS, TrainJob
from t2v.memory import count_weights

STATE_BYTES = 16  # a trained weight in a checkpoint: master, two moments and average in fp32
MODEL_BYTES = 4  # a weight of the exported model
UTILISATION = 0.35  # of a card's bf16 limit, measured on H100s (tests/benchmarks/results/train_h100.txt)


@dataclass(frozen=True)
class Plan:
    """Numbers of a run, of each rank where there is a tuple."""

    steps: int
    step_samples: dict[Stream, int]
    rank_samples: tuple[dict[Stream, int], ...]
    micro_batches: int
    rank_flops: tuple[float, ...]
    idle_share: float
    weights: int
    trained: int

    @property
    def checkpoint_bytes(self) -> int:
        return STATE_BYTES * self.trained

    @property
    def model_bytes(self) -> int:
        return MODEL_BYTES * self.weights

    def days(self, card: Card) -> float:
        """On such cards at UTILISATION of their limit: every step takes as long as its busiest rank."""
        return self.steps * max(self.rank_flops) / (UTILISATION * card.flops_per_s) / 86_400

    def lines(self) -> list[str]:
        """The plan in words, ranks of equal work together."""
        each = [" + ".join(f"{n} {stream}" for stream, n in part.items() if n) for part in self.rank_samples]
        work = dict(zip(each, self.rank_flops, strict=True))
        images, videos = (self.step_samples[stream] for stream in STREAMS)
        return [
            f"{self.steps:,} steps of {images:,} images and {videos:,} videos",
            *(
                f"{each.count(part)} ranks: {part} a step, {self.micro_batches} micro-batches, {flops / 1e12:.3g} TFLOP"
                for part, flops in work.items()
            ),
            f"idle {self.idle_share:.1%} of the ranks' time, waiting for the busiest",
            f"{self.trained:,} of {self.weights:,} parameters trained",
            f"a checkpoint takes {size_of(self.checkpoint_bytes)}, an exported UNet {size_of(self.model_bytes)}",
        ]


def sample_flops(job: TrainJob) -> dict[Stream, float]:
    """What one sample of each stream costs in training, forward and backward pass, in FLOPs.

    Frozen weights need no gradient; where only a part is trained, what that part's gradients cost is left out.
    """
    size, tokens = job.size // 8, job.model.text.context
    costs = {stream: unet_cost(job.model.unet, job.frames_of(stream), size, tokens) for stream in STREAMS}
    return {
        stream: float(cost.flops if job.train.trained == "all" else 2 * cost.forward) for stream, cost in costs.items()
    }


def make_plan(job: TrainJob) -> Plan:
    """The plan of a run with all its `train.workers`; ValueError where they cannot share a step."""
    step, world, cost = job.step, job.train.workers, sample_flops(job)
    ranks = [step.of_rank(rank, world) for rank in range(world)]
    weights, trained, _ = count_weights(job.model.unet, job.train)
    return Plan(
        steps=job.samples // step.total,
        step_samples=step.samples,
        rank_samples=tuple(
            {stream: sum(slot.count for slot in slots if slot.stream == stream) for stream in STREAMS}
            for slots in ranks
        ),
        micro_batches=len(ranks[0]),
        rank_flops=tuple(step.work(world, cost)),
        idle_share=step.idle_share(world, cost),
        weights=weights,
        trained=trained,
    )


def size_of(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
