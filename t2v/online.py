"""Rows that are encoded while training goes on -> batches: what t2v/feed.py is to latent shards.

Whoever encodes hands over tables of rows as they come, and tells of each row its raw shard's number in the order of
t2v/order.py. That order is kept nearly: shards overtake each other, and which rank gets one is a question of time. So a
resumed run goes on at a shard: the first one of which no rank had trained on a row, nor on any after it. Rows that
waited for their turn, or were still on their way, are left out until the next epoch; none is there twice in an epoch.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from itertools import count, islice

import pyarrow as pa

from t2v.config import Stream
from t2v.feed import Batch, DrawSamples, ReadAhead, make_batch
from t2v.job import TrainJob
from t2v.mix import Slot
from t2v.order import generator
from t2v.shards import LatentInfo, Rows, table_rows

TABLES_AHEAD = 4  # of each stream, on each rank
NUMBER = "raw_shard"  # the column beside those of a latent shard

Tables = Iterator[pa.Table | None]  # None now and then while there is nothing yet, so that who reads can stop
_Row = tuple[Rows, int, int]  # rows, which of them, and its shard's number


def numbered(table: pa.Table, number: int) -> pa.Table:
    """The rows of one raw shard as OnlineFeed takes them: `table` has the columns of a latent shard."""
    return table.append_column(NUMBER, pa.repeat(pa.scalar(number, pa.int64()), len(table)))


class OnlineFeed(ReadAhead):
    """The steps of one rank from `first_step` on, out of the tables of the streams that it trains on.

    `begun` is what a checkpoint told of raw shards; the attribute follows the batches that are taken, on this rank.
    RuntimeError where a stream's tables end.
    """

    def __init__(
        self,
        job: TrainJob,
        rank: int,
        world: int,
        first_step: int,
        draw: DrawSamples,
        tables: Mapping[Stream, Tables],
        begun: Mapping[Stream, int],
        pin: bool = False,
    ) -> None:
        self._job, self._slots = job, job.step.of_rank(rank, world)
        self._first, self._draw, self._pin = first_step, draw, pin
        assert job.raw
        streams = [_streams_of(job, each, world) for each in range(world)]
        self._streams = {
            stream: _Shuffled(
                tables[stream],
                job.raw[stream].info,
                -(-job.train.shuffle_rows // sum(stream in theirs for theirs in streams)),
                (job.seed, stream, "online"),
            )
            for stream in streams[rank]
        }
        super().__init__(self._all_batches(), len(self._slots))
        self.begun = dict(begun)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.stop.set()
        super().close()
        for stream in self._streams.values():
            stream.thread.join()

    def _take(self) -> Batch | None:
        batch = super()._take()
        if batch:
            self.begun[batch.slot.stream] = max(self.begun[batch.slot.stream], batch.raw_shard + 1)
        return batch

    def _all_batches(self) -> Iterator[Batch]:
        rows = {stream: iter(shuffled) for stream, shuffled in self._streams.items()}
        for step in count(self._first):
            for slot in self._slots:
                taken = list(islice(rows[slot.stream], slot.count))
                if len(taken) < slot.count:  # it is closed
                    return
                yield self._batch(step, slot, taken)

    def _batch(self, step: int, slot: Slot, taken: list[_Row]) -> Batch:
        first = step * self._job.step.samples[slot.stream] + slot.first
        places = [(rows, row) for rows, row, _ in taken]
        batch = make_batch(slot, first, places, self._draw, f"{self._job.seed} {slot.stream}", self._pin)
        batch.raw_shard = max(number for _, _, number in taken)
        return batch


def _streams_of(job: TrainJob, rank: int, world: int) -> set[Stream]:
    return {slot.stream for slot in job.step.of_rank(rank, world)}


class _Shuffled:
    """The rows of one stream in windows of the tables that are there, up to `window_rows` and one table; it iterates
    until `stop` is set.

    A thread takes the tables, so that no stream waits for another one.
    """

    def __init__(self, tables: Tables, info: LatentInfo, window_rows: int, key: tuple[int | str, ...]) -> None:
        self._tables, self._info, self._window_rows, self._key = tables, info, window_rows, key
        self._ready: queue.Queue[pa.Table | BaseException] = queue.Queue(TABLES_AHEAD)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._read, name=f"online {info.stream}", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[_Row]:
        while tables := self._window():
            rows = [table_rows(table, self._info) for table in tables]
            numbers = [table[NUMBER].to_pylist() for table in tables]
            places = [(index, row) for index, part in enumerate(rows) for row in range(len(part))]
            for place in generator(*self._key, numbers[0][0]).permutation(len(places)):
                index, row = places[place]
                yield rows[index], row, numbers[index][row]

    def _window(self) -> list[pa.Table]:
        """At least one table, and those that are there already; none once it is stopped."""
        tables: list[pa.Table] = []
        while not self.stop.is_set() and sum(map(len, tables)) < self._window_rows:
            try:
                item = self._ready.get(timeout=0 if tables else 0.2)
            except queue.Empty:
                if tables:
                    break
                continue
            if isinstance(item, BaseException):
                raise item
            tables.append(item)
        return tables

    def _read(self) -> None:
        try:
            for table in self._tables:
                if self.stop.is_set():
                    return
                if table is not None and len(table):
                    self._put(table)
            raise RuntimeError(f"{self._info.stream}: the rows that are encoded for training have come to an end")
        except BaseException as error:  # whatever it was, the trainer raises it
            self._put(error)

    def _put(self, item: pa.Table | BaseException) -> None:
        while not self.stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue
