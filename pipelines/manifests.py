"""Lists of URLs and captions as the world has them, streamed into one form whose row groups are the shards."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipelines.columns import REQUIRED, column_map
from t2v import storage
from t2v.digest import digest_of

Value = bytes | str | float | None  # a cell of a manifest
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("duration_s", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_BATCH_ROWS = 10_000
_DURATION = re.compile(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?")


@dataclass(frozen=True)
class Manifest:
    """A normalised manifest: row group k of the Parquet file at `path` is shard k.

    `shards` holds, for each, its number of rows and a hash of its rows, from which shard names are made.
    """

    path: str
    shards: tuple[tuple[int, str], ...]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.shards)


def row_id(dataset: str, url: str) -> str:
    """The name by which a row is followed from URL to training step: 16 hex digits of (dataset, URL or path)."""
    return hashlib.blake2b(f"{dataset}\0{url}".encode(), digest_size=8).hexdigest()


def read_manifest(path: str, columns: str) -> Iterator[pa.RecordBatch]:
    """Stream a CSV, TSV, JSONL or Parquet file in batches of the normalised schema, in the file's order.

    A row without URL keeps its place, with the URL empty. ValueError, at once, names the file, the columns that
    it has and those wanted; also if a line cannot be parsed, because then no count of its rows can be right.
    """
    wanted = column_map(columns)
    names = _column_names(path)
    chosen = {ours: next((name for name in theirs if name in names), None) for ours, theirs in wanted.items()}
    missing = [" or ".join(wanted[name]) for name in REQUIRED if chosen[name] is None]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}, which columns={columns!r} wants; it has {', '.join(names)}"
        )
    source = {ours: theirs for ours, theirs in chosen.items() if theirs is not None}
    return (_normalised(batch, source, columns) for batch in _batches(path, list(source.values())))


def normalise(source: str, columns: str, shard_rows: int, path: str) -> Manifest:
    """Write `source` in the normalised form at `path`, one row group a shard of `shard_rows` rows, atomically.

    Nothing is read or written if neither the file nor the settings have changed since.
    """
    if not storage.exists(source):
        raise FileNotFoundError(f"{source}: no such manifest")
    summary = path.removesuffix(".parquet") + ".json"
    settings = {
        "source": source,
        "fingerprint": storage.fingerprint(source),
        "columns": columns,
        "shard_rows": shard_rows,
    }
    known = storage.read_json(summary) if storage.exists(summary) else {}
    if known.get("settings") == settings and storage.exists(path):
        return Manifest(path, tuple((rows, digest) for rows, digest in known["shards"]))
    shards = []
    batches = read_manifest(source, columns)
    with storage.open_atomic(path) as file, pq.ParquetWriter(file, SCHEMA, write_statistics=False) as writer:
        for table in _tables(batches, shard_rows):
            writer.write_table(table, row_group_size=shard_rows)
            shards.append((table.num_rows, _digest(table)))
        if not shards:
            raise ValueError(f"{source}: the manifest has no rows")
    storage.write_json(summary, {"settings": settings, "shards": shards})
    return Manifest(path, tuple(shards))


def read_shard(path: str, index: int) -> list[dict]:
    """The rows of one shard of a normalised manifest."""
    with storage.open_read(path) as file:
        return pq.ParquetFile(file).read_row_group(index).to_pylist()


def beside(manifest: str, path: str) -> str:
    """Where a path of a manifest leads: relative ones are relative to the manifest's own folder."""
    if "://" in path or path.startswith("/"):
        return path
    return storage.join(manifest.rpartition("/")[0] or ".", path)


def _column_names(path: str) -> list[str]:
    kind = _kind(path)
    with _naming(path), storage.open_read(path) as file:
        if kind == "parquet":
            return pq.ParquetFile(file).schema_arrow.names
        if kind == "jsonl":
            return list(_json_object(file.readline() or b"{}"))
        return pacsv.open_csv(file, parse_options=_csv_options(kind)).schema.names


def _batches(path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The named columns as they stand; those of text files as bytes, for captions are not always UTF-8."""
    kind = _kind(path)
    with _naming(path), storage.open_read(path) as file:
        if kind == "parquet":
            yield from pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=names)
        elif kind == "jsonl":
            yield from _json_batches(file, names)
        else:
            convert = pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.binary()))
            yield from pacsv.open_csv(file, parse_options=_csv_options(kind), convert_options=convert)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of parsing (Arrow's and JSON's are ValueErrors; JSON may nest too deep) get the name of the file."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _json_batches(file: Iterable[bytes], names: list[str]) -> Iterator[pa.RecordBatch]:
    lines = (line for line in file if line.strip())
    while block := [_json_object(line) for line in islice(lines, _BATCH_ROWS)]:
        yield pa.record_batch({name: [_text(row.get(name)) for row in block] for name in names})


def _json_object(line: bytes) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a line is no JSON object: {line[:80]!r}")
    return row


def _kind(path: str) -> str:
    kind = path.rsplit(".", 1)[-1].lower()
    if kind not in ("csv", "tsv", "jsonl", "parquet"):
        raise ValueError(f"{path}: a manifest is a .csv, .tsv, .jsonl or .parquet file")
    return kind


def _csv_options(kind: str) -> pacsv.ParseOptions:
    return pacsv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True)


def _normalised(batch: pa.RecordBatch, source: dict[str, str], dataset: str) -> pa.RecordBatch:
    values = {ours: batch.column(theirs).to_pylist() for ours, theirs in source.items()}
    url = [_text(value).strip() for value in values["url"]]
    unknown = [None] * len(url)
    columns = [
        [row_id(dataset, value) for value in url],
        url,
        [_text(value).strip() for value in values["caption"]],
        [_number(value) for value in values.get("duration_s", unknown)],
        [_whole(value) for value in values.get("width", unknown)],
        [_whole(value) for value in values.get("height", unknown)],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def _text(value: Value) -> str:
    """As Unicode that can be stored: without broken UTF-8 and without the lone surrogates that JSON can spell."""
    if value is None:
        return ""
    return (value if isinstance(value, bytes) else str(value).encode(errors="replace")).decode(errors="replace")


def _number(value: Value) -> float | None:
    """A number, or the seconds of a duration such as WebVid's PT00H00M13S; None for anything else."""
    text = _text(value).strip()
    if match := _DURATION.fullmatch(text):
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return 3600 * hours + 60 * minutes + seconds
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < 2**31 else None


def _whole(value: Value) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _tables(batches: Iterable[pa.RecordBatch], shard_rows: int) -> Iterator[pa.Table]:
    pending = SCHEMA.empty_table()
    for batch in batches:
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
        while pending.num_rows >= shard_rows:
            yield pending.slice(0, shard_rows)
            pending = pending.slice(shard_rows)
    if pending.num_rows:
        yield pending


def _digest(table: pa.Table) -> str:
    """Stands for the rows of a shard: what was asked for and what it is called."""
    return digest_of(list(zip(table["row_id"].to_pylist(), table["caption"].to_pylist(), strict=True)))
