"""The VAE as encoders call it: in their own process, or in actors to which the frames travel.

Frames travel where `data.encode.vae_workers` asks for it alone: a batch is a thousand times the bytes of its files, but
a GPU whose machine has too few cores to decode for it waits half of its time, and other machines have cores.
n frames of y x x pixels; c latent channels, h w latent size.
torch and the VAE are imported where one is loaded, so that the driver need not wait for them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import sample
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from pipelines.config import EncodeConfig

START_S = 1800.0  # a cloud's machines with GPUs may take that long to come
PATIENCE_S = 300.0  # no batch takes that long on a GPU

Moments = tuple[np.ndarray, np.ndarray]


class VaeFacts(NamedTuple):
    """What latents are said to be of: the digest of the VAE's weights, its scale, and a frame's latent (c, h, w)."""

    id: str
    scale: float
    shape: tuple[int, int, int]


def vae_facts(vae: Any, size: int) -> VaeFacts:
    """What a VAE (t2v/frozen.py) says of frames of so many pixels a side, once it has encoded one."""
    import torch

    black = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    return VaeFacts(vae.id, vae.scale, vae.encode(black)[0].shape[1:])


class VaePool(NamedTuple):
    """The actors that hold a VAE each, LocalVae all of them, and what they said of it, by size."""

    actors: list[Any]
    facts: dict[int, VaeFacts]


class LocalVae:
    """A VAE in this process, on its GPU if there is one, which has one batch at a time, whoever calls.

    ValueError if it is not the one that `encoder` names, or is broken.
    """

    def __init__(self, vae_path: str, encoder: str, sizes: Sequence[int], batch_frames: int) -> None:
        import torch

        from t2v.frozen import load_vae

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._vae = load_vae(vae_path, self.device, chunk_frames=batch_frames)
        self._is_free = Lock()
        if self._vae.id != encoder:
            raise ValueError(f"{vae_path}: weights {self._vae.id} here, but {encoder} where the run was started")
        self._facts = {size: vae_facts(self._vae, size) for size in sizes}

    def facts(self) -> dict[int, VaeFacts]:
        """By size."""
        return self._facts

    def encode(self, frames: np.ndarray) -> Moments:
        """Mean and log-variance, fp16 [n, c, h, w] each, of frames uint8 [n, y, x, 3]."""
        import torch

        pixels = torch.from_numpy(np.require(frames, requirements="W"))  # what the object store gives is copied
        with self._is_free:
            mean, logvar = (part.half().cpu().numpy() for part in self._vae.encode(pixels))
        return mean, logvar


class RemoteVae:
    """The VAE of a pool: each batch goes to the actor that has the fewest of this process's."""

    device = "cpu"  # what else there is to compute has no GPU here

    def __init__(self, pool: VaePool) -> None:
        self._facts = pool.facts
        self._actors = pool.actors
        self._calls: dict[Any, int] = {}  # those without an answer, each with the number of its actor
        self._lock = Lock()

    def facts(self) -> dict[int, VaeFacts]:
        return self._facts

    def encode(self, frames: np.ndarray) -> Moments:
        """As LocalVae's. A killed actor does its batches when it is back; one that stays away, another does."""
        import ray

        shared = ray.put(frames)
        calls = [self._call(shared)]
        while not (answered := ray.wait(calls, timeout=PATIENCE_S)[0]):
            calls.append(self._call(shared))
        return ray.get(answered[0])

    def _call(self, frames: Any) -> Any:
        import ray

        with self._lock:
            calls = list(self._calls)
            waiting = ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)[1] if calls else []
            self._calls = {call: self._calls[call] for call in waiting}
            busy = Counter(self._calls.values())
            numbers = range(len(self._actors))
            actor = min(sample(numbers, len(numbers)), key=busy.__getitem__)
            call = self._actors[actor].encode.remote(frames)
            self._calls[call] = actor
            return call


@contextmanager
def vae_pool(config: EncodeConfig, vae_path: str, encoder: str, sizes: Sequence[int]) -> Iterator[VaePool | None]:
    """The actors that `vae_workers` asks for, which live until the block or the driver ends; None for 0.

    ValueError if not all of them have started after half an hour, in which a cluster may grow.
    """
    if not config.vae_workers:
        yield None
        return
    import ray

    kind: Any = ray.remote(LocalVae).options(
        num_gpus=config.gpus_per_worker,
        num_cpus=config.vae_cpus,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=2,  # the next batch is copied while the GPU has one
    )
    actors = [kind.remote(vae_path, encoder, sizes, config.batch_frames) for _ in range(config.vae_workers)]
    try:
        told = [actor.facts.remote() for actor in actors]
        ready, late = ray.wait(told, num_returns=len(told), timeout=START_S)
        if late:
            raise ValueError(
                f"data.encode.vae_workers: {len(ready)} of {len(told)} have started within {START_S / 60:g} minutes, "
                f"of {config.gpus_per_worker:g} GPUs and {config.vae_cpus:g} CPUs each; add nodes, or set fewer"
            )
        yield VaePool(actors, ray.get(told)[0])
    finally:
        for actor in actors:
            ray.kill(actor)
