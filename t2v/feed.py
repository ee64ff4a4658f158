"""Latent shards -> batches, in the exact order of t2v/order.py, read ahead by threads; t2v/online.py does without both.

b samples, c channels, f frames, h w latent size (pixels / 8).
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, count, islice

import numpy as np
import torch

from t2v.config import Stream
from t2v.diffusion import Draw
from t2v.epochs import Epochs
from t2v.groups import Reader, read_group
from t2v.job import STREAMS, TrainJob
from t2v.mix import LanePart, Slot
from t2v.order import Window, lane_windows
from t2v.shards import Rows

READERS = 4  # threads that read row groups: one suffices for a local disk, storage over a network answers late
BATCHES_AHEAD = 8

DrawSamples = Callable[[str, Sequence[int], Sequence[int]], Draw]  # Diffusion.draw


@dataclass
class Batch:
    """What one slot of one step trains on.

    `sample` [b] numbers the samples of the stream since the start of training: it keys their random numbers, `draw`.
    `mean` and `logvar` are the unscaled VAE posterior, fp16 [b, c, f, h, w]; `logvar` is None where shards keep none.
    `raw_shard` is the furthest raw shard that a row is of, where there are no latents (t2v/online.py).
    """

    slot: Slot
    sample: list[int]
    captions: list[str]
    mean: torch.Tensor
    logvar: torch.Tensor | None
    draw: Draw
    raw_shard: int = -1


class ReadAhead:
    """Iterates over the steps of one rank, each an iterator of its batches, which a thread makes ahead.

    A step's first batch can be trained on before its last is read; all are to be taken before the next step is.
    `waited_s` adds up the time for which the trainer had to wait for data. Errors are raised where the batch is taken.
    `begun` tells how many raw shards of each stream have been begun, if there are any (t2v/online.py).
    """

    def __init__(self, batches: Iterator[Batch], of_step: int) -> None:
        self.waited_s = 0.0
        self.begun: dict[Stream, int] = {}
        self._batches, self._of_step = batches, of_step
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(BATCHES_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Iterator[Batch]]:
        while (first := self._take()) is not None:
            yield chain([first], islice(iter(self._take, None), self._of_step - 1))

    def close(self) -> None:
        """Ends the feed and its threads, and waits for them: an interpreter that exits while they read would abort."""
        self._stop.set()
        self._thread.join()

    def _take(self) -> Batch | None:
        """The next batch; None once the feed is closed."""
        if self._stop.is_set():
            return None
        begun = time.perf_counter()
        batch = self._ready.get()
        self.waited_s += time.perf_counter() - begun
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def _read_ahead(self) -> None:
        try:
            for batch in self._batches:
                self._put(batch)
                if self._stop.is_set():
                    return
        except BaseException as error:  # whatever it was, the trainer raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue


class Feed(ReadAhead):
    """The steps of one rank from `first_step` on, out of latent shards; raises errors of their list itself."""

    def __init__(
        self, job: TrainJob, rank: int, world: int, first_step: int, draw: DrawSamples, pin: bool = False
    ) -> None:
        self._job, self._step, self._slots = job, job.step, job.step.of_rank(rank, world)
        self._first, self._draw, self._pin = first_step, draw, pin
        self._epochs = {stream: Epochs(job, stream) for stream in STREAMS}
        self._reader = Reader(job, rank)
        self._readers = ThreadPoolExecutor(READERS, "reader")
        super().__init__(self._all_batches(), len(self._slots))

    def close(self) -> None:
        super().close()
        self._readers.shutdown(cancel_futures=True)

    def _all_batches(self) -> Iterator[Batch]:
        lanes = {(part.stream, part.lane): self._rows(part) for part in self._lane_parts()}
        for step in count(self._first):
            for slot in self._slots:
                yield self._batch(step, slot, lanes)

    def _batch(self, step: int, slot: Slot, lanes: dict[tuple[Stream, int], Iterator[tuple[Rows, int]]]) -> Batch:
        taken: list[tuple[Rows, int]] = []
        for part in self._step.lane_parts(slot):
            taken += islice(lanes[part.stream, part.lane], part.end - part.first)
        first = step * self._step.samples[slot.stream] + slot.first
        return make_batch(slot, first, taken, self._draw, f"{self._job.seed} {slot.stream}", self._pin)

    def _lane_parts(self) -> list[LanePart]:
        """What this rank takes of each lane in a step; its slots of one lane follow each other."""
        parts: dict[tuple[Stream, int], LanePart] = {}
        for part in chain.from_iterable(map(self._step.lane_parts, self._slots)):
            first = parts.get((part.stream, part.lane), part).first
            parts[part.stream, part.lane] = replace(part, first=first)
        return list(parts.values())

    def _rows(self, part: LanePart) -> Iterator[tuple[Rows, int]]:
        """The rows of one lane that are this rank's, step after step."""
        position = self._first * part.lane_count
        for window, groups in self._windows(part, skip=position):
            for index, row in window.rows:
                if part.first <= position % part.lane_count < part.end:
                    yield groups[index], row % len(groups[index])  # others that stand in may be fewer
                position += 1

    def _windows(self, part: LanePart, skip: int) -> Iterator[tuple[Window, list[Rows]]]:
        """The windows of a lane and their groups' rows; while one is used, the next is read."""
        epochs, lanes = self._epochs[part.stream], len(self._step.bounds[part.stream]) - 1
        window_rows = -(-self._job.train.shuffle_rows // lanes)
        coming: deque[tuple[Window, list[Future[Rows]]]] = deque()
        for window in lane_windows(
            lambda epoch: epochs[epoch].rows, self._job.seed, part.stream, part.lane, lanes, window_rows, skip
        ):
            coming.append((window, [self._read(epochs, window.epoch, index) for index in window.groups]))
            if len(coming) > 1:
                window, groups = coming.popleft()
                yield window, [group.result() for group in groups]

    def _read(self, epochs: Epochs, epoch: int, index: int) -> Future[Rows]:
        return self._readers.submit(self._reader.read, epochs, epoch, index)


def held_out_batches(job: TrainJob, stream: Stream, size: int, draw: DrawSamples) -> Iterator[Batch]:
    """The rows of `train.held_out_rows` in batches of up to `size`, weighted by their number; draws of their own."""
    held = Epochs(job, stream).held_out
    total = sum(group.end for group in held)
    rows = ((rows, row) for rows in map(read_group, held) for row in range(len(rows)))
    for first in range(0, total, size):
        slot = Slot(stream, first, min(size, total - first), min(size, total - first) / total)
        yield make_batch(slot, first, list(islice(rows, slot.count)), draw, f"{job.seed} {stream} held out")


def make_batch(
    slot: Slot, first: int, taken: list[tuple[Rows, int]], draw: DrawSamples, seed: str, pin: bool = False
) -> Batch:
    """Copies rows into a batch whose samples are numbered from `first`."""
    sample = list(range(first, first + slot.count))
    mean = _stack([rows.mean[row] for rows, row in taken], pin)
    variances = [rows.logvar[row] for rows, row in taken if rows.logvar is not None]
    draws = draw(seed, sample, mean.shape[1:])
    return Batch(
        slot,
        sample,
        [rows.caption[row] for rows, row in taken],
        mean,
        _stack(variances, pin) if variances else None,
        Draw(*(part.pin_memory() for part in draws)) if pin else draws,
    )


def _stack(latents: list[np.ndarray], pin: bool) -> torch.Tensor:
    stacked = torch.empty((len(latents), *latents[0].shape), dtype=torch.float16, pin_memory=pin)
    np.stack(latents, out=stacked.numpy())
    return stacked
