"""Lists of URLs and captions as the world has them, streamed into one form whose row groups are the shards.

A normalised manifest is a folder: parts of so many row groups that a footer stays small, and, written last, the list
of all shards with the settings that made them.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, count, islice
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.archives import COLUMNS, archive_fingerprint, is_archive, read_archive
from pipelines.cells import addresses, check_cells
from pipelines.columns import column_map, required
from pipelines.config import RowFilters, StreamConfig
from pipelines.row_filters import rules, verdicts
from pipelines.tables import Reader, numbers, reader_of, texts
from pipelines.url_duplicates import Duplicates
from t2v import storage
from t2v.digest import digest_of

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
# A row that is not to be fetched has its status and message from the start; `address` is where its bytes lie in a cell.
STORED = pa.schema([*SCHEMA, ("address", pa.string()), ("status", pa.string()), ("message", pa.string())])
Source = Literal["urls", "archive", "cells"]
_LABELS = ("nsfw", "language")  # optional columns of text; the others that only filters read are float32
_SHARDS = pa.schema([("rows", pa.int32()), ("digest", pa.string())])
_SHARDS_FILE = "shards.parquet"
_SHARDS_PER_PART = 64
_DUPLICATE = "an earlier row has the same URL"
_ARCHIVE = Reader(lambda _: list(COLUMNS), lambda path, names: (rows.select(names) for rows in read_archive(path)))


@dataclass(frozen=True)
class Manifest:
    """A normalised manifest: the folder that `read_shard` reads.

    `shards` has a row for each shard: its number of rows and a digest of them, from which shard names are made.
    `source` tells whether URLs are to be downloaded, or the bytes are there already: at URLs that are addresses within
    an archive (pipelines/archives.py), or at the addresses of cells (pipelines/cells.py).
    """

    path: str
    shards: pa.Table
    source: Source

    @property
    def digest(self) -> str:
        """Stands for all rows."""
        return digest_of(self.shards["digest"].to_pylist())

    @property
    def rows(self) -> int:
        return pc.sum(self.shards["rows"]).as_py()


@dataclass(frozen=True)
class _File:
    """A file of a manifest and where its columns are: ours <- theirs; `cells` names the one that holds media."""

    path: str
    reader: Reader
    source: dict[str, str]
    cells: str | None


def row_id(dataset: str, url: str) -> str:
    """The name by which a row is followed from URL to training step: 16 hex digits of (dataset, URL or path)."""
    return hashlib.blake2b(f"{dataset}\0{url}".encode(), digest_size=8).hexdigest()


def read_manifest(manifest: str, columns: str) -> Iterator[pa.RecordBatch]:
    """Stream a CSV, TSV, JSONL or Parquet file, or a folder or glob of them, in batches of the normalised schema.

    Files come in the order of their names. A row without URL keeps its place, with the URL empty. ValueError, at
    once, names the file, the columns that it has and those wanted; also if a line cannot be parsed, because then no
    count of its rows can be right. FileNotFoundError if there is no such file.
    """
    files = _files(manifest, columns, RowFilters())
    if any(file.cells for file in files):
        raise ValueError(f"{manifest}: columns={columns!r} is of media in cells, but a list of URLs is wanted here")
    return (_identified(batch, columns).select(SCHEMA.names) for batch in _batches(files))


def normalise(config: StreamConfig, path: str) -> Manifest:
    """Write a stream's manifest in the normalised form into the folder `path`, one row group a shard.

    Rows that a filter refuses and duplicates keep their places and get their status. Nothing is read or written if
    neither the files nor the settings have changed since.
    """
    manifest = str(config.manifest)
    source = _source(config)
    fingerprint = archive_fingerprint if source == "archive" else storage.fingerprint
    settings = asdict(config) | {"source": source, "files": [(one, fingerprint(one)) for one in _paths(manifest)]}
    key = json.dumps(settings, sort_keys=True).encode()
    if (known := _known(path)) is not None and (known.schema.metadata or {}).get(b"settings") == key:
        return stored(path)
    files = _files(manifest, config.columns, config.filters)
    for name in (_SHARDS_FILE, *storage.listing(path, ".parquet")):
        storage.remove(storage.join(path, name))
    with tempfile.TemporaryDirectory() as folder:
        rows = _judged(files, config.filters)
        if config.drop_duplicates:
            duplicates = Duplicates(map(_wanted_urls, _judged(files, config.filters)), folder)
            rows = _without(rows, duplicates)
        batches = (_identified(batch, config.columns).select(STORED.names) for batch in rows)
        parts = list(_write_parts(path, _tables(batches, config.shard_rows)))
    if not parts:
        raise ValueError(f"{manifest}: the manifest has no rows")
    shards = pa.concat_tables(parts)
    with storage.open_atomic(storage.join(path, _SHARDS_FILE)) as file:
        pq.write_table(shards.replace_schema_metadata({"settings": key}), file)
    return Manifest(path, shards, source)


def stored(path: str) -> Manifest:
    """A manifest that was normalised before."""
    if (known := _known(path)) is None:
        raise FileNotFoundError(f"{path}: no such manifest")
    settings = json.loads(known.schema.metadata[b"settings"])
    return Manifest(path, known.replace_schema_metadata(), settings["source"])


def read_shard(path: str, index: int) -> list[dict]:
    """The rows of one shard of a normalised manifest; status and message are None where there is a URL to fetch."""
    part, group = divmod(index, _SHARDS_PER_PART)
    with storage.open_read(_part(path, part), ahead=False) as file:
        return pq.ParquetFile(file, pre_buffer=True).read_row_group(group).to_pylist()


def beside(manifest: str, path: str) -> str:
    """Where a path of a manifest leads: relative ones are relative to the manifest's own folder."""
    if "://" in path or path.startswith("/"):
        return path
    return storage.join(manifest.rpartition("/")[0] or ".", path)


