"""What the data, sampling and scoring pipelines can be told; every default is the paper's (4.1.1)."""

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from pipelines.columns import column_map
from t2v.bounds import above_zero, at_least, finite


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
class DecodeConfig:
    """Bounds on the processes that decode strangers' files: seconds a row, and MiB of address space a process."""

    timeout_s: float = 120.0
    max_memory_mb: int = 4096

    def __post_init__(self) -> None:
        at_least(0.1, self, "timeout_s")
        finite(self, "timeout_s")
        at_least(1024, self, "max_memory_mb")  # the libraries alone take 400


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
class DataConfig:
    """From URL lists to latent shards: the middle square, 16 frames at 3 fps (paper 4.1.1)."""

    size: int = 256
    frames: int = 16
    fps: float = 3.0
    keep_variance: bool = True
    videos: StreamConfig = field(default_factory=StreamConfig)
    images: StreamConfig = field(default_factory=lambda: StreamConfig(columns="laion2b-en", shard_rows=1000))
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise ValueError(f"size: {self.size} is no multiple of 8, the VAE's downsampling")
        at_least(1, self, "frames")
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
