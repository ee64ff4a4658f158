"""Prompts -> videos: what is missing is sampled by a pool of Ray actors, what is there is left alone.

A video is known by its key, a hash of all that it depends on: the model, the prompt, its seed and the sampler's
settings. Nothing else enters: batches, workers and their order change no pixel by more than a rounding.

    samples/<key>.mp4    to be watched
    samples/<key>.npz    the exact frames, uint8 [f, y, x, 3] under the name `frames`: what scores are taken from
    samples/<key>.json   its record, written last: a video without one is made again
    samples/manifest.jsonl    all records, one a line

    b videos    f frames    y x pixels
"""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pipelines.prompts import Prompt, read_prompts
from pipelines.ray_data import actor_pool, quieten, tell_if_too_small
from pipelines.video import mp4_bytes
from t2v import storage
from t2v.config import DiffusionConfig, SampleConfig, TextConfig
from t2v.digest import digest_of
from t2v.shards import WEIGHTS

_X264 = {"crf": "10"}  # near enough to lossless to be looked at closely
_VAE_DOWNSAMPLING = 8
_NETWORKS = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}  # folders of an exported model


class Sample(NamedTuple):
    """One generated video of a run folder."""

    key: str
    prompt: Prompt


def generate(
    run_dir: str, prompts: str | Sequence[Prompt], model_folder: str, config: SampleConfig, size: int
) -> list[Sample]:
    """Makes the videos of `prompts`, a file or a list, that `run_dir` lacks; all of them are returned, in order.

    `model_folder` is an exported model, `size` the height and width in pixels. Needs neither torch nor Ray when nothing
    is missing. FileNotFoundError without a model, ValueError for unreadable prompts or steps that the sampler cannot
    take; both before anything is started.
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
    """Hash of all that an exported model turns prompts into frames by; where the folder lies is not among it."""
    names = [storage.join(part, name) for part, weights in _NETWORKS.items() for name in ("config.json", weights)]
    paths = [storage.join(folder, name) for name in names]
    settings = storage.join(folder, "t2v.json")
    for path in (*paths, settings):
        if not storage.exists(path):
            raise FileNotFoundError(f"{path}: no such file, so {folder} is no exported model; run jobs/train.py first")
    return digest_of([*map(storage.digest, paths), storage.read_json(settings)["diffusion"]])


def sample_key(model: str, prompt: Prompt, settings: dict[str, Any]) -> str:
    """The name of a video's files: 16 hex digits, whatever the prompt says."""
    return digest_of([model, prompt.text, prompt.seed, settings])


def read_frames(run_dir: str, key: str) -> np.ndarray:
    """The exact frames of a sample, uint8 [f, y, x, 3]."""
    with np.load(io.BytesIO(storage.read_bytes(storage.join(run_dir, "samples", f"{key}.npz")))) as arrays:
        return arrays["frames"]


def write_manifest(folder: str) -> None:
    """Gathers all records of a samples folder into its manifest.jsonl, sorted by key."""
    paths = [storage.join(folder, name) for name in storage.listing(folder, ".json")]
    records = [json.loads(data) for data in storage.read_many(paths)]
    storage.write_lines(storage.join(folder, "manifest.jsonl"), records)


