import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.columns import column_map
from pipelines.manifests import normalise, read_manifest, read_shard, row_id
from t2v import storage

ROWS = [
    {"url": "http://a.example/0.mp4", "caption": "a dog, running"},
    {"url": "http://a.example/1.mp4", "caption": 'a "cat"\nin two lines'},
    {"url": "", "caption": "nothing to fetch"},
    {"url": "http://a.example/3.mp4", "caption": "größer"},
    {"url": "http://a.example/4.mp4", "caption": ""},
]


def write(path, rows):
    kind = path.suffix[1:]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def rows_of(path, columns):
    return [row for batch in read_manifest(path, columns) for row in batch.to_pylist()]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(kind, tmp_path):
    rows = rows_of(write(tmp_path / f"m.{kind}", ROWS), "generic")
    assert [{name: row[name] for name in ("url", "caption")} for row in rows] == ROWS
    assert rows[0]["row_id"] == row_id("generic", "http://a.example/0.mp4")
    assert len(rows[0]["row_id"]) == 16


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        (
            "webvid",
            {"videoid": 7, "contentUrl": "http://a/7.mp4", "duration": "PT00H01M13S", "page_dir": "x", "name": "cat"},
            {"url": "http://a/7.mp4", "caption": "cat", "duration_s": 73.0, "width": None, "height": None},
        ),
        (
            "laion2b-en",
            {"URL": "http://a/7.jpg", "TEXT": "cat", "WIDTH": 640.0, "HEIGHT": None, "similarity": 0.3},
            {"url": "http://a/7.jpg", "caption": "cat", "duration_s": None, "width": 640, "height": None},
        ),
        (
            "msrvtt",
            {"video_id": "video7", "sentence": "cat"},
            {"url": "video7", "caption": "cat", "duration_s": None, "width": None, "height": None},
        ),
        (
            "url=link, caption=title, duration_s=length",
            {"link": "http://a/7.mp4", "title": "cat", "length": 1.5},
            {"url": "http://a/7.mp4", "caption": "cat", "duration_s": 1.5, "width": None, "height": None},
        ),
    ],
)
def test_column_maps(columns, row, expected, tmp_path):
    for kind in ("csv", "parquet"):
        (found,) = rows_of(write(tmp_path / f"m.{kind}", [row]), columns)
        assert found == {"row_id": row_id(columns, expected["url"])} | expected


def test_a_caption_that_is_not_utf8_is_kept_as_far_as_it_can_be_read(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"url,caption\nhttp://a/1.mp4,caf\xe9\n")
    assert rows_of(str(tmp_path / "m.csv"), "generic")[0]["caption"] == "caf\ufffd"


def test_missing_columns_are_named_with_those_found_and_wanted(tmp_path):
    for kind in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"m.{kind}", [{"link": "x", "caption": "y"}])
        with pytest.raises(ValueError, match=rf"m\.{kind}: no column url, .*generic.* it has link, caption"):
            read_manifest(path, "generic")


def test_bad_maps_and_files(tmp_path):
    with pytest.raises(ValueError, match="'webvit' is neither one of webvid, laion2b-en"):
        column_map("webvit")
    with pytest.raises(ValueError, match="neither"):
        column_map("url=a,caption=b,colour=c")
    with pytest.raises(ValueError, match=r"m\.xlsx: a manifest is a .csv"):
        read_manifest(str(tmp_path / "m.xlsx"), "generic")
    (tmp_path / "m.csv").write_text("url,caption\na,b\na,b,c\n")
    with pytest.raises(ValueError, match=r"m\.csv: CSV parse error: Row #3: Expected 2 columns, got 3"):
        rows_of(str(tmp_path / "m.csv"), "generic")
    (tmp_path / "m.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"m\.parquet"):
        read_manifest(str(tmp_path / "m.parquet"), "generic")


def test_row_groups_are_shards(tmp_path):
    rows = [{"url": f"http://a/{number}.mp4", "caption": "x"} for number in range(25_003)]
    path = str(tmp_path / "manifest" / "videos.parquet")
    manifest = normalise(write(tmp_path / "m.csv", rows), "generic", 1000, path)
    assert (manifest.rows, len(manifest.shards), manifest.shards[-1][0]) == (25_003, 26, 3)
    assert len({digest for _, digest in manifest.shards}) == 26
    assert [row["url"] for row in read_shard(path, 10)] == [row["url"] for row in rows[10_000:11_000]]
    assert [row["url"] for row in read_shard(path, 25)] == [row["url"] for row in rows[25_000:]]


def test_an_unchanged_manifest_is_not_written_again_and_a_changed_one_is(tmp_path):
    source, path = tmp_path / "m.csv", str(tmp_path / "manifest.parquet")
    first = normalise(write(source, ROWS), "generic", 2, path)
    written = storage.fingerprint(path)
    assert normalise(str(source), "generic", 2, path) == first
    assert storage.fingerprint(path) == written
    changed = normalise(write(source, [*ROWS[:3], ROWS[3] | {"caption": "another"}]), "generic", 2, path)
    assert changed.shards[0] == first.shards[0]
    assert changed.shards[1] != first.shards[1]
    assert len(normalise(str(source), "generic", 4, path).shards) == 1


def test_no_manifest_and_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        normalise(str(tmp_path / "none.csv"), "generic", 2, str(tmp_path / "out.parquet"))
    (tmp_path / "m.csv").write_text("url,caption\n")
    with pytest.raises(ValueError, match=r"m\.csv: the manifest has no rows"):
        normalise(str(tmp_path / "m.csv"), "generic", 2, str(tmp_path / "out.parquet"))
    assert not storage.exists(str(tmp_path / "out.parquet"))
