"""Multi-frame training (paper 3.3): which samples every rank trains on, and with what weight.

A step trains on a fixed number of images (f = 1) and of videos. One share in `image_every` of its loss is the mean
over its images, the rest the mean over its videos, whatever the batch sizes. Who computes what is a question of speed
alone: both schedules sum the same weighted losses of the same samples, on any number of ranks.

`rank`, the paper's: the step has `slots`, one in `image_every` of images, and every rank takes the same number of
them. With as many ranks as slots one GPU in eight is an image GPU; fewer ranks take several slots after each other.
`packed`: every rank takes its even part of both streams, so that none waits where the two kinds of slot differ in
work. It is also how a number of ranks trains that does not divide the slots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from t2v.config import MixConfig, Stream


@dataclass(frozen=True)
class Slot:
    """A micro-batch: samples [first, first + count) of the step's samples of `stream`.

    `weight` is what its mean loss counts in the step's loss; all the weights of a step add up to 1.
    """

    stream: Stream
    first: int
    count: int
    weight: float


@dataclass(frozen=True)
class LanePart:
    """Samples [first, end) of the `lane_count` samples that a lane gives to every step."""

    stream: Stream
    lane: int
    first: int
    end: int
    lane_count: int


@dataclass(frozen=True)
class Step:
    """The samples of a step, and how ranks share them.

    The slots of a stream are its lanes: lane i reads its own part of the shards and gives the step's samples
    [bounds[i], bounds[i + 1]) of that stream, so the order of the data knows nothing of ranks.
    """

    mix: MixConfig
    frames: Mapping[Stream, int]
    bounds: Mapping[Stream, tuple[int, ...]]

    @property
    def samples(self) -> dict[Stream, int]:
        """Samples of each stream in a step."""
        return {stream: bounds[-1] for stream, bounds in self.bounds.items()}

    @property
    def total(self) -> int:
        """Samples of both streams in a step."""
        return sum(self.samples.values())

    @property
    def shares(self) -> dict[Stream, float]:
        """What the mean loss of each stream counts."""
        return {"images": 1 / self.mix.image_every, "videos": 1 - 1 / self.mix.image_every}

    def is_packed(self, world: int) -> bool:
        """Whether so many ranks share both streams evenly, in place of whole slots."""
        return self.mix.schedule == "packed" or self.mix.slots % world > 0

    def of_rank(self, rank: int, world: int) -> tuple[Slot, ...]:
        """The micro-batches of one rank, in order; every rank has as many (ValueError if samples do not suffice)."""
        return self._packed(rank, world) if self.is_packed(world) else self._whole_slots(rank, world)

    def lane_parts(self, slot: Slot) -> list[LanePart]:
        """The lanes that the samples of a slot come from, in order."""
        parts = []
        bounds, end = self.bounds[slot.stream], slot.first + slot.count
        for lane, (a, b) in enumerate(pairwise(bounds)):
            if a < end and slot.first < b:
                parts.append(LanePart(slot.stream, lane, max(a, slot.first) - a, min(b, end) - a, b - a))
        return parts

    def work(self, world: int, cost: Mapping[Stream, float]) -> list[float]:
        """What each rank computes in a step, of which one sample of a stream costs `cost`."""
        return [sum(slot.count * cost[slot.stream] for slot in self.of_rank(rank, world)) for rank in range(world)]

    def idle_share(self, world: int, cost: Mapping[Stream, float]) -> float:
        """The share of their time for which ranks wait for the one with the most work."""
        work = self.work(world, cost)
        return 1 - sum(work) / (max(work) * world)

    def _whole_slots(self, rank: int, world: int) -> tuple[Slot, ...]:
        every = self.mix.image_every
        slots: list[tuple[Stream, int, int]] = []
        for index in range(self.mix.slots):
            images = -(-index // every)  # slots of images before this one
            stream: Stream = "videos" if index % every else "images"
            lane = index - images if index % every else images
            first, end = self.bounds[stream][lane : lane + 2]
            slots.append((stream, first, end))
        pieces = max(self._pieces(stream, end - first) for stream, first, end in slots)
        return tuple(piece for slot in slots[rank::world] for piece in self._cut(*slot, pieces))

    def _packed(self, rank: int, world: int) -> tuple[Slot, ...]:
        slots: list[Slot] = []
        for stream, count in self.samples.items():
            if count < world:
                raise ValueError(f"train.mix: {count} {stream} a step cannot be shared by {world} ranks")
            pieces = self._pieces(stream, -(-count // world))
            slots += self._cut(stream, count * rank // world, count * (rank + 1) // world, pieces)
        return tuple(slots)

    def _pieces(self, stream: Stream, count: int) -> int:
        """Into how many micro-batches so many samples must be cut."""
        most = self.mix.micro_frames
        return 1 if most is None else -(-count // max(1, most // self.frames[stream]))

    def _cut(self, stream: Stream, first: int, end: int, pieces: int) -> list[Slot]:
        if end - first < pieces:
            raise ValueError(
                f"train.mix.micro_frames: {self.mix.micro_frames} would cut {end - first} {stream} into {pieces}, "
                "as many micro-batches as others take; raise it, or bring the two batch sizes closer"
            )
        cuts = [first + (end - first) * piece // pieces for piece in range(pieces + 1)]
        weight = self.shares[stream] / self.samples[stream]
        return [Slot(stream, a, b - a, (b - a) * weight) for a, b in pairwise(cuts)]


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
    return Step(
        mix,
        {"images": 1, "videos": frames},
        {stream: tuple(samples[stream] * i // lanes[stream] for i in range(lanes[stream] + 1)) for stream in lanes},
    )
