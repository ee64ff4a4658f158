"""What the model, training and sampling can be told; defaults are the paper's (arXiv 2308.06571) where it has them."""

import math
from dataclasses import dataclass, field
from typing import Literal

from t2v.bounds import above_zero, at_least, finite, fraction

Stream = Literal["images", "videos"]


@dataclass
class UNetConfig:
    """Shape of the spatio-temporal UNet; the defaults are the published 1.411 B parameters (paper 3.2, 4.1.2)."""

    channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    layers_per_block: int = 2
    head_dim: int = 64
    text_dim: int = 1024
    norm_groups: int = 32
    dropout: float = 0.1

    def __post_init__(self) -> None:
        at_least(1, self, "channels", "layers_per_block", "head_dim", "text_dim", "norm_groups")
        fraction(self, "dropout")
        if not self.block_out_channels or min(self.block_out_channels) < 1:
            raise ValueError(f"block_out_channels: {self.block_out_channels} is no list of widths, each at least 1")
        for width in self.block_out_channels:
            for name, unit in (("norm_groups", self.norm_groups), ("head_dim", self.head_dim)):
                if width % unit:
                    raise ValueError(f"block_out_channels: {width} is no multiple of {name} ({unit})")


@dataclass
class TextConfig:
    """The frozen text tower (paper 3.1): OpenCLIP ViT-H/14's text half, 23 of 24 layers and the final norm.

    `weights` is an open_clip checkpoint, or the folder of a released model (text_encoder/ and tokenizer/), which has
    the 23 layers alone. With `weights: random` the tower keeps its random start, drawn from `seed` and frozen: its
    token states still tell words and their order apart, which is all that the miniature needs. `width`, `heads` and
    `layers` shape that tower alone; `architecture` shapes the checkpoint's.
    """

    weights: str | None = None
    architecture: str = "ViT-H-14"
    skip_layers: int = 1
    width: int = 1024
    heads: int = 16
    layers: int = 24
    context: int = 77
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "width", "heads", "layers", "context")
        at_least(0, self, "skip_layers", "seed")
        if self.weights == "random" and self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads ({self.heads})")


@dataclass
class DiffusionConfig:
    """Forward process and target (paper 3.1, eq. 5; betas: reference schedule `scaled_linear` of SD 2.1).

    The paper does without the options below `caption_dropout`. `prediction: v` learns the velocity (Salimans and Ho,
    2202.00512). `min_snr_gamma`, often 5, bounds the weight of easy timesteps (Hang et al., 2303.09556).
    `offset_noise`, often 0.1, is the deviation of noise that a channel of a frame shares, so that its mean is learnt
    too. `zero_terminal_snr` leaves no signal at the last timestep, where sampling begins (Lin et al., 2305.08891);
    with `min_snr_gamma` that timestep has weight zero and learns from its neighbours alone.
    """

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    caption_dropout: float = 0.1
    prediction: Literal["eps", "v"] = "eps"
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in ("eps", "v"):
            raise ValueError(f"prediction: {self.prediction!r} is none of eps, v")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "zero_terminal_snr: with prediction eps the last timestep's input is its own target, nothing is learnt "
                "there and no sample can start from it; set prediction to v"
            )
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma: {self.min_snr_gamma} is not above 0; null turns it off")
        if not 0 <= self.offset_noise < math.inf:
            raise ValueError(f"offset_noise: {self.offset_noise} is not a deviation, 0 turns it off")
        fraction(self, "caption_dropout")
        at_least(2, self, "timesteps")
        if not 0 < self.beta_start < self.beta_end < 1:
            raise ValueError(f"beta_start, beta_end: {self.beta_start}, {self.beta_end} do not rise within (0, 1)")


@dataclass
class ModelConfig:
    """The three networks of Fig. 2. `vae` is a diffusers folder or a Stable Diffusion checkpoint.

    `start` is what training starts from: Stable Diffusion 2.1, of which the spatial part is taken (paper 4.1.3), or a
    text-to-video model, each as a diffusers folder or as the file it was published in; without it, random weights.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: str | None = None
    text: TextConfig = field(default_factory=TextConfig)
    start: str | None = None


@dataclass
class MixConfig:
    """Multi-frame training (paper 3.3). A step has `slots`, one in `image_every` of images, the others of videos, and
    the streams count in its loss as they do among the slots. A slot holds `frames_per_slot` frames of either stream,
    so that all do the same work, unless the two batch sizes are given outright. `schedule` is how ranks share a step
    (t2v/mix.py); `micro_frames` bounds the frames of one forward and backward pass, and with it the memory.
    """

    slots: int = 80
    image_every: int = 8
    frames_per_slot: int = 320
    images_per_step: int | None = None
    videos_per_step: int | None = None
    schedule: Literal["rank", "packed"] = "rank"
    micro_frames: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "slots", "frames_per_slot", "images_per_step", "videos_per_step", "micro_frames")
        at_least(2, self, "image_every")
        if self.slots % self.image_every:
            raise ValueError(f"slots: {self.slots} is no multiple of image_every ({self.image_every})")


@dataclass
class LoraConfig:
    """Low-rank updates of chosen weights (Hu et al., 2106.09685), as peft's LoraConfig has them.

    `targets` are endings of the names of the linear layers and convolutions that get one: by default every attention's
    projections, over space and over time. An update counts `alpha / rank`.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self) -> None:
        at_least(1, self, "rank")
        above_zero(self, "alpha")
        finite(self, "alpha")
        if not self.targets:
            raise ValueError("targets: there must be at least one name of a layer, for example to_q")


