import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cells import addresses, read_cells
from pipelines.columns import column_map
from pipelines.config import RowFilters, StreamConfig
from pipelines.manifests import normalise, read_manifest, read_shard, row_id
from t2v import storage
from tests.pipelines.test_archives import JPEG, MP4

MAX_BYTES = 50_000


def body(index):
    return JPEG + index.to_bytes(2, "big")


def table(rows):
    known = [{"jpg": body(index), "txt": f"caption {index}", "url": f"http://a/{index}.jpg"} for index in range(rows)]
    return pa.Table.from_pylist(known)


def stored(config, folder):
    manifest = normalise(config, str(folder / "manifest"))
    return [row for index in range(manifest.shards.num_rows) for row in read_shard(manifest.path, index)]


def ends(rows, max_bytes=MAX_BYTES):
    return [(one.status, one.body) for one in read_cells([row["address"] for row in rows], max_bytes)]


@pytest.mark.parametrize("where", ["{}/m#1.parquet", "memory://cells/m.parquet"])
@pytest.mark.parametrize("group_rows", [3, 10, 1000])
def test_every_cell_is_read_back_whatever_the_row_groups(tmp_path, where, group_rows):
    path = where.format(tmp_path)
    with storage.open_atomic(path) as file:
        pq.write_table(table(25), file, row_group_size=group_rows)
    rows = stored(StreamConfig(path, "encoded", shard_rows=4), tmp_path)
    assert [row["caption"] for row in rows] == [f"caption {index}" for index in range(25)]
    assert ends(rows) == [("ok", body(index)) for index in range(25)]
    backwards = [rows[index] for index in (24, 7, 7, 0)]
    assert ends(backwards) == [("ok", body(index)) for index in (24, 7, 7, 0)]


def test_a_row_is_called_after_its_url_and_after_its_place_where_it_has_none(tmp_path):
    path = str(tmp_path / "m.parquet")
    pq.write_table(table(2).set_column(2, "url", pa.array(["http://a/0.jpg", None])), path)
    for columns, urls in (
        ("bytes=jpg,caption=txt,url=url", ["http://a/0.jpg", f"{path}#row=1&column=jpg"]),
        ("bytes=jpg,caption=txt", [f"{path}#row=0&column=jpg", f"{path}#row=1&column=jpg"]),
    ):
        rows = stored(StreamConfig(path, columns), tmp_path)
        assert [row["url"] for row in rows] == urls
        assert [row["row_id"] for row in rows] == [row_id(columns, url) for url in urls]
        assert [status for status, _ in ends(rows)] == ["ok", "ok"]


def test_rows_are_filtered_by_columns_and_duplicates_of_a_url_dropped(tmp_path):
    path = str(tmp_path / "m.parquet")
    twice = pa.concat_tables([table(3), table(2)]).append_column("width", pa.array([64, 640, 640, 640, 640]))
    pq.write_table(twice.append_column("height", pa.array([64] + [480] * 4)), path)
    config = StreamConfig(path, "encoded", filters=RowFilters(min_side=100), drop_duplicates=True)
    statuses = [row["status"] for row in stored(config, tmp_path)]
    assert statuses == ["filtered_size", None, None, None, "duplicate_url"]


@pytest.mark.parametrize(
    ("cell", "status"),
    [(None, "empty"), (b"", "empty"), (b"<!doctype html>", "not_media"), (JPEG * 20, "too_large"), (MP4, "ok")],
)
def test_bad_cells_end_with_a_reason_and_their_neighbours_are_untouched(tmp_path, cell, status):
    path = str(tmp_path / "m.parquet")
    pq.write_table(pa.table({"jpg": [JPEG, cell, JPEG], "caption": ["a", "b", "c"]}), path)
    assert [one for one, _ in ends(stored(StreamConfig(path, "encoded"), tmp_path))] == ["ok", status, "ok"]


