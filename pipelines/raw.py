"""What was downloaded, kept as it came: WebDataset tars in img2dataset's layout, which are also an input."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.fetch import Fetched, extension
from t2v import storage

_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "url", "caption", "row_id", "status", "error_message")]
    + [("original_width", pa.int32()), ("original_height", pa.int32()), ("bytes", pa.int64())]
)


def write_raw(folder: str, name: str, rows: Sequence[dict], fetched: Sequence[Fetched]) -> None:
    """Write one shard: <name>.tar of key.jpg or .mp4, key.txt and key.json, <name>.parquet of all rows, _stats.json.

    Bytes are as they were downloaded and members are named after what they begin with; sizes in pixels are those
    of the manifest, because nothing is decoded here. Each file is written atomically, the tar first; equal input
    gives equal bytes.
    """
    from webdataset.writer import TarWriter

    records = [_record(f"{index:09d}", row, one) for index, (row, one) in enumerate(zip(rows, fetched, strict=True))]
    with storage.open_atomic(storage.join(folder, f"{name}.tar")) as file, TarWriter(file, mtime=0) as tar:
        for record, one in zip(records, fetched, strict=True):
            if one.status == "ok":
                described = {"txt": record["caption"], "json": json.dumps(record)}
                tar.write({"__key__": record["key"], str(extension(one.body)): one.body} | _encoded(described))
    with storage.open_atomic(storage.join(folder, f"{name}.parquet")) as file:
        pq.write_table(pa.Table.from_pylist(records, _SCHEMA), file, compression="zstd")
    successes = sum(one.status == "ok" for one in fetched)
    stats = {
        "count": len(records),
        "successes": successes,
        "failed_to_download": len(records) - successes,
        "failed_to_resize": 0,
        "status_dict": Counter("success" if one.status == "ok" else one.status for one in fetched),
    }
    storage.write_json(storage.join(folder, f"{name}_stats.json"), stats)


def _record(key: str, row: dict, fetched: Fetched) -> dict[str, Any]:
    ok = fetched.status == "ok"
    return {
        "key": key,
        "url": row["url"],
        "caption": row["caption"],
        "row_id": row["row_id"],
        "status": "success" if ok else "failed_to_download",
        "error_message": None if ok else f"{fetched.status}: {fetched.message}",
        "original_width": row["width"],
        "original_height": row["height"],
        "bytes": len(fetched.body),
    }


def _encoded(texts: dict[str, str]) -> dict[str, bytes]:
    return {name: text.encode(errors="replace") for name, text in texts.items()}
