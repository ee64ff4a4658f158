"""What cannot be is refused in one line: which value, what was given, what is allowed."""

import math
from typing import Any

import pytest

from t2v.config import DiffusionConfig, MixConfig, SampleConfig, TextConfig, TrainConfig, UNetConfig

IMPOSSIBLE: list[tuple[type, dict[str, Any], str]] = [
    (UNetConfig, {"channels": 0}, "channels: 0 is below 1"),
    (UNetConfig, {"layers_per_block": 0}, "layers_per_block: 0 is below 1"),
    (UNetConfig, {"head_dim": 0}, "head_dim: 0 is below 1"),
    (UNetConfig, {"text_dim": -1}, "text_dim: -1 is below 1"),
    (UNetConfig, {"norm_groups": 0}, "norm_groups: 0 is below 1"),
    (UNetConfig, {"dropout": 1.5}, "dropout: 1.5 is not in [0, 1)"),
    (UNetConfig, {"dropout": math.nan}, "dropout: nan is not in [0, 1)"),
    (UNetConfig, {"block_out_channels": []}, "block_out_channels: [] is no list of widths, each at least 1"),
    (UNetConfig, {"block_out_channels": [320, -640]}, "block_out_channels: [320, -640] is no list of widths"),
    (UNetConfig, {"block_out_channels": [100]}, "block_out_channels: 100 is no multiple of norm_groups (32)"),
    *((TextConfig, {key: -3}, f"{key}: -3 is below 1") for key in ("width", "heads", "layers", "context")),
    (TextConfig, {"skip_layers": -1}, "skip_layers: -1 is below 0"),
    (TextConfig, {"seed": -4}, "seed: -4 is below 0"),
    (TextConfig, {"weights": "random", "width": 64, "heads": 5}, "width: 64 is no multiple of heads (5)"),
    (DiffusionConfig, {"timesteps": 0}, "timesteps: 0 is below 2"),
    (DiffusionConfig, {"caption_dropout": 1.0}, "caption_dropout: 1.0 is not in [0, 1)"),
    (DiffusionConfig, {"beta_start": 0.1, "beta_end": 0.1}, "beta_start, beta_end: 0.1, 0.1 do not rise within (0, 1)"),
    (MixConfig, {"slots": 0}, "slots: 0 is below 1"),
    (MixConfig, {"frames_per_slot": -1}, "frames_per_slot: -1 is below 1"),
    (MixConfig, {"image_every": 1}, "image_every: 1 is below 2"),
    (MixConfig, {"images_per_step": 0}, "images_per_step: 0 is below 1"),
    (MixConfig, {"videos_per_step": -8}, "videos_per_step: -8 is below 1"),
    (MixConfig, {"slots": 9}, "slots: 9 is no multiple of image_every (8)"),
    *((TrainConfig, {key: 0}, f"{key}: 0 is below 1") for key in ("workers", "cpus_per_worker", "samples")),
    *((TrainConfig, {key: 0}, f"{key}: 0 is below 1") for key in ("keep_checkpoints", "shuffle_rows")),
    (TrainConfig, {"checkpoint_every_samples": 0}, "checkpoint_every_samples: 0 is below 1"),
    (TrainConfig, {"milestone_every_samples": 0}, "milestone_every_samples: 0 is below 1"),
    *((TrainConfig, {key: -5}, f"{key}: -5 is below 0") for key in ("warmup_samples", "gpus_per_worker")),
    *((TrainConfig, {key: -0.5}, f"{key}: -0.5 is below 0") for key in ("log_every_s", "weight_decay")),
    (TrainConfig, {"log_every_s": math.nan}, "log_every_s: nan is not a number"),
    *((TrainConfig, {key: 0.0}, f"{key}: 0.0 is not above 0") for key in ("clip_norm", "ema_halflife_samples")),
    (TrainConfig, {"learning_rate": -1.0}, "learning_rate: -1.0 is not above 0"),
    (TrainConfig, {"learning_rate": math.inf}, "learning_rate: inf is not a finite number"),
    (TrainConfig, {"betas": (0.9, 1.0)}, "betas: (0.9, 1.0) is not in [0, 1)"),
    (TrainConfig, {"betas": (-0.1, 0.9)}, "betas: (-0.1, 0.9) is not in [0, 1)"),
    (SampleConfig, {"steps": 1001}, "steps: 1001 is not in 1..1000"),
    *((SampleConfig, {key: 0}, f"{key}: 0 is below 1") for key in ("frames", "batch", "fps", "workers")),
    *((SampleConfig, {key: -1}, f"{key}: -1 is below 0") for key in ("guidance", "seed", "gpus_per_worker")),
    (SampleConfig, {"guidance": math.nan}, "guidance: nan is not a number"),
    (SampleConfig, {"guidance": math.inf}, "guidance: inf is not a finite number"),
    (SampleConfig, {"cpus_per_worker": 0}, "cpus_per_worker: 0 is not above 0"),
]


@pytest.mark.parametrize(("config", "values", "said"), IMPOSSIBLE, ids=[said for _, _, said in IMPOSSIBLE])
def test_an_impossible_value_is_refused(config: type, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        config(**values)
    assert str(refused.value).startswith(said)


def test_the_bounds_themselves_are_allowed() -> None:
    TrainConfig(warmup_samples=0, gpus_per_worker=0, log_every_s=0, weight_decay=0, betas=(0, 0.999))
    TrainConfig(clip_norm=math.inf, ema_halflife_samples=math.inf)  # neither clips nor forgets
    SampleConfig(guidance=0, gpus_per_worker=0, seed=0)
    MixConfig(images_per_step=1, videos_per_step=1)