def test_pictures_of_hugging_face_data_sets_are_read(tmp_path):
    path = str(tmp_path / "m.parquet")
    cells = [{"bytes": JPEG, "path": "0.jpg"}, None, {"bytes": None, "path": "2.jpg"}]
    pq.write_table(pa.table({"image": cells, "text": ["a", "b", "c"]}), path)
    assert [one for one, _ in ends(stored(StreamConfig(path, "encoded"), tmp_path))] == ["ok", "empty", "empty"]


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(table(30), path, row_group_size=10, compression="none", use_dictionary=False)
    rows = stored(StreamConfig(str(path), "encoded"), tmp_path)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    assert [status for status, _ in ends(rows)] == ["ok"] * 10 + ["corrupt"] * 10 + ["ok"] * 10


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_whatever_bytes_are_flipped_every_row_ends_with_a_reason(tmp_path, compression):
    path, numbers = tmp_path / "m.parquet", random.Random(compression)
    pq.write_table(table(6), path, row_group_size=3, compression=compression)
    rows, whole = stored(StreamConfig(str(path), "encoded"), tmp_path), path.read_bytes()
    found = Counter()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(numbers.choice((1, 2, 30))):
            content[numbers.randrange(len(content))] = numbers.randrange(256)
        path.write_bytes(content)
        found.update(status for status, _ in ends(rows))
    assert found.total() == 300 * len(rows)
    assert set(found) <= {"ok", "corrupt", "empty", "not_media", "too_large"}


def test_a_file_that_shrank_or_vanished_since_gives_reasons(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(table(3), path)
    rows = stored(StreamConfig(str(path), "encoded"), tmp_path)
    pq.write_table(table(2), path)
    assert [status for status, _ in ends(rows)] == ["ok", "ok", "corrupt"]
    path.write_bytes(path.read_bytes()[:-100])
    assert {status for status, _ in ends(rows)} == {"corrupt"}
    path.unlink()
    assert {status for status, _ in ends(rows)} == {"connection"}


def test_a_list_is_made_without_reading_the_media(tmp_path):
    """Arrow's peak while 64 MB of media in one row group are listed, and while four of 64 cells are read."""
    path = str(tmp_path / "m.parquet")
    schema = pa.schema([("jpg", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_batch_size=4) as writer:
        cells = [JPEG + bytes([index]) * 1_000_000 for index in range(64)]
        writer.write_table(pa.table({"jpg": cells, "caption": ["x"] * 64}, schema))
    del cells
    pool = pa.system_memory_pool()
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)  # a pool of its own, whose peak is of this alone
    try:
        rows = stored(StreamConfig(path, "encoded"), tmp_path)
        assert pool.max_memory() < 8e6
        assert [status for status, _ in ends(rows[-4:], 2_000_000)] == ["ok"] * 4
        assert pool.max_memory() < 32e6
    finally:
        pa.set_memory_pool(before)


def test_wrong_columns_are_told_before_any_row_is_read(tmp_path):
    path = str(tmp_path / "m.parquet")
    pq.write_table(table(1), path)
    for columns, message in (
        ("bytes=png,caption=txt", r"m\.parquet: no column png, .* it has jpg, txt, url"),
        ("bytes=url,caption=txt", r"m\.parquet: column url holds string, not the bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            normalise(StreamConfig(path, columns), str(tmp_path / "manifest"))
    (tmp_path / "m.csv").write_text("jpg,caption\nx,y\n")
    with pytest.raises(ValueError, match=r"m\.csv: media in a column .* Parquet files alone"):
        normalise(StreamConfig(str(tmp_path / "m.csv"), "encoded"), str(tmp_path / "manifest"))
    with pytest.raises(ValueError, match="a list of URLs is wanted"):
        read_manifest(path, "encoded")
    with pytest.raises(ValueError, match="neither one of"):
        column_map("bytes=jpg,url=u")


def test_addresses_bear_any_name():
    (address,) = addresses("a#b&row=3.parquet", "j p&g", 7, 1).to_pylist()
    assert address == "a#b&row=3.parquet#row=7&column=j%20p%26g"
