"""Multi-frame training (paper 3.3): which stream every rank trains on, and how much of it.

A step is made of `slots` equal shares of the gradient. One slot in `image_every` trains on images (f = 1), the
others on videos, and each averages the loss of its own samples; so the image stream weighs exactly
1 / image_every, whatever the batch sizes. With as many ranks as slots this is the paper's rule: one GPU in eight
is an image GPU. Fewer ranks take several slots after each other (gradient accumulation), and the step stays the
same sum: the batch depends on the configuration alone, never on the number of ranks.
"""

import math
from dataclasses import dataclass

from t2v.config import MixConfig, Stream


@dataclass(frozen=True)
class Slot:
    """One share of a step: samples [first, first + count) of the step's samples of `stream`.

    `lane` numbers the slots of one stream: a lane reads its own part of the shards.
    """

    stream: Stream
    lane: int
    first: int
    count: int


@dataclass(frozen=True)
class Step:
    """All slots of a step, in the order in which ranks take them, and each stream's samples and lanes."""

    slots: tuple[Slot, ...]
    samples: dict[Stream, int]
    lanes: dict[Stream, int]

    @property
    def total(self) -> int:
        """Samples of both streams in a step."""
        return sum(self.samples.values())

    def of_rank(self, rank: int, world: int) -> tuple[Slot, ...]:
        """The slots that one rank works through: slot m * world + rank in its micro-step m (ValueError if uneven)."""
        if len(self.slots) % world:
            fits = [count for count in range(1, len(self.slots) + 1) if len(self.slots) % count == 0]
            raise ValueError(
                f"train.workers: {world} ranks cannot share {len(self.slots)} slots evenly; use one of {fits}, "
                f"or set train.mix.slots to a multiple of {math.lcm(world, len(self.slots))}"
            )
        return self.slots[rank::world]


def plan_step(mix: MixConfig, frames: int) -> Step:
    """Lays out a step: `frames` per video, one per image; batch sizes from `frames_per_slot` unless given outright."""
    lanes: dict[Stream, int] = {"images": mix.slots // mix.image_every}
    lanes["videos"] = mix.slots - lanes["images"]
    videos_per_slot = mix.frames_per_slot // frames
    if videos_per_slot < 1 and mix.videos_per_step is None:
        raise ValueError(f"train.mix.frames_per_slot: {mix.frames_per_slot} is less than one video of {frames} frames")
    samples: dict[Stream, int] = {
        "images": mix.images_per_step or lanes["images"] * mix.frames_per_slot,
        "videos": mix.videos_per_step or lanes["videos"] * videos_per_slot,
    }
    for stream, count in samples.items():
        if count < lanes[stream]:
            raise ValueError(f"train.mix.{stream}_per_step: {count} leaves some of {lanes[stream]} slots empty")
    bounds = {stream: [samples[stream] * i // lanes[stream] for i in range(lanes[stream] + 1)] for stream in lanes}
    taken: dict[Stream, int] = {"images": 0, "videos": 0}
    slots = []
    for index in range(mix.slots):
        kind: Stream = "videos" if index % mix.image_every else "images"
        lane = taken[kind]
        taken[kind] += 1
        first, end = bounds[kind][lane : lane + 2]
        slots.append(Slot(kind, lane, first, end - first))
    return Step(tuple(slots), samples, lanes)
