"""What a run will do, at the paper's size and on ranks that share a step unevenly."""

from dataclasses import replace

import pytest

from t2v.cards import find_card
from t2v.config import MixConfig
from t2v.job import TrainJob
from t2v.plan import make_plan, sample_flops
from tests.t2v.test_memory import published


def with_mix(job: TrainJob, **changes: object) -> TrainJob:
    return replace(job, train=replace(job.train, mix=MixConfig(**changes)))  # type: ignore[arg-type]


def test_the_papers_run_in_numbers() -> None:
    plan = make_plan(published(samples=1_228_200_000))
    assert plan.steps == 267_000 and plan.step_samples == {"images": 3200, "videos": 1400}
    assert len(plan.rank_flops) == 80 and plan.rank_samples[0] == {"images": 320, "videos": 0}
    assert plan.rank_samples[1] == {"images": 0, "videos": 20} and plan.micro_batches == 2
    assert plan.checkpoint_bytes == 16 * 1_411_233_860
    h100 = find_card("H100")
    assert h100 and 1 < plan.days(h100) < 30
    assert any("70 ranks: 20 videos a step, 2 micro-batches" in line for line in plan.lines())


def test_as_printed_image_ranks_wait_unless_the_step_is_packed() -> None:
    batches = {"images_per_step": 1400, "videos_per_step": 3200}
    whole, packed = (with_mix(published(), schedule=schedule, **batches) for schedule in ("rank", "packed"))
    cost = sample_flops(whole)
    image_work = 140 * cost["images"] / (46 * cost["videos"])
    assert make_plan(whole).idle_share == pytest.approx((1 - image_work) / 8, abs=0.01)
    assert make_plan(packed).idle_share < 0.06
    assert sum(make_plan(whole).rank_flops) == pytest.approx(sum(make_plan(packed).rank_flops))
    assert 16 * cost["images"] < cost["videos"]
