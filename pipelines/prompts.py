"""What to generate: prompts and their seeds, from a text, CSV, JSONL or Parquet file."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from t2v import storage

COLUMNS = ("prompt", "caption", "sentence", "text")  # the first that a file has is taken


class Prompt(NamedTuple):
    """One video to be: the words and the seed of its noise."""

    text: str
    seed: int


def read_prompts(path: str, seed: int) -> list[Prompt]:
    """The prompts of a file in its order: .txt has one a line, the others a column named as in COLUMNS.

    A column `seed` may give each its own; where it is absent or empty a prompt takes `seed`, and each repetition of
    the same prompt the next one up, so that a line written twice gives two videos. FileNotFoundError, or ValueError
    that names the file, the line or row and what is wrong with it.
    """
    if not storage.exists(path):
        raise FileNotFoundError(f"{path}: no such prompt file")
    try:
        rows = list(_rows(path))
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not rows:
        raise ValueError(f"{path}: no prompts in it")
    seen: Counter[str] = Counter()
    prompts = []
    for place, text, given in rows:
        prompts.append(Prompt(text, seed + seen[text] if given is None else _seed(f"{path}, {place}", given)))
        seen[text] += given is None
    return prompts


def _rows(path: str) -> Iterator[tuple[str, str, Any]]:
    """(place in the file, prompt, seed or None) of all rows; empty lines of a text file are skipped."""
    kind = path.rsplit(".", 1)[-1].lower()
    if kind == "txt":
        return ((f"line {number}", line, None) for number, line in _lines(path))
    if kind == "csv":
        return _columns(path, csv.DictReader(io.StringIO(_text(path), newline="")))
    if kind == "jsonl":
        return _columns(path, _objects(path))
    if kind == "parquet":
        with storage.open_read(path) as file:
            return _columns(path, _table(path, file))
    raise ValueError(f"{path}: prompts come from .txt, .csv, .jsonl or .parquet")


def _text(path: str) -> str:
    return storage.read_bytes(path).decode("utf-8-sig")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    lines = enumerate(_text(path).split("\n"), 1)
    return ((number, line.strip()) for number, line in lines if line.strip())


def _objects(path: str) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        yield value


def _table(path: str, file: Any) -> list[dict[str, Any]]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    return parquet.read(columns=[_column(path, names), *({"seed"} & set(names))]).to_pylist()


def _columns(path: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    for number, row in enumerate(rows, 1):
        text = row.get(_column(path, row))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, row {number}: the prompt is empty")
        given = row.get("seed")
        yield f"row {number}", text.strip(), None if given == "" else given


def _column(path: str, names: Iterable[str]) -> str:
    names = list(names)
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(f"{path}: none of the columns {', '.join(COLUMNS)}; it has {', '.join(map(str, names))}")


def _seed(place: str, given: Any) -> int:
    whole = int(given) if isinstance(given, float) and given.is_integer() else given
    if not str(whole).isdecimal() or int(whole) >= 2**63:
        raise ValueError(f"{place}: seed {given!r} is no whole number from 0 to 2^63 - 1")
    return int(whole)
