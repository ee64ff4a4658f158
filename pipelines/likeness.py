"""Near duplicates by perceptual hash: of a picture, and of two frames of a video at fixed parts of its length.

A hash is 64 bits: which of the lowest 8 x 8 frequencies of the grey picture are above their median. It outlives
scaling and compression; it is blind to colour, and mirrored, turned or cropped copies have others.
"""

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t2v import storage


def perceptual_hash(frame: np.ndarray) -> int:
    """64 bits of a frame uint8 [y, x, 3]; near duplicates differ in few of them."""
    grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:8, :8].round().ravel()
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes())


class Seen:
    """The rows that were kept so far, `hashes` uint64 [n, 2]."""

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits
        self.row_ids: list[str] = []
        self.hashes = np.empty((0, 2), np.uint64)

    def twin(self, row_id: str, hashes: tuple[int, int]) -> str | None:
        """The first row kept whose hashes both differ from these by no more than `max_bits`; else this one is kept."""
        new = np.array([hashes], np.uint64)
        like = (np.bitwise_count(self.hashes ^ new) <= self.max_bits).all(axis=1)
        if like.any():
            return self.row_ids[int(like.argmax())]
        self.row_ids.append(row_id)
        self.hashes = np.concatenate([self.hashes, new])
        return None


def hashes_path(data_dir: str, stream: str, name: str) -> str:
    """Where the hashes of one shard's rows are."""
    return storage.join(data_dir, "hashes", stream, f"{name}.parquet")


def write_hashes(path: str, rows: Seen) -> None:
    """Write the hashes of the rows of a shard that were kept, in their order, atomically."""
    first, second = rows.hashes.T
    table = pa.table({"row_id": pa.array(rows.row_ids, pa.string()), "first": first, "second": second})
    with storage.open_atomic(path) as file:
        pq.write_table(table, file, use_dictionary=False)
