"""Every input row ends in the ledger with a status; the funnel is its sum by stream and status."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from t2v import storage

Status = Literal[
    "ok",
    "filtered_size",
    "filtered_aspect",
    "filtered_unsafe",
    "filtered_similarity",
    "filtered_watermark",
    "filtered_aesthetic",
    "filtered_language",
    "filtered_duration",
    "duplicate_url",
    "no_url",
    "dns",
    "connection",
    "timeout",
    "http_404",
    "http_error",
    "too_many_redirects",
    "forbidden_address",
    "opt_out",
    "empty",
    "too_large",
    "not_media",
    "corrupt",
    "too_short",
    "too_many_pixels",
    "decode_timeout",
    "decoder_crashed",
    "filtered_cuts",
    "filtered_static",
    "filtered_motion",
    "filtered_nsfw",
    "filtered_score",
    "filter_failed",
    "filtered_duplicate",
]
Stage = Literal["manifest", "fetch", "decode", "filter", "encode"]
Funnel = dict[str, Counter[str]]

_READ_AT_ONCE = 1000  # summaries

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("url", pa.string()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("message", pa.string()),
        ("bytes", pa.int64()),
        ("seconds", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Entry:
    """How one input row ended: `stage` is the last one that saw it, `bytes` and `seconds` those of its download."""

    row_id: str
    url: str
    status: Status
    stage: Stage
    message: str
    bytes: int
    seconds: float


def write_ledger(path: str, entries: Sequence[Entry]) -> None:
    """Write one shard's part of the ledger, atomically; all parts of a stream are one Parquet dataset."""
    table = pa.Table.from_pylist([asdict(entry) for entry in entries], schema=SCHEMA)
    with storage.open_atomic(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_done(data: str, stream: str, names: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Name and summary of those of the named shards that are done; `data` is the run's data folder."""
    folder = storage.join(data, "done", stream)
    done = set(storage.listing(folder, ".json"))
    present = (name for name in names if f"{name}.json" in done)
    while some := list(islice(present, _READ_AT_ONCE)):
        contents = storage.read_many([storage.join(folder, f"{name}.json") for name in some])
        yield from zip(some, map(json.loads, contents), strict=True)


def by_size(summary: dict) -> dict[int | None, dict]:
    """What the summary of a shard says of its latents: of `data.size` (None), and of each of `data.also_sizes`."""
    return {None: summary} | {int(size): said for size, said in summary.get("also", {}).items()}


def funnel_text(funnel: Mapping[str, Mapping[str, int]]) -> str:
    """The funnel as a table: one column a stream, rows in, each status that occurs, and the yield in per cent."""
    streams = sorted(funnel, reverse=True)
    lines = [("", *streams), ("rows in", *(f"{sum(funnel[stream].values()):,}" for stream in streams))]
    for status in get_args(Status):
        counts = [funnel[stream].get(status, 0) for stream in streams]
        if any(counts) or status == "ok":
            lines.append((f"  {status}", *(f"{count:,}" for count in counts)))
    lines.append(("yield", *(f"{yield_percent(funnel[stream]):.1f} %" for stream in streams)))
    return "\n".join(f"{label:<22}" + "".join(f"{cell:>14}" for cell in cells) for label, *cells in lines)


def yield_percent(statuses: Mapping[str, int]) -> float:
    """Rows with status ok in 100 rows; 0 for an empty stream."""
    rows = sum(statuses.values())
    return 100 * statuses.get("ok", 0) / rows if rows else 0.0
