"""Losses are told by the quarters of the timesteps, whatever their number."""

import pytest
import torch

from t2v.job import STREAMS
from t2v.losses import BUCKETS, add_losses, losses_of


@pytest.mark.parametrize(("of", "firsts"), [(1000, [0, 250, 500, 750]), (500, [0, 125, 250, 375]), (10, [0, 3, 5, 8])])
def test_a_loss_is_told_under_the_first_timestep_of_its_quarter(of: int, firsts: list[int]) -> None:
    timesteps = torch.arange(of)
    tally = torch.zeros(len(STREAMS) * BUCKETS, 2)
    for stream in STREAMS:
        add_losses(tally, stream, timesteps.float(), timesteps, of)
    told = losses_of(tally, "loss", of)
    for first, end in zip(firsts, [*firsts[1:], of], strict=True):
        assert told[f"loss_videos_t{first:03}"] == pytest.approx((first + end - 1) / 2)
    assert told["loss_images"] == pytest.approx((of - 1) / 2) and len(told) == len(STREAMS) * (1 + BUCKETS)
