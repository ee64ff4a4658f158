"""Media that lie in a column of Parquet files as input: img2dataset's and video2dataset's output, and data sets alike.

Lists are made of the other columns alone. A row's address, such as "00000.parquet#row=17&column=jpg", leads to its
bytes, and the fetch stage reads them row group by row group: what is in memory at a time is one batch of cells and
the pages that it lies in. A row group much longer than a shard is read again, up to its place, for each of its shards.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlencode

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.fetch import Fetched, FetchError, checked_media
from t2v import storage

_BATCH_ROWS = 4
_BUFFER_BYTES = 1 << 20

_BROKEN = (pa.ArrowException, OSError, ValueError, KeyError)  # what reading a file may raise

_Read = bytes | FetchError


class _Cell(NamedTuple):
    path: str
    column: str
    row: int


def check_cells(path: str, column: str) -> None:
    """Try whether a column holds bytes, or a struct of them as Hugging Face's pictures are; ValueError if not."""
    if not path.lower().endswith(".parquet"):
        raise ValueError(f"{path}: media in a column (bytes={column}) are read from Parquet files alone")
    with storage.open_read(path) as file:
        found = pq.ParquetFile(file).schema_arrow.field(column).type
    kind = found.field("bytes").type if pa.types.is_struct(found) and found.get_field_index("bytes") >= 0 else found
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(f"{path}: column {column} holds {found}, not the bytes of media; name one that does: bytes=…")


def addresses(path: str, column: str, start: int, rows: int) -> pa.Array:
    """The addresses of `rows` cells of a file from row `start` on."""
    told = urlencode({"column": column}, quote_via=quote)
    return pa.array([f"{path}#row={row}&{told}" for row in range(start, start + rows)], pa.string())


def read_cells(places: Sequence[str], max_bytes: int) -> list[Fetched]:
    """The bytes at `places`, which `addresses` gave, in the same order; never raises for an address."""
    begun = time.monotonic()
    cells = [_cell(place) for place in places]
    found: dict[_Cell, _Read] = {}
    for (path, column), some in groupby(sorted(set(cells)), key=lambda cell: cell[:2]):
        rows = [cell.row for cell in some]
        found |= {_Cell(path, column, row): one for row, one in _read_file(path, column, rows, max_bytes).items()}
    seconds = (time.monotonic() - begun) / max(1, len(cells))
    return [_fetched(found[cell], seconds) for cell in cells]


def _cell(address: str) -> _Cell:
    path, _, place = address.rpartition("#")
    said = parse_qs(place)
    return _Cell(path, said["column"][0], int(said["row"][0]))


def _read_file(path: str, column: str, rows: list[int], max_bytes: int) -> dict[int, _Read]:
    """The cells of a file by row; a row group that cannot be read costs no more than its own rows."""
    found: dict[int, _Read] = {}
    try:
        with storage.open_read(path, ahead=False) as file:
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES)
            first = 0
            for group in range(parquet.num_row_groups):
                end = first + parquet.metadata.row_group(group).num_rows
                wanted = [row for row in rows if first <= row < end]
                found |= _read_group(parquet, group, first, column, wanted, max_bytes)
                first = end
    except _BROKEN as error:
        return {row: _failure(error) for row in rows} | found
    return {row: FetchError("corrupt", f"the file ends after {first} rows") for row in rows} | found


def _read_group(
    parquet: pq.ParquetFile, group: int, first: int, column: str, wanted: list[int], max_bytes: int
) -> dict[int, _Read]:
    found: dict[int, _Read] = {}
    left = iter(wanted)
    next_row = next(left, None)
    try:
        for row, cell in enumerate(_cells_of(parquet, group, column) if wanted else (), start=first):
            if row == next_row:
                found[row] = _checked(cell, max_bytes)
                if (next_row := next(left, None)) is None:
                    break
    except _BROKEN as error:
        return {row: _failure(error) for row in wanted} | found
    return {row: FetchError("corrupt", "its row group ends before it") for row in wanted} | found


def _cells_of(parquet: pq.ParquetFile, group: int, column: str) -> Iterator[pa.Scalar]:
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(column)
        yield from pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


def _checked(cell: pa.Scalar, max_bytes: int) -> _Read:
    if not cell.is_valid:
        return FetchError("empty", "the row has no bytes")
    if (size := cell.as_buffer().size) > max_bytes:  # before they are copied
        return FetchError("too_large", f"{size:,} bytes")
    try:
        return checked_media(cell.as_py(), "", max_bytes)
    except FetchError as error:
        return error


def _failure(error: Exception) -> FetchError:
    """What is wrong with a file: errors of the system have a number, Arrow's about what it reads have none."""
    unreachable = isinstance(error, OSError) and error.errno is not None
    return FetchError("connection" if unreachable else "corrupt", f"{type(error).__name__}: {error}")


def _fetched(read: _Read, seconds: float) -> Fetched:
    if isinstance(read, FetchError):
        return Fetched(b"", read.status, read.message, seconds)
    return Fetched(read, "ok", "", seconds)
