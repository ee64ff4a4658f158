"""The multi-frame schedules: weights, batch arithmetic, and independence of the number of ranks."""

import pytest
import torch

from t2v.config import MixConfig
from t2v.mix import Slot, Step, plan_step

WORLDS = [1, 2, 3, 4, 8]


def all_slots(step: Step, world: int) -> list[Slot]:
    return [slot for rank in range(world) for slot in step.of_rank(rank, world)]


def test_the_papers_step_is_balanced() -> None:
    step = plan_step(MixConfig(), frames=16)
    assert step.samples == {"images": 3200, "videos": 1400}
    assert {(slot.stream, slot.count) for slot in all_slots(step, 80)} == {("images", 320), ("videos", 20)}
    assert step.idle_share(80, {"images": 1, "videos": 16}) == 0


def test_the_printed_batch_sizes_are_kept_though_they_do_not_divide() -> None:
    step = plan_step(MixConfig(images_per_step=1400, videos_per_step=3200), frames=16)
    videos = [slot for slot in all_slots(step, 80) if slot.stream == "videos"]
    assert sum(slot.count for slot in videos) == 3200 and {slot.count for slot in videos} == {45, 46}
    assert [slot.first for slot in videos[:2]] == [0, videos[0].count]


def test_packed_ranks_do_not_wait_where_image_ranks_would() -> None:
    """By frames, the printed sizes leave an image rank idle for four fifths of a step: a tenth of all ranks' time."""
    cost = {"images": 1.0, "videos": 16.0}
    idle = {
        schedule: plan_step(
            MixConfig(images_per_step=1400, videos_per_step=3200, schedule=schedule), frames=16
        ).idle_share(80, cost)
        for schedule in ("rank", "packed")
    }
    assert idle["rank"] == pytest.approx(1 - (1400 + 3200 * 16) / 80 / (46 * 16)) and 0.1 < idle["rank"] < 0.11
    assert idle["packed"] < 0.001


@pytest.mark.parametrize("schedule", ["rank", "packed"])
@pytest.mark.parametrize("micro_frames", [None, 32, 48])
@pytest.mark.parametrize("world", WORLDS)
def test_every_sample_is_taken_once_by_any_number_of_ranks(world: int, micro_frames: int | None, schedule: str) -> None:
    step = plan_step(MixConfig(slots=8, frames_per_slot=64, schedule=schedule, micro_frames=micro_frames), frames=16)
    slots = all_slots(step, world)
    for stream, count in step.samples.items():
        taken = [slot.first + index for slot in slots if slot.stream == stream for index in range(slot.count)]
        assert sorted(taken) == list(range(count))
    assert len({len(step.of_rank(rank, world)) for rank in range(world)}) == 1
    assert max(slot.count * step.frames[slot.stream] for slot in slots) <= (micro_frames or 64 * 8)


def test_eight_ranks_are_one_image_rank_and_seven_video_ranks() -> None:
    step = plan_step(MixConfig(slots=8, frames_per_slot=16), frames=16)
    assert [step.of_rank(rank, 8)[0].stream for rank in range(8)] == ["images"] + 7 * ["videos"]


@pytest.mark.parametrize("schedule", ["rank", "packed"])
@pytest.mark.parametrize("micro_frames", [None, 80])
@pytest.mark.parametrize("world", WORLDS)
def test_gradient_equals_the_single_process_reference(world: int, micro_frames: int | None, schedule: str) -> None:
    """A network's gradient, not a number's: 1/8 of the mean over images, 7/8 of the mean over videos."""
    mix = MixConfig(slots=8, images_per_step=9, videos_per_step=83, schedule=schedule, micro_frames=micro_frames)
    step = plan_step(mix, frames=16)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.SiLU(), torch.nn.Linear(12, 6)).double()
    data = {stream: torch.randn(count, 6, dtype=torch.float64) for stream, count in step.samples.items()}

    def loss(samples: torch.Tensor) -> torch.Tensor:
        return (network(samples) - samples).square().mean()

    (loss(data["images"]) / 8 + loss(data["videos"]) * 7 / 8).backward()
    expected = [weight.grad.clone() for weight in network.parameters()]
    network.zero_grad()
    for slot in all_slots(step, world):
        (loss(data[slot.stream][slot.first : slot.first + slot.count]) * slot.weight).backward()
    for weight, reference in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("world", [3, 8])
def test_parts_of_lanes_make_up_a_slot(world: int) -> None:
    step = plan_step(MixConfig(slots=8, frames_per_slot=80, schedule="packed", micro_frames=48), frames=16)
    for slot in all_slots(step, world):
        parts = step.lane_parts(slot)
        bounds = step.bounds[slot.stream]
        covered = [bounds[part.lane] + place for part in parts for place in range(part.first, part.end)]
        assert covered == list(range(slot.first, slot.first + slot.count))


def test_impossible_steps_are_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match="8 images a step cannot be shared by 9 ranks"):
        plan_step(MixConfig(slots=8, images_per_step=8, videos_per_step=90), frames=16).of_rank(0, 9)
    with pytest.raises(ValueError, match="micro_frames: 16 would cut 2 images into 4"):
        plan_step(MixConfig(slots=8, images_per_step=2, frames_per_slot=64, micro_frames=16), frames=16).of_rank(0, 8)
    with pytest.raises(ValueError, match="less than one video of 16 frames"):
        plan_step(MixConfig(slots=8, frames_per_slot=15), frames=16)
    with pytest.raises(ValueError, match="images_per_step: 1 leaves some of 2 slots empty"):
        plan_step(MixConfig(slots=16, images_per_step=1), frames=16)