def _source(config: StreamConfig) -> Source:
    if is_archive(str(config.manifest)):
        return "archive"
    return "cells" if "bytes" in column_map(config.columns) else "urls"


def _paths(manifest: str) -> list[str]:
    """The files of a manifest, sorted; of a folder, those that a reader knows."""
    if is_archive(manifest):
        return [manifest]
    if "*" in manifest:
        paths = storage.matches(manifest)
    elif storage.is_file(manifest):
        paths = [manifest]
    else:
        paths = [storage.join(manifest, name) for name in storage.listing(manifest)]
        paths = [path for path in paths if reader_of(path)]
    if not paths:
        raise FileNotFoundError(f"{manifest}: no such manifest, nor a folder or pattern of any")
    return paths


def _files(manifest: str, columns: str, filters: RowFilters) -> list[_File]:
    """The files of a manifest with their columns, all of which are looked at before any row is read."""
    with ThreadPoolExecutor(16) as pool:  # each is a request or two where storage is remote
        return list(pool.map(lambda path: _file(path, columns, filters), _paths(manifest)))


def _file(path: str, columns: str, filters: RowFilters) -> _File:
    reader = reader_of(path)
    if is_archive(path):
        reader, columns = _ARCHIVE, "generic"
    elif reader is None:
        raise ValueError(f"{path}: a manifest is a .csv, .tsv, .jsonl or .parquet file, or a tar")
    names, wanted = reader.names(path), column_map(columns)
    source = {ours: next((name for name in theirs if name in names), None) for ours, theirs in wanted.items()}
    missing = [" or ".join(wanted[name]) for name in required(wanted) if source[name] is None]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}, which columns={columns!r} wants; it has {', '.join(names)}"
        )
    if (cells := source.pop("bytes", None)) is not None:
        check_cells(path, cells)
    used = set(SCHEMA.names)
    for rule in rules(filters):
        used |= set(rule.wants)
        for ours in rule.wants:
            if source.get(ours) is None:
                theirs = " or ".join(wanted.get(ours, (ours,)))
                raise ValueError(
                    f"{path}: no column {theirs}, which filters.{rule.option} wants by columns={columns!r}; "
                    f"it has {', '.join(names)}"
                )
    return _File(path, reader, {ours: theirs for ours, theirs in source.items() if theirs and ours in used}, cells)


