"""The multi-frame schedule: weights, batch arithmetic, and independence of the number of ranks."""

import pytest
import torch

from t2v.config import MixConfig
from t2v.mix import plan_step


def test_the_papers_step_is_balanced() -> None:
    step = plan_step(MixConfig(), frames=16)
    assert step.samples == {"images": 3200, "videos": 1400}
    assert {(slot.stream, slot.count) for slot in step.slots} == {("images", 320), ("videos", 20)}


def test_the_printed_batch_sizes_are_kept_though_they_do_not_divide() -> None:
    step = plan_step(MixConfig(images_per_step=1400, videos_per_step=3200), frames=16)
    videos = [slot for slot in step.slots if slot.stream == "videos"]
    assert sum(slot.count for slot in videos) == 3200 and {slot.count for slot in videos} == {45, 46}
    assert [slot.first for slot in videos[:2]] == [0, videos[0].count]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_slot_is_taken_once_by_any_number_of_ranks(world: int) -> None:
    step = plan_step(MixConfig(slots=8, frames_per_slot=32), frames=16)
    taken = [slot for rank in range(world) for slot in step.of_rank(rank, world)]
    assert sorted(taken, key=step.slots.index) == list(step.slots)
    assert sum(slot.stream == "images" for slot in taken) == 1


def test_eight_ranks_are_one_image_rank_and_seven_video_ranks() -> None:
    step = plan_step(MixConfig(slots=8, frames_per_slot=16), frames=16)
    assert [step.of_rank(rank, 8)[0].stream for rank in range(8)] == ["images"] + 7 * ["videos"]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_gradient_is_one_eighth_images_whatever_the_batch_sizes(world: int) -> None:
    step = plan_step(MixConfig(slots=8, images_per_step=5, videos_per_step=23), frames=16)
    values = {"images": torch.randn(5, dtype=torch.float64), "videos": torch.randn(23, dtype=torch.float64)}
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    for rank in range(world):
        slots = step.of_rank(rank, world)
        for slot in slots:  # what DDP or ZeRO with accumulation does: mean over slots, then over ranks
            share = values[slot.stream][slot.first : slot.first + slot.count].mean()
            (weight * share / len(slots) / world).backward()
    lanes = [
        values["videos"][slot.first : slot.first + slot.count].mean() for slot in step.slots if slot.stream == "videos"
    ]
    expected = values["images"].mean() / 8 + torch.stack(lanes).mean() * 7 / 8
    torch.testing.assert_close(weight.grad, expected)


def test_impossible_steps_are_refused_with_a_way_out() -> None:
    step = plan_step(MixConfig(slots=8, frames_per_slot=32), frames=16)
    with pytest.raises(ValueError, match=r"3 ranks cannot share 8 slots evenly; use one of \[1, 2, 4, 8\].* 24"):
        step.of_rank(0, 3)
    with pytest.raises(ValueError, match="less than one video of 16 frames"):
        plan_step(MixConfig(slots=8, frames_per_slot=15), frames=16)
    with pytest.raises(ValueError, match="images_per_step: 1 leaves some of 2 slots empty"):
        plan_step(MixConfig(slots=16, images_per_step=1), frames=16)