def even_batches(config: SampleConfig, videos: int) -> SampleConfig:
    """The same settings with the smallest batch that takes no more batches: the last one is then nearly full."""
    batches = -(-videos // config.batch)
    return replace(config, batch=-(-videos // batches))


class Sampler:
    """The three networks of an exported model, on this process's GPU if the configuration gives it one."""

    def __init__(self, model_folder: str, config: SampleConfig, size: int) -> None:
        import torch

        from t2v.autoencoder import channels_last
        from t2v.diffusion import Diffusion
        from t2v.export import read_unet
        from t2v.frozen import load_text, load_vae
        from t2v.sampler import Captured

        on_gpu = config.gpus_per_worker > 0 and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        self._dtype = torch.float16 if on_gpu else torch.float32  # as the public code samples
        unet = read_unet(model_folder).to(device, self._dtype).requires_grad_(False)
        self._shape = (unet.config.channels, config.frames, size // _VAE_DOWNSAMPLING, size // _VAE_DOWNSAMPLING)
        self._unet = Captured(channels_last(unet)) if on_gpu else unet
        self._vae = load_vae(storage.join(model_folder, "vae"), device)
        self._text = load_text(TextConfig(weights=model_folder, skip_layers=0), device)  # exported without the skipped
        self._diffusion = Diffusion(_diffusion(model_folder))
        self._empty = self._text.encode([""]).to(self._dtype)
        self._config = config

    def sample(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The videos of prompts, uint8 [b, f, y, x, 3]; `config.batch` of them at a time bound the memory."""
        size = self._config.batch
        return np.concatenate([self._batch(prompts[i : i + size]) for i in range(0, len(prompts), size)])

    def _batch(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The same for one batch, which is filled up to its full size with repetitions of its last prompt.

        So all batches have one shape: one graph on a GPU, and the same kernels, hence the same rounding, for a video
        whatever comes with it.
        """
        from t2v.sampler import sample

        full = [*prompts, *[prompts[-1]] * (self._config.batch - len(prompts))]
        text = self._text.encode([prompt.text for prompt in full]).to(self._dtype)
        seeds = [prompt.seed for prompt in full]
        latents = sample(self._unet, text, self._empty, self._shape, seeds, self._config, self._diffusion)
        return self._vae.decode(latents)[: len(prompts)].cpu().numpy()


class SampleWriter:
    """A Ray actor that samples videos and writes each one's files, its record last."""

    def __init__(self, folder: str, model_folder: str, model: str, config: SampleConfig, size: int) -> None:
        self._sampler = Sampler(model_folder, config, size)
        self._folder, self._fps = folder, config.fps
        self._about = {"model": model, **sampler_settings(config, size)}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows (key, text, seed) -> the keys, once their files are written."""
        start = time.perf_counter()
        prompts = [Prompt(str(text), int(seed)) for text, seed in zip(batch["text"], batch["seed"], strict=True)]
        clips = self._sampler.sample(prompts)
        seconds = (time.perf_counter() - start) / len(prompts)
        for key, prompt, frames in zip(batch["key"], prompts, clips, strict=True):
            self._write(str(key), prompt, frames, seconds)
        return {"key": batch["key"]}

    def _write(self, key: str, prompt: Prompt, frames: np.ndarray, seconds: float) -> None:
        record = {"key": key, "prompt": prompt.text, "seed": prompt.seed, "file": f"{key}.mp4"}
        with storage.open_atomic(storage.join(self._folder, f"{key}.npz")) as file:
            np.savez_compressed(file, frames=frames)
        with storage.open_atomic(storage.join(self._folder, f"{key}.mp4")) as file:
            file.write(mp4_bytes(frames, self._fps, _X264))
        storage.write_json(
            storage.join(self._folder, f"{key}.json"), record | self._about | {"seconds": round(seconds, 3)}
        )


def _diffusion(model_folder: str) -> DiffusionConfig:
    return DiffusionConfig(**storage.read_json(storage.join(model_folder, "t2v.json"))["diffusion"])


def check_steps(config: SampleConfig, diffusion: DiffusionConfig) -> None:
    """ValueError, naming the config key, where the sampler cannot take that many steps."""
    if not diffusion.zero_terminal_snr and 2 * config.steps <= diffusion.timesteps:
        return  # any sampler can; to hear it from diffusers would take ten seconds of importing
    from t2v.frozen import make_scheduler

    try:
        make_scheduler(diffusion, config.sampler, config.steps)
    except ValueError as error:
        raise ValueError(f"sample.{error}") from error


def _fill(
    folder: str, missing: list[Sample], total: int, model_folder: str, model: str, config: SampleConfig, size: int
) -> None:
    check_steps(config, _diffusion(model_folder))
    import ray.data

    what = "one worker (sample) needs them"
    tell_if_too_small("generate", config.cpus_per_worker, config.gpus_per_worker, what)
    rows = [{"key": sample.key, "text": sample.prompt.text, "seed": sample.prompt.seed} for sample in missing]
    config = even_batches(config, len(rows))
    made = ray.data.from_items(rows).map_batches(
        SampleWriter,
        fn_constructor_args=(folder, model_folder, model, config, size),
        batch_size=config.batch,
        **actor_pool(config, batches=-(-len(rows) // config.batch)),
    )
    quieten(made)
    done = total - len(rows)
    for batch in made.iter_batches(batch_size=None, prefetch_batches=0):
        done += len(batch["key"])
        print(f"[generate] {done}/{total} videos", flush=True)
