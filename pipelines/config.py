"""What the data, sampling and scoring pipelines can be told; every default is the paper's (4.1.1)."""

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from pipelines.columns import column_map
from t2v.bounds import above_zero, at_least, finite, fraction


@dataclass
class CorpusConfig:
    """The miniature's own corpus: captioned clips and pictures of moving shapes, served on loopback."""

    clips: int = 192
    pictures: int = 384
    test_clips: int = 48
    width: int = 192
    height: int = 128
    picture_only_colours: list[str] = field(default_factory=lambda: ["purple", "cyan"])
    faults: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, self, "clips", "pictures", "test_clips", "seed")
        at_least(2, self, "width", "height")
        for name in ("width", "height"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}: {getattr(self, name)} is odd, but H.264 needs even sizes")
        if self.faults and not (self.clips and self.pictures):
            raise ValueError("faults: true, but these rows need at least one clip and one picture")


@dataclass
class StreamConfig:
    """One input: a CSV, TSV, Parquet or JSONL manifest of URLs and captions.

    `columns` names a built-in column map (webvid, laion2b-en, msrvtt, generic) or is one: "url=link,caption=title".
    """

    manifest: str | None = None
    columns: str = "webvid"
    shard_rows: int = 100

    def __post_init__(self) -> None:
        at_least(1, self, "shard_rows")
        column_map(self.columns)


@dataclass
class FetchConfig:
    """Bounds on what a stranger's server may do to a download, and on what we do to it.

    `concurrency` and `per_host` count downloads of one shard; `timeout_s` bounds one attempt. The addresses of
    `allow_networks` ("127.0.0.0/8") are reached although they are not public. `cpus_per_task` tells Ray how many
    shards to download at once beside the encoders.
    """

    concurrency: int = 64
    per_host: int = 16
    timeout_s: float = 60.0
    retries: int = 2
    max_bytes: int = 500_000_000
    max_redirects: int = 5
    max_pixels: int = 100_000_000
    allow_networks: list[str] = field(default_factory=list)
    honour_opt_out: bool = True
    cpus_per_task: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, self, "concurrency", "per_host", "max_bytes", "max_pixels")
        at_least(0, self, "retries", "max_redirects")
        above_zero(self, "timeout_s", "cpus_per_task")
        for network in self.allow_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"allow_networks: {error}; a network is written like 127.0.0.0/8") from None


@dataclass
class EncodeConfig:
    """The actors that decode media and hold the VAE."""

    workers: int = 8
    gpus_per_worker: float = 1
    cpus_per_worker: float = 4
    batch_frames: int = 64

    def __post_init__(self) -> None:
        at_least(1, self, "workers", "batch_frames")
        at_least(0, self, "gpus_per_worker")
        above_zero(self, "cpus_per_worker")


@dataclass
class ClipFilters:
    """What a decoded clip or picture must be like to be kept; None, 0 or false leaves a filter off.

    A window with a shot cut inside, which TransNetV2 is sure of by `cut_probability`, is refused, and up to `cut_tries`
    other places of its video are tried. It looks at every frame of a window (seconds on a CPU), or only at windows in
    which two successive frames differ by `cut_screen` levels of 255: 8 passes over dissolves, but finds hard cuts.
    Motion is the mean difference of a clip's successive frames in levels of 255. `max_nsfw` bounds Open-NSFW's
    probability. `scorer` names a function of installed code, "module:function", from frames uint8 [f, y, x, 3] to a
    number, of which `max_score` is the greatest allowed. Near duplicates of an earlier row have perceptual hashes that
    differ from its own by at most `duplicate_bits` of 64 bits, within a shard or, by a second pass, across all shards.
    """

    cut_free: bool = False
    cut_probability: float = 0.5
    cut_tries: int = 4
    cut_screen: float = 0.0
    min_motion: float = 0.0
    max_motion: float | None = None
    max_nsfw: float | None = None
    scorer: str | None = None
    max_score: float = 0.5
    duplicate_bits: int | None = None
    duplicates_across: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, "cut_tries", "cut_screen", "min_motion", "max_motion", "max_nsfw", "duplicate_bits")
        fraction(self, "cut_probability")
        finite(self, "max_score")
        if self.max_motion is not None and self.max_motion < self.min_motion:
            raise ValueError(f"max_motion: {self.max_motion} is below min_motion, {self.min_motion}")
        if self.duplicate_bits is not None and self.duplicate_bits > 16:
            raise ValueError(
                f"duplicate_bits: {self.duplicate_bits} of 64 is more than 16: unlike pictures would match"
            )
        if self.duplicates_across and self.duplicate_bits is None:
            raise ValueError("duplicates_across: true, but duplicate_bits is not set")
        if self.scorer is not None and not all(self.scorer.partition(":")):
            raise ValueError(f"scorer: {self.scorer!r} is not written like 'module:function'")


@dataclass
class DataConfig:
    """From URL lists to latent shards: the middle square, 16 frames at 3 fps (paper 4.1.1).

    Of each video up to `windows` windows are taken that do not overlap.
    """

    size: int = 256
    frames: int = 16
    fps: float = 3.0
    keep_variance: bool = True
    videos: StreamConfig = field(default_factory=StreamConfig)
    images: StreamConfig = field(default_factory=lambda: StreamConfig(columns="laion2b-en", shard_rows=1000))
    fetch: FetchConfig = field(default_factory=FetchConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    windows: int = 1
    filters: ClipFilters = field(default_factory=ClipFilters)

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size: {self.size} is no multiple of 8, the VAE's downsampling")
        at_least(1, self, "frames", "windows")
        above_zero(self, "fps")
        finite(self, "fps")


@dataclass
class EvaluateConfig:
    """Scores against real test clips (paper 4.1.1: 2,048 clips of MSR-VTT, one caption each)."""

    test: str | None = None
    columns: str = "msrvtt"
    clips: int = 2048
    seed: int = 0
    networks: Literal["standins", "none"] = "standins"
    judge_shapes: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "clips")
        at_least(0, self, "seed")
        column_map(self.columns)
