"""Prompts -> videos: what is missing is sampled by a pool of Ray actors, what is there is left alone.

A video is known by its key, a hash of all that it depends on: the model, the prompt, its seed and the sampler's
settings. Nothing else enters: batches, workers and their order change no pixel by more than a rounding.

    samples/<key>.mp4    to be watched
    samples/<key>.npz    the exact frames, uint8 [f, y, x, 3] under the name `frames`: what scores are taken from
    samples/<key>.json   its record, written last: a video without one is made again
    samples/manifest.jsonl    all records, one a line

    b videos    f frames    y x pixels
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import numpy as np

from pipelines.prompts import Prompt, read_prompts
from t2v import storage
from t2v.config import DiffusionConfig, SampleConfig, TextConfig

_WATCHABLE_PIXELS = 256  # smaller videos are enlarged in their mp4
_VAE_DOWNSAMPLING = 8


class Sample(NamedTuple):
    """One generated video of a run folder."""

    key: str
    prompt: Prompt


def generate(
    run_dir: str, prompts: str | Sequence[Prompt], model_folder: str, config: SampleConfig, size: int
) -> list[Sample]:
    """Makes the videos of `prompts`, a file or a list, that `run_dir` lacks; all of them are returned, in order.

    `model_folder` is an exported model, `size` the height and width in pixels. Needs neither torch nor Ray when nothing
    is missing. FileNotFoundError without a model, ValueError for unreadable prompts.
    """
    prompts = read_prompts(prompts, config.seed) if isinstance(prompts, str) else prompts
    settings = sampler_settings(config, size)
    model = model_id(model_folder)
    samples = [Sample(sample_key(model, prompt, settings), prompt) for prompt in prompts]
    folder = storage.join(run_dir, "samples")
    there = {name.removesuffix(".json") for name in storage.listing(folder, ".json")}
    missing = {sample.key: sample for sample in samples if sample.key not in there}
    print(f"[generate] {len(samples) - len(missing)}/{len(samples)} videos", flush=True)
    if missing:
        _fill(folder, list(missing.values()), len(samples), model_folder, model, config, size)
    write_manifest(folder)
    return samples


def sampler_settings(config: SampleConfig, size: int) -> dict[str, Any]:
    """The settings that a video depends on; how the work is spread is not among them."""
    names = ("sampler", "steps", "guidance", "frames", "fps")
    return {name: getattr(config, name) for name in names} | {"size": size}


def model_id(folder: str) -> str:
    """Hash of all that an exported model turns prompts into frames by: the weights of UNet and VAE, and t2v.json."""
    parts = [storage.join(folder, part, "diffusion_pytorch_model.safetensors") for part in ("unet", "vae")]
    settings = storage.join(folder, "t2v.json")
    for path in (*parts, settings):
        if not storage.exists(path):
            raise FileNotFoundError(f"{path}: no such file, so {folder} is no exported model; run jobs/train.py first")
    config = storage.read_json(settings)
    return _hash([*map(storage.digest, parts), config["text"], config["diffusion"]])


def sample_key(model: str, prompt: Prompt, settings: dict[str, Any]) -> str:
    """The name of a video's files: 16 hex digits, whatever the prompt says."""
    return _hash([model, prompt.text, prompt.seed, settings])


def read_frames(run_dir: str, key: str) -> np.ndarray:
    """The exact frames of a sample, uint8 [f, y, x, 3]."""
    with np.load(io.BytesIO(storage.read_bytes(storage.join(run_dir, "samples", f"{key}.npz")))) as arrays:
        return arrays["frames"]


def actor_pool(config: SampleConfig, batches: int) -> dict[str, Any]:
    """How Ray Data runs a stage whose actors hold networks: no more of them than there are batches."""
    import ray.data

    workers = min(config.workers, batches)
    return {
        # One batch at a time each: a second one queued would wait while another actor has none.
        "compute": ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        "num_gpus": config.gpus_per_worker,
        "num_cpus": config.cpus_per_worker,
    }


def quieten(dataset: Any) -> None:
    """Turns off Ray Data's bars and plans, in which the lines of progress would drown."""
    dataset.context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # which says that there are no bars


