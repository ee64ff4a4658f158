"""What the data, sampling and scoring pipelines can be told; defaults are the paper's (4.1.1) where it has them."""

import ipaddress
import math
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
class RowFilters:
    """Which rows of a manifest are worth a download, by what its columns say; each is off unless it is set.

    Sides are in pixels; the aspect ratio is that of the long side to the short one; `refuse_nsfw` lists labels such
    as NSFW and UNSURE, `languages` those that are kept, such as en, both in any case. A bound itself is kept, and so
    is a row whose value is missing. ValueError, before anything is fetched, for a filter whose column the manifest
    does not have.
    """

    min_side: int | None = None
    max_aspect: float | None = None
    max_punsafe: float | None = None
    refuse_nsfw: list[str] = field(default_factory=list)
    min_similarity: float | None = None
    max_watermark: float | None = None
    min_aesthetic: float | None = None
    languages: list[str] = field(default_factory=list)
    min_duration_s: float | None = None
    max_duration_s: float | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "min_side", "max_aspect")
        at_least(0, self, "max_punsafe", "max_watermark", "min_duration_s", "max_duration_s")
        at_least(-math.inf, self, "min_similarity", "min_aesthetic")  # anything but NaN


@dataclass
class StreamConfig:
    """One input: a list of URLs and captions, as one CSV, TSV, Parquet or JSONL file, a folder or a glob of them.

    `columns` names a built-in column map (webvid, laion2b-en, re-laion, msrvtt, generic, encoded) or is one:
    "url=link,caption=title". One with bytes ("encoded", or "bytes=jpg,caption=txt") is of Parquet files that hold the
    media themselves. With `drop_duplicates`, of the rows of one URL that pass the filters the first is kept;
    to find the others takes 24 bytes a row on the driver's disk for temporary files.
    """

    manifest: str | None = None
    columns: str = "webvid"
    shard_rows: int = 100
    filters: RowFilters = field(default_factory=RowFilters)
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "shard_rows")
        column_map(self.columns)


@dataclass
class FetchConfig:
    """Bounds on what a stranger's server may do to a download, and on what we do to it.

    `concurrency` and `per_host` count downloads of one shard; `timeout_s` bounds one attempt, `max_bytes` one body, and
    `max_bytes_under_way` those of an actor that are not complete yet, together, save one that may go beyond it, and
    `max_shard_bytes` those that a shard keeps in memory: what comes after is too_large. The addresses of
    `allow_networks` ("127.0.0.0/8") are reached although they are not public. At most `workers` actors, each of
    `cpus_per_task`, download a shard at a time beside the encoders. `engine` may be one of two packages, which keep
    fewer of these bounds (pipelines/download.py).
    """

    engine: Literal["builtin", "img2dataset", "video2dataset"] = "builtin"
    workers: int = 8
    concurrency: int = 64
    per_host: int = 16
    timeout_s: float = 60.0
    retries: int = 2
    max_bytes: int = 500_000_000
    max_bytes_under_way: int = 1 << 30
    max_shard_bytes: int = 1 << 32
    max_redirects: int = 5
    max_pixels: int = 100_000_000
    allow_networks: list[str] = field(default_factory=list)
    honour_opt_out: bool = True
    cpus_per_task: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, self, "workers", "concurrency", "per_host", "max_pixels")
        at_least(1, self, "max_bytes", "max_bytes_under_way", "max_shard_bytes")
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
    """The actors that decode media and hold the VAE.

    With `vae_workers` above 0 that many other actors hold it, of `gpus_per_worker` each, and those that decode take
    CPUs alone, of whatever machine.
    """

    workers: int = 8
    gpus_per_worker: float = 1
    cpus_per_worker: float = 4
    batch_frames: int = 64
    vae_workers: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "workers", "batch_frames")
        at_least(0, self, "gpus_per_worker", "vae_workers")
        above_zero(self, "cpus_per_worker")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"gpus_per_worker: {self.gpus_per_worker} is neither whole nor a part of one GPU")

    @property
    def vae_cpus(self) -> float:
        """CPUs of a VAE actor; 0 where it has a GPU, so that no encoder takes what one needs after a kill."""
        return 0 if self.gpus_per_worker else self.cpus_per_worker

    @property
    def gpus_needed(self) -> float:
        """Before the first shard is made; what is left of a GPU that several share serves nobody."""
        each, actors = self.gpus_per_worker, max(1, self.vae_workers)
        return math.ceil(actors / int(1 / each + 1e-6)) if 0 < each < 1 else each * actors

    @property
    def shards_at_once(self) -> int:
        """Of one worker: while one is unpacked or written, its GPU has frames of the other."""
        return 2 if self.gpus_per_worker else 1


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

    `also_sizes` are further sizes at which the same frames are encoded, into latents of their own, which training with
    such a `size` finds. Filters look at frames of `size` alone. To change them makes all shards anew.
    `raw` may keep what is downloaded, as it came, in WebDataset tars.
    Of each video up to `windows` windows are taken that do not overlap.
    """

    size: int = 256
    also_sizes: list[int] = field(default_factory=list)
    frames: int = 16
    fps: float = 3.0
    keep_variance: bool = True
    raw: Literal["none", "webdataset"] = "none"
    videos: StreamConfig = field(default_factory=StreamConfig)
    images: StreamConfig = field(default_factory=lambda: StreamConfig(columns="laion2b-en", shard_rows=1000))
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    windows: int = 1
    filters: ClipFilters = field(default_factory=ClipFilters)

    def __post_init__(self) -> None:
        for name, size in (("size", self.size), *(("also_sizes", also) for also in self.also_sizes)):
            if size < 8 or size % 8:
                raise ValueError(f"{name}: {size} is no multiple of 8, the VAE's downsampling")
        if len(set(self.also_sizes)) < len(self.also_sizes):
            raise ValueError(f"also_sizes: {self.also_sizes} names a size twice")
        at_least(1, self, "frames", "windows")
        above_zero(self, "fps")
        finite(self, "fps")

    @property
    def sizes(self) -> tuple[int, ...]:
        """All that are made, `size` first."""
        return (self.size, *self.also_sizes)


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
