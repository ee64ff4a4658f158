"""Which rows repeat an earlier row's URL: exactly, in memory that does not grow with the number of rows.

128-bit hashes of all URLs are dealt out by their first bits to files on local disk, where equal URLs meet; one file
after another is sorted, and the places of repeated rows are dealt out again by where in the manifest they are.
That takes 24 bytes of disk a row: 50 GB for LAION2B-en, whose files are then 50 MB each.
"""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

_FILES = 1024
_HELD_ROWS = 1 << 18  # in memory before they are dealt out
_SPAN_ROWS = 1 << 20  # of the manifest, whose repeated rows are looked up at once
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


class Duplicates:
    """The rows of a manifest whose URL an earlier row has; rows without a URL, null in `urls`, repeat nothing."""

    def __init__(self, urls: Iterable[pa.Array], folder: str) -> None:
        """Reads all URLs in the manifest's order; `folder` is an empty one on local disk, which must stay."""
        hashes, self._rows = _Spill(folder, "hashes", _RECORD), _Spill(folder, "rows", np.dtype("<i8"))
        start = 0
        for column in urls:
            records = _records(column, start)
            hashes.add(records["high"] >> np.uint64(64 - 10), records)
            start += len(column)
        for number in range(_FILES):
            rows = _repeated(hashes.read(number))
            self._rows.add(rows // _SPAN_ROWS, rows)
        self._span, self._here = -1, np.empty(0, np.int64)

    def among(self, start: int, count: int) -> np.ndarray:
        """bool [count]: which of the rows from `start` on are duplicates; cheapest if asked from first to last."""
        mask = np.zeros(count, bool)
        for span in range(start // _SPAN_ROWS, (start + count - 1) // _SPAN_ROWS + 1):
            if span != self._span:
                self._span, self._here = span, self._rows.read(span)
            mask[self._here[(self._here >= start) & (self._here < start + count)] - start] = True
        return mask


def _records(urls: pa.Array, start: int) -> np.ndarray:
    rows = np.flatnonzero(urls.is_valid().to_numpy(zero_copy_only=False))
    values = urls.drop_null().cast(pa.binary()).to_pylist()
    packed = b"".join(hashlib.blake2b(url, digest_size=16).digest() for url in values)
    records = np.empty(len(rows), _RECORD)
    records["high"], records["low"] = np.frombuffer(packed, "<u8").reshape(-1, 2).T
    records["row"] = rows + start
    return records


def _repeated(records: np.ndarray) -> np.ndarray:
    """All rows but the first of each hash."""
    records = records[np.lexsort((records["row"], records["low"], records["high"]))]
    high, low = records["high"], records["low"]
    return records["row"][1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]


class _Spill:
    """Records dealt out to numbered files, each of which fits into memory by itself."""

    def __init__(self, folder: str, name: str, dtype: np.dtype) -> None:
        self._stem, self._dtype = os.path.join(folder, name), dtype
        self._held: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, files: np.ndarray, records: np.ndarray) -> None:
        """Record k goes to the file of number files[k]."""
        if len(records):
            self._held.append((files, records))
        if sum(len(some) for some, _ in self._held) >= _HELD_ROWS:
            self._deal()

    def read(self, file: int) -> np.ndarray:
        """All records of one file, in the order in which they came."""
        self._deal()
        path = f"{self._stem}-{file}"
        return np.fromfile(path, self._dtype) if os.path.exists(path) else np.empty(0, self._dtype)

    def _deal(self) -> None:
        if not self._held:
            return
        files, records = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        self._held = []
        order = np.argsort(files, kind="stable")
        numbers, starts = np.unique(files[order], return_index=True)
        for number, part in zip(numbers, np.split(records[order], starts[1:]), strict=True):
            with open(f"{self._stem}-{number}", "ab") as file:
                part.tofile(file)