def write_manifest(folder: str) -> None:
    """Gathers all records of a samples folder into its manifest.jsonl, sorted by key."""
    paths = [storage.join(folder, name) for name in storage.listing(folder, ".json")]
    records = [json.loads(data) for data in storage.read_many(paths)]
    with storage.open_atomic(storage.join(folder, "manifest.jsonl")) as file:
        file.write("".join(json.dumps(record, sort_keys=True) + "\n" for record in records).encode())


def mp4_bytes(frames: np.ndarray, fps: int) -> bytes:
    """Frames uint8 [f, y, x, 3] as H.264, yuv420p, near enough to lossless to be looked at closely.

    Videos narrower than 256 pixels are enlarged by a whole factor, every pixel to a square.
    """
    factor = -(-_WATCHABLE_PIXELS // frames.shape[2])
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = large.shape[1], large.shape[2], "yuv420p"
        for frame in large:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


class Sampler:
    """A Ray actor that holds the three networks and writes what it samples, record last."""

    def __init__(self, folder: str, model_folder: str, model: str, config: SampleConfig, size: int) -> None:
        import torch

        from t2v.diffusion import Diffusion
        from t2v.export import read_unet
        from t2v.frozen import load_text, load_vae

        described = storage.read_json(storage.join(model_folder, "t2v.json"))
        on_gpu = config.gpus_per_worker > 0 and torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._dtype = torch.float16 if on_gpu else torch.float32  # as the public code samples
        self._unet = read_unet(model_folder).to(self._device, self._dtype)
        self._vae = load_vae(storage.local_path(storage.join(model_folder, "vae")), self._device)
        self._text = load_text(TextConfig(**described["text"]), self._device)
        self._diffusion = Diffusion(DiffusionConfig(**described["diffusion"]))
        self._empty = self._text.encode([""]).to(self._dtype)
        self._folder, self._model, self._config = folder, model, config
        self._settings = sampler_settings(config, size)
        self._shape = (self._unet.config.channels, config.frames, size // _VAE_DOWNSAMPLING, size // _VAE_DOWNSAMPLING)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows (key, text, seed) -> the keys, once their files are written."""
        start = time.perf_counter()
        prompts = [Prompt(str(text), int(seed)) for text, seed in zip(batch["text"], batch["seed"], strict=True)]
        clips = self.sample(prompts)
        seconds = (time.perf_counter() - start) / len(prompts)
        for key, prompt, frames in zip(batch["key"], prompts, clips, strict=True):
            self._write(str(key), prompt, frames, seconds)
        return {"key": batch["key"]}

    def sample(self, prompts: list[Prompt]) -> np.ndarray:
        """The videos of prompts, uint8 [b, f, y, x, 3]; nothing is written."""
        from t2v.sampler import sample

        text = self._text.encode([prompt.text for prompt in prompts]).to(self._dtype)
        seeds = [prompt.seed for prompt in prompts]
        latents = sample(self._unet, text, self._empty, self._shape, seeds, self._config, self._diffusion)
        return self._vae.decode(latents).cpu().numpy()

    def _write(self, key: str, prompt: Prompt, frames: np.ndarray, seconds: float) -> None:
        record = {
            "key": key,
            "prompt": prompt.text,
            "seed": prompt.seed,
            "file": f"{key}.mp4",
            "model": self._model,
            "seconds": round(seconds, 3),
            **self._settings,
        }
        with storage.open_atomic(storage.join(self._folder, f"{key}.npz")) as file:
            np.savez_compressed(file, frames=frames)
        with storage.open_atomic(storage.join(self._folder, f"{key}.mp4")) as file:
            file.write(mp4_bytes(frames, self._config.fps))
        storage.write_json(storage.join(self._folder, f"{key}.json"), record)


def _fill(
    folder: str, missing: list[Sample], total: int, model_folder: str, model: str, config: SampleConfig, size: int
) -> None:
    import ray.data

    rows = [{"key": sample.key, "text": sample.prompt.text, "seed": sample.prompt.seed} for sample in missing]
    made = ray.data.from_items(rows).map_batches(
        Sampler,
        fn_constructor_args=(folder, model_folder, model, config, size),
        batch_size=config.batch,
        **actor_pool(config, batches=-(-len(rows) // config.batch)),
    )
    quieten(made)
    done = total - len(rows)
    for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
        done += len(batch["key"])
        print(f"[generate] {done}/{total} videos", flush=True)


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
