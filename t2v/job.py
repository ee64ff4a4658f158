"""What a training run is, and whether its data fit it; light, so that a mistake is told before torch is loaded."""

import math
from dataclasses import dataclass, field

from t2v import shards, storage
from t2v.config import DiffusionConfig, ModelConfig, SampleConfig, Stream, TrainConfig
from t2v.mix import Step, plan_step
from t2v.shards import LatentInfo, Shard

STREAMS: tuple[Stream, ...] = ("images", "videos")


@dataclass(frozen=True)
class Source:
    """Where the rows of a stream come from: `shards` in a folder, of latents or, with `train.feed: online`, raw.

    `digest` stands for all `rows`. Raw ones tell the first captions, what a cluster needs for them beside the ranks,
    as CPU and GPU, and how much of a GPU's memory each encoder takes.
    """

    info: LatentInfo
    path: str
    digest: str
    rows: int
    shards: int
    captions: tuple[str, ...] = ()
    needs: dict[str, float] = field(default_factory=dict)
    encoder_bytes: float = 0.0


@dataclass
class TrainJob:
    """All that a training run depends on; `raw` is there with `train.feed: online` alone."""

    run_dir: str
    seed: int
    size: int
    frames: int
    model: ModelConfig
    diffusion: DiffusionConfig
    train: TrainConfig
    sample: SampleConfig
    raw: dict[Stream, Source] | None = None

    @property
    def step(self) -> Step:
        return plan_step(self.train.mix, self.frames)

    def frames_of(self, stream: Stream) -> int:
        return 1 if stream == "images" else self.frames

    @property
    def samples(self) -> int:
        """`train.samples`, rounded up to whole steps."""
        return math.ceil(self.train.samples / self.step.total) * self.step.total

    @property
    def folder(self) -> str:
        """Where all that training makes lies."""
        return storage.join(self.run_dir, "train")

    @property
    def model_folder(self) -> str:
        return storage.join(self.folder, "model")

    def milestone_folder(self, samples: int) -> str:
        """Where what is kept of a milestone lies: its checkpoint, its model, and what that can do."""
        return storage.join(self.folder, "milestones", f"{samples:012d}")

    @property
    def exported_samples(self) -> int:
        """Samples that the exported model has seen, 0 if there is none."""
        path = storage.join(self.model_folder, "t2v.json")
        return storage.read_json(path)["info"]["samples"] if storage.exists(path) else 0

    @property
    def log_path(self) -> str:
        return storage.join(self.folder, "log.jsonl")

    @property
    def registry(self) -> str:
        """Where Ray Train notes which checkpoints there are."""
        return storage.join(self.folder, "checkpoint_manager_snapshot.json")

    @property
    def is_fresh(self) -> bool:
        """Whether there is no checkpoint yet, neither a half-written one nor a milestone's copy."""
        from t2v.checkpoint import newest_first  # and torch, which a job with nothing to do need not load

        return not newest_first(self.folder)

    @property
    def reads_start(self) -> bool:
        """Whether the weights of `model.start`, if it is set, are read: to begin with, or for the part not trained."""
        return self.is_fresh or self.train.trained != "all"

    def sources(self) -> dict[Stream, Source]:
        """What both streams train on; ValueError if they, the model and the number of workers do not go together."""
        self.step.of_rank(0, self.train.workers)
        start = self.model.start
        if start is None and self.train.trained != "all":
            raise ValueError(f"model.start is not set: train.trained {self.train.trained} trains a part of that model")
        if start is not None and self.reads_start and not storage.exists(start):
            raise FileNotFoundError(f"model.start: there is no file or folder {start}")
        found = self.raw or {stream: self._latents(stream) for stream in STREAMS}
        encoder = shards.encoder_id(self.model.vae)
        for stream in STREAMS:
            info = found[stream].info
            wanted = (self.model.unet.channels, self.frames_of(stream), self.size // 8, self.size // 8)
            if info.shape[2:] != wanted[2:]:
                raise ValueError(
                    f"data.size: {self.size}, but {found[stream].path} has latents of {info.shape[-1] * 8} pixels; "
                    f"jobs/prepare_data.py makes those of data.size and of data.also_sizes"
                )
            if info.shape != wanted:
                raise ValueError(f"{stream}: shards hold latents of {info.shape}, the configuration wants {wanted}")
            if info.encoder != encoder:
                raise ValueError(f"{stream}: shards were encoded by VAE {info.encoder}, but model.vae is {encoder}")
        return found

    def latent_shards(self, stream: Stream) -> list[Shard]:
        """What jobs/prepare_data.py has made of a stream."""
        return shards.list_shards(self.latents_folder(stream))

    def latents_folder(self, stream: Stream) -> str:
        """Where its latents of `size` lie: `latents` if it holds such or there are no others, else their own."""
        data_dir = storage.join(self.run_dir, "data")
        main, own = shards.latents_folder(data_dir, stream), shards.latents_folder(data_dir, stream, self.size)
        if not storage.exists(own):
            return main
        info = shards.info_in(main)
        return main if info and info.shape[-1] == self.size // 8 else own

    def _latents(self, stream: Stream) -> Source:
        found = self.latent_shards(stream)
        rows = sum(shard.rows for shard in found)
        return Source(found[0].info, self.latents_folder(stream), shards.digest_shards(found), rows, len(found))

    def prompts(self) -> list[str]:
        """A few captions of videos, for the samples along the way."""
        if self.raw:
            return list(self.raw["videos"].captions)
        return shards.read_rows(self.latent_shards("videos")[0].path, 0).caption[:8]