def _batches(files: Iterable[_File]) -> Iterator[pa.RecordBatch]:
    """All rows in the stored schema, save row_id and status, with the columns that only filters read behind."""
    for file in files:
        start = 0
        for batch in file.reader.batches(file.path, list(dict.fromkeys(file.source.values()))):
            columns = {ours: _uniform(ours, batch.column(theirs)) for ours, theirs in file.source.items()}
            if file.cells:
                columns["address"] = addresses(file.path, file.cells, start, batch.num_rows)
                named = columns.get("url", columns["address"])
                columns["url"] = pc.if_else(pc.equal(named, ""), columns["address"], named)
            for field in STORED:
                if field.name not in ("row_id", "status", "message", *columns):
                    columns[field.name] = pa.nulls(batch.num_rows, field.type)
            start += batch.num_rows
            yield pa.record_batch(columns)


def _uniform(ours: str, column: pa.Array) -> pa.Array:
    if ours in ("url", "caption"):
        return texts(column)
    if ours in _LABELS:
        label = texts(column)
        return pc.if_else(pc.equal(label, ""), None, label)
    value = numbers(column)
    if ours not in SCHEMA.names:  # a score
        return value.cast(pa.float32(), safe=False)
    possible = pc.and_(pc.greater_equal(value, 0), pc.less(value, 2.0**31))
    return pc.if_else(possible, value, None).cast(SCHEMA.field(ours).type, safe=False)


def _identified(batch: pa.RecordBatch, dataset: str) -> pa.RecordBatch:
    ids = [row_id(dataset, url) for url in batch.column("url").to_pylist()]
    return batch.append_column("row_id", pa.array(ids, pa.string()))


def _judged(files: Iterable[_File], filters: RowFilters) -> Iterator[pa.RecordBatch]:
    """All rows, with status and message of those that a filter refuses."""
    for batch in _batches(files):
        status, message = verdicts(batch, filters)
        yield batch.append_column("status", status).append_column("message", message)


def _wanted_urls(batch: pa.RecordBatch) -> pa.Array:
    """The URLs that are to be fetched; null for the other rows."""
    wanted = pc.and_(batch.column("status").is_null(), pc.not_equal(batch.column("url"), ""))
    return pc.if_else(wanted, batch.column("url"), None)


def _without(batches: Iterable[pa.RecordBatch], duplicates: Duplicates) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in batches:
        again = pa.array(duplicates.among(start, batch.num_rows))
        start += batch.num_rows
        for name, value in (("status", "duplicate_url"), ("message", _DUPLICATE)):
            place = batch.schema.get_field_index(name)
            batch = batch.set_column(place, name, pc.if_else(again, value, batch.column(name)))
        yield batch


def _tables(batches: Iterable[pa.RecordBatch], shard_rows: int) -> Iterator[pa.Table]:
    pending = STORED.empty_table()
    for batch in batches:
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
        while pending.num_rows >= shard_rows:
            yield pending.slice(0, shard_rows)
            pending = pending.slice(shard_rows)
    if pending.num_rows:
        yield pending


def _write_parts(path: str, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Write shards as row groups; yields, part by part, the list of its shards."""
    for number in count():
        if (first := next(tables, None)) is None:
            return
        shards = []
        with (
            storage.open_atomic(_part(path, number)) as file,
            pq.ParquetWriter(file, STORED, write_statistics=False) as writer,
        ):
            for table in chain([first], islice(tables, _SHARDS_PER_PART - 1)):
                writer.write_table(table, row_group_size=table.num_rows)
                shards.append({"rows": table.num_rows, "digest": _digest(table)})
        yield pa.Table.from_pylist(shards, _SHARDS)


def _part(path: str, number: int) -> str:
    return storage.join(path, f"{number:06d}.parquet")


def _known(path: str) -> pa.Table | None:
    """The list of shards that an earlier run left, with its settings in the schema's metadata."""
    summary = storage.join(path, _SHARDS_FILE)
    if not storage.exists(summary):
        return None
    with storage.open_read(summary) as file:
        return pq.read_table(file)


def _digest(table: pa.Table) -> str:
    """Stands for the rows of a shard: what was asked for, what it is called, and what is not to be fetched."""
    names = ("row_id", "caption") + (("status",) if table["status"].null_count < table.num_rows else ())
    return digest_of(list(zip(*(table[name].to_pylist() for name in names), strict=True)))