@dataclass
class TrainConfig:
    """Training (paper 4.1.3): 267 k steps of 4,600 samples, images and videos together.

    What the backward pass computes once more on a GPU is norms and activations, or with `recompute: gates` the widest
    layers too: less than two thirds of the memory (2.5 GiB a clip in place of 4.0), at nine tenths of the speed.
    `graphs` has a GPU replay each micro-batch's passes as a CUDA graph: small ones, of fewer than about 150 frames on
    an H100, would wait for the host to launch them.
    `trained: temporal` leaves the layers that an image UNet has as they are in `model.start`, `trained: lora` all of
    that model but for a low-rank update of chosen layers (`lora`).

    With `min_workers` training goes on with fewer workers where a cluster cannot give all, and with more once it can,
    which is seen every `grow_every_s`. The last `keep_checkpoints` are kept, and at every milestone a copy of one, with
    its model as a diffusers folder. `max_skipped_steps` without a finite gradient in a row end the run; so do
    `max_failures` of workers. Ranks that take no step for `hang_s`, in which a checkpoint must be written, are ended
    and started anew.

    `feed: online` trains without latents: raw shards are downloaded and encoded meanwhile, by `data.fetch` and
    `data.encode` workers, whose GPUs may be parts of the ranks' own (`gpus_per_worker: 0.9` here, 0.1 there).

    Of each stream, rows are shuffled within windows of `shuffle_rows`, which the ranks together hold in memory twice,
    and `held_out_rows` are kept from training. A shard that is missing or corrupt ends the run, unless other rows are
    to take its place (`bad_shards: skip`).
    """

    workers: int = 80
    min_workers: int | None = None
    grow_every_s: float = 180.0
    gpus_per_worker: float = 1
    cpus_per_worker: int = 8
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    trained: Literal["all", "temporal", "lora"] = "all"
    lora: LoraConfig = field(default_factory=LoraConfig)
    recompute: Literal["activations", "gates"] = "activations"
    graphs: bool = False
    learning_rate: float = 5e-5
    final_learning_rate: float = 0.0
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_samples: int = 100_000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_halflife_samples: float = 10_000_000
    samples: int = 1_228_200_000
    log_every_s: float = 30.0
    checkpoint_every_samples: int = 2_000_000
    keep_checkpoints: int = 3
    milestone_every_samples: int = 10_000_000
    max_skipped_steps: int = 50
    max_failures: int = 10
    hang_s: float = 900.0
    shuffle_rows: int = 20_000
    held_out_rows: int = 0
    feed: Literal["latents", "online"] = "latents"
    bad_shards: Literal["stop", "skip"] = "stop"
    mix: MixConfig = field(default_factory=MixConfig)

    def __post_init__(self) -> None:
        at_least(1, self, "workers", "cpus_per_worker", "samples", "shuffle_rows")
        at_least(1, self, "checkpoint_every_samples", "keep_checkpoints", "milestone_every_samples")
        at_least(1, self, "min_workers", "max_skipped_steps")
        at_least(0, self, "gpus_per_worker", "warmup_samples", "weight_decay", "log_every_s", "final_learning_rate")
        at_least(0, self, "max_failures", "held_out_rows")
        above_zero(self, "learning_rate", "clip_norm", "ema_halflife_samples", "hang_s", "grow_every_s")
        finite(self, "learning_rate", "weight_decay")
        if (self.min_workers or 0) > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers ({self.workers})")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"gpus_per_worker: {self.gpus_per_worker} is neither whole nor a part of one GPU")
        if self.feed == "online" and self.held_out_rows:
            raise ValueError(
                f"held_out_rows: {self.held_out_rows} rows are to be kept as latents, but with feed online there are "
                "none; set held_out_rows to 0, or feed to latents"
            )
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"precision: {self.precision} needs ZeRO, which keeps fp32 weights; set zero_stage to 1, 2 or 3"
            )
        if self.graphs and not (self.zero_stage in (1, 2) and self.precision == "bf16"):
            raise ValueError(
                f"graphs: true needs zero_stage 1 or 2 and precision bf16, not {self.zero_stage} and {self.precision}"
            )
        fraction(self, "betas")


@dataclass
class SampleConfig:
    """Sampling (paper 4.1.2): DDIM, 50 steps, classifier-free guidance (9 in the public code)."""

    sampler: Literal["ddim", "dpm++", "unipc"] = "ddim"
    steps: int = 50
    guidance: float = 9.0
    frames: int = 16
    seed: int = 0
    batch: int = 8
    fps: int = 8
    workers: int = 8
    gpus_per_worker: float = 1
    cpus_per_worker: float = 1

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps: {self.steps} is not in 1..1000")
        at_least(1, self, "frames", "batch", "fps", "workers")
        at_least(0, self, "guidance", "seed", "gpus_per_worker")
        finite(self, "guidance")
        above_zero(self, "cpus_per_worker")
