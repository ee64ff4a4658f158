"""Tables as strangers write them (CSV, TSV, JSONL, Parquet), streamed as they stand, and their cells made uniform."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from t2v import storage

_BATCH_ROWS = 10_000
_BUFFER_BYTES = 4 << 20  # read at a time of each column of a Parquet file, however large its row groups are
_CSV_BLOCKS = pacsv.ReadOptions(block_size=16 << 20)  # which a row must fit
_DURATION = re.compile(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?")


class Reader(NamedTuple):
    """How one kind of file is read: `names` tells its columns, `batches` streams those named in the file's order.

    Both take the path first. Values are as they stand in the file; ValueError names it if it cannot be parsed.
    """

    names: Callable[[str], list[str]]
    batches: Callable[[str, list[str]], Iterator[pa.RecordBatch]]


def reader_of(path: str) -> Reader | None:
    """The reader that a path has by the end of its name; None where there is none."""
    match path.rsplit(".", 1)[-1].lower():
        case "parquet":
            return Reader(_parquet_names, _parquet_batches)
        case "jsonl":
            return Reader(_json_names, _json_batches)
        case "csv":
            return Reader(partial(_csv_names, ","), partial(_csv_batches, ","))
        case "tsv":
            return Reader(partial(_csv_names, "\t"), partial(_csv_batches, "\t"))
    return None


def texts(column: pa.Array) -> pa.Array:
    """Any column as text without space around it: "" for what is missing, U+FFFD for bytes that are no UTF-8."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_integer(kind):
        column = column.cast(pa.string())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.binary())
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        column = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    try:
        column = column.cast(pa.string())
    except pa.ArrowInvalid:
        read = (None if value is None else value.decode(errors="replace") for value in column.to_pylist())
        column = pa.array(list(read), pa.string())
    return pc.utf8_trim_whitespace(pc.fill_null(column, ""))


def numbers(column: pa.Array) -> pa.Array:
    """Any column as float64: also the seconds of durations like WebVid's PT00H00M13S; null for what is no number."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        found = column.cast(pa.float64(), safe=False)
    else:
        distinct = texts(column).dictionary_encode()  # sizes and durations repeat: each is parsed once
        parsed = pa.array([_number(text) for text in distinct.dictionary.to_pylist()], pa.float64())
        found = parsed.take(distinct.indices)
    return pc.if_else(pc.is_finite(found), found, None)


def _number(text: str) -> float:
    if match := _DURATION.fullmatch(text):
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return 3600 * hours + 60 * minutes + seconds
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of parsing (Arrow's and JSON's are ValueErrors; JSON may nest too deep) get the name of the file."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parquet_names(path: str) -> list[str]:
    with _naming(path), storage.open_read(path) as file:
        return pq.ParquetFile(file).schema_arrow.names


def _parquet_batches(path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    with _naming(path), storage.open_read(path, ahead=False) as file:
        yield from pq.ParquetFile(file, buffer_size=_BUFFER_BYTES).iter_batches(
            _BATCH_ROWS, columns=names, use_threads=False
        )


def _json_names(path: str) -> list[str]:
    with _naming(path), storage.open_read(path) as file:
        lines = (line for line in file if line.strip())
        return list(dict.fromkeys(name for line in islice(lines, _BATCH_ROWS) for name in _json_object(line)))


def _json_batches(path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    with _naming(path), storage.open_read(path) as file:
        lines: Iterable[bytes] = (line for line in file if line.strip())
        while block := [_json_object(line) for line in islice(lines, _BATCH_ROWS)]:
            cells = {name: [row.get(name) for row in block] for name in names}
            yield pa.record_batch({name: [_json_text(value) for value in column] for name, column in cells.items()})


def _json_object(line: bytes) -> dict:
    if not isinstance(value := json.loads(line), dict):
        raise ValueError(f"{line[:40]!r} is no JSON object")
    return value


def _json_text(value: object) -> str:
    """Without the lone surrogates that JSON can spell, which no file can hold."""
    return "" if value is None else str(value).encode(errors="replace").decode()


def _csv_names(delimiter: str, path: str) -> list[str]:
    with _naming(path), storage.open_read(path) as file:
        return pacsv.open_csv(file, _CSV_BLOCKS, _csv_options(delimiter)).schema.names


def _csv_batches(delimiter: str, path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    """As bytes, for captions are not always UTF-8."""
    convert = pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.binary()))
    with _naming(path), storage.open_read(path) as file:
        yield from pacsv.open_csv(file, _CSV_BLOCKS, _csv_options(delimiter), convert)


def _csv_options(delimiter: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
