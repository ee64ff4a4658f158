"""Latent shards -> batches, in the exact order of t2v/order.py, read ahead by one thread.

b samples, c channels, f frames, h w latent size (pixels / 8).
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch

from t2v import shards
from t2v.config import Stream
from t2v.mix import LanePart, Slot, Step
from t2v.order import lane_windows
from t2v.shards import Rows, Shard


@dataclass
class Batch:
    """What one slot of one step trains on.

    `sample` [b] numbers the samples of the stream since the start of training: it keys their random numbers.
    `mean` and `logvar` are the unscaled VAE posterior, fp16 [b, c, f, h, w]; `logvar` is None where shards keep none.
    """

    slot: Slot
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
        self._reader = threading.Thread(target=self._read_ahead, name="feed", daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            begun = time.perf_counter()
            batches = self._ready.get()
            self.waited_s += time.perf_counter() - begun
            if isinstance(batches, BaseException):
                raise batches
            yield batches

    def close(self) -> None:
        """Ends the reading thread, and waits for it: an interpreter that exits while it reads would abort."""
        self._stop.set()
        self._reader.join()

    def _read_ahead(self) -> None:
        try:
            lanes = {(part.stream, part.lane): self._rows(part) for part in self._lane_parts()}
            step = self._first
            while not self._stop.is_set():
                self._put([self._batch(step, slot, lanes) for slot in self._slots])
                step += 1
        except BaseException as error:  # whatever it was, the trainer raises it
            self._put(error)

    def _put(self, item: list[Batch] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.5)
            except queue.Full:
                continue

    def _batch(self, step: int, slot: Slot, lanes: dict[tuple[Stream, int], Iterator[tuple[Rows, int]]]) -> Batch:
        taken: list[tuple[Rows, int]] = []
        for part in self._step.lane_parts(slot):
            taken += islice(lanes[part.stream, part.lane], part.end - part.first)
        mean = self._stack([window.mean[row] for window, row in taken])
        variances = [window.logvar[row] for window, row in taken if window.logvar is not None]
        logvar = self._stack(variances) if variances else None
        captions = [window.caption[row] for window, row in taken]
        first = step * self._step.samples[slot.stream] + slot.first
        return Batch(slot, list(range(first, first + slot.count)), captions, mean, logvar)

    def _stack(self, latents: list[np.ndarray]) -> torch.Tensor:
        stacked = torch.from_numpy(np.stack(latents))
        return stacked.pin_memory() if self._pin else stacked

    def _lane_parts(self) -> list[LanePart]:
        """What this rank takes of each lane in a step; its slots of one lane follow each other."""
        parts: dict[tuple[Stream, int], LanePart] = {}
        for part in chain.from_iterable(map(self._step.lane_parts, self._slots)):
            first = parts.get((part.stream, part.lane), part).first
            parts[part.stream, part.lane] = replace(part, first=first)
        return list(parts.values())

    def _rows(self, part: LanePart) -> Iterator[tuple[Rows, int]]:
        """The rows of one lane that are this rank's, step after step."""
        inventory = self._inventory[part.stream]
        places = [(shard.path, group) for shard in inventory for group in range(len(shard.row_groups))]
        sizes = [rows for shard in inventory for rows in shard.row_groups]
        lanes = len(self._step.bounds[part.stream]) - 1
        position = self._first * part.lane_count
        windows = lane_windows(sizes, self._seed, part.stream, part.lane, lanes, self._window_rows, skip=position)
        for groups, order in windows:
            loaded = [shards.read_rows(*places[group]) for group in groups]
            for index, row in order:
                if part.first <= position % part.lane_count < part.end:
                    yield loaded[index], row
                position += 1
