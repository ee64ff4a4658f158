"""Latent shards -> batches, in the exact order of t2v/order.py, read ahead by one thread.

b samples, c channels, f frames, h w latent size (pixels / 8).
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from t2v import shards
from t2v.config import Stream
from t2v.mix import Slot, Step
from t2v.order import lane_windows
from t2v.shards import Rows, Shard


@dataclass
class Batch:
    """What one slot of one step trains on.

    `sample` [b] numbers the samples of the stream since the start of training: it keys their random numbers.
    `mean` and `logvar` are the unscaled VAE posterior, fp16 [b, c, f, h, w]; `logvar` is None where shards keep none.
    """

    stream: Stream
    sample: list[int]
    captions: list[str]
    mean: torch.Tensor
    logvar: torch.Tensor | None


class Feed:
    """Iterates over the steps of one rank from `first_step` on; each step is a list of Batch, one a slot.

    `waited_s` adds up the time for which the trainer had to wait for data.
    """

    def __init__(
        self,
        inventory: dict[Stream, list[Shard]],
        step: Step,
        slots: tuple[Slot, ...],
        seed: int,
        window_rows: int,
        first_step: int = 0,
        ahead: int = 4,
        pin: bool = False,
    ) -> None:
        self.waited_s = 0.0
        self._inventory, self._step, self._slots = inventory, step, slots
        self._seed, self._window_rows, self._first, self._pin = seed, window_rows, first_step, pin
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        threading.Thread(target=self._read_ahead, name="feed", daemon=True).start()

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            begun = time.perf_counter()
            batches = self._ready.get()
            self.waited_s += time.perf_counter() - begun
            if isinstance(batches, BaseException):
                raise batches
            yield batches

    def close(self) -> None:
        """Ends the reading thread."""
        self._stop.set()

    def _read_ahead(self) -> None:
        try:
            lanes = [self._lane(slot) for slot in self._slots]
            while not self._stop.is_set():
                self._put([next(lane) for lane in lanes])
        except BaseException as error:  # whatever it was, the trainer raises it
            self._put(error)

    def _put(self, item: list[Batch] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.5)
            except queue.Full:
                continue

    def _lane(self, slot: Slot) -> Iterator[Batch]:
        """One slot's batches, step after step; its rows may come from several windows."""
        rows = self._rows(slot)
        per_step = self._step.samples[slot.stream]
        first = self._first * per_step + slot.first
        while True:
            taken = [next(rows) for _ in range(slot.count)]
            mean = self._stack([window.mean[row] for window, row in taken])
            variances = [window.logvar[row] for window, row in taken if window.logvar is not None]
            logvar = self._stack(variances) if variances else None
            captions = [window.caption[row] for window, row in taken]
            yield Batch(slot.stream, list(range(first, first + slot.count)), captions, mean, logvar)
            first += per_step

    def _stack(self, latents: list[np.ndarray]) -> torch.Tensor:
        stacked = torch.from_numpy(np.stack(latents))
        return stacked.pin_memory() if self._pin else stacked

    def _rows(self, slot: Slot) -> Iterator[tuple[Rows, int]]:
        inventory = self._inventory[slot.stream]
        places = [(shard.path, group) for shard in inventory for group in range(len(shard.row_groups))]
        sizes = [rows for shard in inventory for rows in shard.row_groups]
        lanes = self._step.lanes[slot.stream]
        windows = lane_windows(
            sizes, self._seed, slot.stream, slot.lane, lanes, self._window_rows, skip=self._first * slot.count
        )
        for groups, order in windows:
            loaded = [shards.read_rows(*places[group]) for group in groups]
            yield from ((loaded[index], row) for index, row in order)
