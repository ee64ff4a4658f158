import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import url_duplicates
from pipelines.columns import column_map
from pipelines.config import RowFilters, StreamConfig
from pipelines.manifests import normalise, read_manifest, read_shard, row_id
from pipelines.prepare import StreamPlan
from t2v import storage

ROWS = [
    {"url": "http://a.example/0.mp4", "caption": "a dog, running"},
    {"url": "http://a.example/1.mp4", "caption": 'a "cat"\nin two lines'},
    {"url": "", "caption": "nothing to fetch"},
    {"url": "http://a.example/3.mp4", "caption": "größer"},
    {"url": "http://a.example/4.mp4", "caption": ""},
]
PLAIN = {"duration_s": None, "width": None, "height": None}


def write(path, rows):
    kind = path.suffix[1:]
    path.parent.mkdir(exist_ok=True)
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


def stored(manifest):
    return [row for index in range(manifest.shards.num_rows) for row in read_shard(manifest.path, index)]


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
            {"url": "http://a/7.mp4", "duration_s": 73.0},
        ),
        (
            "laion2b-en",
            {"URL": "http://a/7.jpg", "TEXT": "cat", "WIDTH": 640.0, "HEIGHT": None, "similarity": 0.3},
            {"url": "http://a/7.jpg", "width": 640},
        ),
        (
            "re-laion",
            {"url": "http://a/7.jpg", "caption": "cat", "width": 256, "original_width": 640, "height": 256},
            {"url": "http://a/7.jpg", "width": 640, "height": 256},
        ),
        ("msrvtt", {"video_id": "video7", "sentence": "cat"}, {"url": "video7"}),
        (
            "url=link, caption=title, duration_s=length",
            {"link": "http://a/7.mp4", "title": "cat", "length": 1.5},
            {"url": "http://a/7.mp4", "duration_s": 1.5},
        ),
    ],
)
def test_column_maps(columns, row, expected, tmp_path):
    for kind in ("csv", "parquet"):
        (found,) = rows_of(write(tmp_path / f"m.{kind}", [row]), columns)
        assert found == {"row_id": row_id(columns, expected["url"]), "caption": "cat"} | PLAIN | expected


def test_cells_are_trimmed_and_what_is_no_possible_number_is_unknown(tmp_path):
    (tmp_path / "m.csv").write_bytes(
        b"url,caption,duration_s,width\n"
        b"\x1c http://a/1.mp4\xc2\xa0,caf\xe9,PT1M0.5S,640.9\n"
        b"http://a/2.mp4,\x00, 7.5 ,-1\n"
        b"http://a/3.mp4,x,nan,1e12\n"
    )
    read = rows_of(str(tmp_path / "m.csv"), "generic")
    assert [(row["url"], row["caption"], row["duration_s"], row["width"]) for row in read] == [
        ("http://a/1.mp4", "caf\ufffd", 60.5, 640),
        ("http://a/2.mp4", "\0", 7.5, None),
        ("http://a/3.mp4", "x", None, None),
    ]


def test_a_folder_and_a_glob_are_one_manifest_in_the_order_of_names(tmp_path):
    write(tmp_path / "list" / "b.csv", ROWS[2:4])
    write(tmp_path / "list" / "a.parquet", ROWS[:2])
    write(tmp_path / "list" / "c.jsonl", ROWS[4:])
    (tmp_path / "list" / "README.md").write_text("no rows")
    for manifest, count in (("list", 5), ("list/*.*[lv]", 3), ("*/a.*", 2)):
        read = rows_of(str(tmp_path / manifest), "generic")
        assert [row["caption"] for row in read] == [row["caption"] for row in (ROWS if count != 3 else ROWS[2:])][
            :count
        ]
    write(tmp_path / "list" / "d.csv", [{"link": "x", "caption": "y"}])
    with pytest.raises(ValueError, match=r"d\.csv: no column url"):
        read_manifest(str(tmp_path / "list"), "generic")


def test_a_manifest_on_another_file_system_reads_alike(tmp_path):
    for kind in ("csv", "parquet"):
        with storage.open_atomic(f"memory://lists/{kind}/m.{kind}") as file:
            file.write(storage.read_bytes(write(tmp_path / f"m.{kind}", ROWS)))
        for manifest in (f"memory://lists/{kind}", f"memory://lists/{kind}/*", f"memory://lists/{kind}/m.{kind}"):
            assert rows_of(manifest, "generic") == rows_of(str(tmp_path / f"m.{kind}"), "generic")
    remote = normalise(StreamConfig("memory://lists/csv", "generic", 2), "memory://run/manifest")
    assert [row["url"] for row in stored(remote)] == [row["url"] for row in ROWS]


def test_missing_columns_are_named_with_those_found_and_wanted(tmp_path):
    for kind in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"m.{kind}", [{"link": "x", "caption": "y"}])
        with pytest.raises(ValueError, match=rf"m\.{kind}: no column url, .*generic.* it has link, caption"):
            read_manifest(path, "generic")


def test_columns_of_jsonl_may_come_late_and_captions_be_long(tmp_path):
    (tmp_path / "m.jsonl").write_text('\n{"url": "a", "caption": "b"}\n{"url": "c", "caption": "d", "width": 9}\n')
    assert [row["width"] for row in rows_of(str(tmp_path / "m.jsonl"), "generic")] == [None, 9]
    (tmp_path / "m.csv").write_text(f"url,caption\na,{'x' * 3_000_000}\nb,y\n")
    assert [len(row["caption"]) for row in rows_of(str(tmp_path / "m.csv"), "generic")] == [3_000_000, 1]


def test_bad_maps_and_files(tmp_path):
    with pytest.raises(ValueError, match="'webvit' is neither one of webvid, laion2b-en"):
        column_map("webvit")
    with pytest.raises(ValueError, match="neither"):
        column_map("url=a,caption=b,colour=c")
    (tmp_path / "m.xlsx").write_bytes(b"a table")
    with pytest.raises(ValueError, match=r"m\.xlsx: a manifest is a .csv"):
        read_manifest(str(tmp_path / "m.xlsx"), "generic")
    (tmp_path / "m.csv").write_text("url,caption\na,b\na,b,c\n")
    with pytest.raises(ValueError, match=r"m\.csv: CSV parse error: Row #3: Expected 2 columns, got 3"):
        rows_of(str(tmp_path / "m.csv"), "generic")
    (tmp_path / "m.jsonl").write_text('{"url": "a", "caption": "b"}\n["c", "d"]\n')
    with pytest.raises(ValueError, match=r"m\.jsonl: b'\[.* is no JSON object"):
        rows_of(str(tmp_path / "m.jsonl"), "generic")
    (tmp_path / "m.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"m\.parquet"):
        read_manifest(str(tmp_path / "m.parquet"), "generic")


def test_row_groups_are_shards_in_however_many_parts(tmp_path):
    rows = [{"url": f"http://a/{number}.mp4", "caption": "x"} for number in range(25_003)]
    source = write(tmp_path / "m.csv", rows)
    for shard_rows, shards, parts in ((1000, 26, 1), (40, 626, 10)):
        manifest = normalise(StreamConfig(source, "generic", shard_rows), str(tmp_path / "manifest" / "videos"))
        assert (manifest.rows, manifest.shards.num_rows, manifest.shards["rows"][-1].as_py()) == (25_003, shards, 3)
        assert len(set(manifest.shards["digest"].to_pylist())) == shards
        assert len(list((tmp_path / "manifest/videos").glob("0*.parquet"))) == parts
        assert [row["url"] for row in stored(manifest)] == [row["url"] for row in rows]


def test_shards_are_called_as_they_have_always_been(tmp_path):
    config = StreamConfig(write(tmp_path / "m.csv", ROWS), "generic", 2)
    plain = normalise(config, str(tmp_path / "plain"))
    assert StreamPlan("videos", plain, "0123456789ab").names == [
        "000000-dd57b53685d8",
        "000001-377def7544b0",
        "000002-7f988ce79050",
    ]
    assert normalise(replace(config, drop_duplicates=True), str(tmp_path / "distinct")).shards == plain.shards


def test_an_unchanged_manifest_is_not_written_again_and_a_changed_one_is(tmp_path):
    source, path = tmp_path / "m.csv", str(tmp_path / "manifest")
    config = StreamConfig(write(source, ROWS), "generic", 2)
    first = normalise(config, path)
    written = storage.fingerprint(f"{path}/000000.parquet")
    assert normalise(config, path) == first
    assert storage.fingerprint(f"{path}/000000.parquet") == written
    write(source, [*ROWS[:3], ROWS[3] | {"caption": "another"}])
    changed = normalise(config, path)
    assert changed.shards.slice(0, 1) == first.shards.slice(0, 1)
    assert changed.shards["digest"][1] != first.shards["digest"][1]
    assert normalise(replace(config, shard_rows=4), path).shards.num_rows == 1


def test_no_manifest_and_no_rows(tmp_path):
    for name in ("none.csv", "no*.csv"):
        with pytest.raises(FileNotFoundError, match="no such manifest"):
            normalise(StreamConfig(str(tmp_path / name), "generic"), str(tmp_path / "out"))
    (tmp_path / "m.csv").write_text("url,caption\n")
    with pytest.raises(ValueError, match=r"m\.csv: the manifest has no rows"):
        normalise(StreamConfig(str(tmp_path / "m.csv"), "generic"), str(tmp_path / "out"))
    assert not storage.listing(str(tmp_path / "out"))


GOOD = {
    "URL": "http://a/1.jpg",
    "TEXT": "cat",
    "WIDTH": 400,
    "HEIGHT": 300,
    "punsafe": 0.1,
    "NSFW": "UNLIKELY",
    "similarity": 0.3,
    "pwatermark": 0.2,
    "aesthetic": 5.0,
    "LANGUAGE": "en",
    "seconds": 10.0,
}
ALL_COLUMNS = (
    "url=URL,caption=TEXT,width=WIDTH,height=HEIGHT,punsafe=punsafe,nsfw=NSFW,similarity=similarity,"
    "watermark=pwatermark,aesthetic=aesthetic,language=LANGUAGE,duration_s=seconds"
)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("option", "bound", "kept", "refused", "status", "words"),
    [
        ("min_side", 256, {"HEIGHT": 256}, {"HEIGHT": 255}, "filtered_size", "255 is the short side, below 256"),
        ("max_aspect", 2.0, {"WIDTH": 600}, {"WIDTH": 601}, "filtered_aspect", "aspect ratio, above 2"),
        ("max_punsafe", 0.1, {}, {"punsafe": 0.11}, "filtered_unsafe", "0.11 is punsafe, above 0.1"),
        ("refuse_nsfw", ["NSFW", "Unsure"], {}, {"NSFW": "UNSURE"}, "filtered_unsafe", "UNSURE is the NSFW label"),
        ("min_similarity", 0.3, {}, {"similarity": -0.29}, "filtered_similarity", "-0.29 is the similarity"),
        ("max_watermark", 0.2, {}, {"pwatermark": 0.9}, "filtered_watermark", "0.9 is the watermark's"),
        ("min_aesthetic", 5.0, {}, {"aesthetic": 4.5}, "filtered_aesthetic", "4.5 is the aesthetic score"),
        ("languages", ["EN", "de"], {"LANGUAGE": "de"}, {"LANGUAGE": "fr"}, "filtered_language", "none of EN, de"),
        ("min_duration_s", 6.0, {"seconds": 6}, {"seconds": 5.9}, "filtered_duration", "5.9 s long, below 6"),
        ("max_duration_s", 60.0, {}, {"seconds": "PT61S"}, "filtered_duration", "61 s long, above 60"),
    ],
)
def test_a_filter_refuses_rows_beyond_its_bound_and_keeps_those_at_it_or_without_value(
    kind, option, bound, kept, refused, status, words, tmp_path
):
    if kind == "parquet" and refused.get("seconds") == "PT61S":
        refused = {"seconds": 61.0}
    unknown = dict.fromkeys(refused)
    rows = [GOOD | kept, GOOD | refused, GOOD | unknown, GOOD]
    config = StreamConfig(write(tmp_path / f"m.{kind}", rows), ALL_COLUMNS, filters=RowFilters(**{option: bound}))
    found = stored(normalise(config, str(tmp_path / "out")))
    assert [row["status"] for row in found] == [None, status, None, None]
    assert words in found[1]["message"]


def test_the_first_filter_that_refuses_a_row_names_it_and_only_shards_with_refused_rows_change_their_names(tmp_path):
    rows = [GOOD, GOOD | {"TEXT": "dog"}, GOOD | {"WIDTH": 10, "punsafe": 1.0}, GOOD]
    config = StreamConfig(write(tmp_path / "m.parquet", rows), "laion2b-en", 2)
    plain = normalise(config, str(tmp_path / "out"))
    config.filters = RowFilters(min_side=100, max_punsafe=0.5)
    filtered = normalise(config, str(tmp_path / "out"))
    assert [row["status"] for row in stored(filtered)] == [None, None, "filtered_size", None]
    assert [a == b for a, b in zip(plain.shards["digest"], filtered.shards["digest"], strict=True)] == [True, False]


def test_a_filter_without_its_column_is_one_error_before_any_row_is_written(tmp_path):
    source = write(tmp_path / "m.csv", [{"URL": "http://a/1.jpg", "TEXT": "cat"}])
    config = StreamConfig(source, "laion2b-en", filters=RowFilters(max_watermark=0.5))
    with pytest.raises(
        ValueError, match=r"m\.csv: no column pwatermark or watermark, .*filters\.max_watermark.*URL, TEXT"
    ):
        normalise(config, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no column nsfw, which filters\.refuse_nsfw wants"):
        filters = RowFilters(refuse_nsfw=["NSFW"])
        normalise(replace(config, columns="url=URL,caption=TEXT", filters=filters), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="max_aspect: 0.5 is below 1"):
        RowFilters(max_aspect=0.5)
    assert not storage.listing(str(tmp_path / "out"))


def test_the_first_row_of_a_url_that_passes_the_filters_stays(tmp_path):
    urls = ["http://a/1.jpg", "", "http://a/2.jpg", "http://a/1.jpg", "", "http://a/2.jpg", "http://a/2.jpg", " "]
    widths = [300, 300, 10, 300, 300, 300, 300, 300]
    rows = [
        {"url": url, "caption": "x", "width": width, "height": 300} for url, width in zip(urls, widths, strict=True)
    ]
    write(tmp_path / "list" / "a.csv", rows[:5])
    write(tmp_path / "list" / "b.csv", rows[5:])
    config = StreamConfig(str(tmp_path / "list"), "generic", 3, RowFilters(min_side=256), drop_duplicates=True)
    found = stored(normalise(config, str(tmp_path / "out")))
    statuses = [None, None, "filtered_size", "duplicate_url", None, None, "duplicate_url", None]
    assert [row["status"] for row in found] == statuses
    assert found[3]["message"] == "an earlier row has the same URL"


def test_duplicates_are_those_that_a_set_finds_however_they_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(url_duplicates, "_HELD_ROWS", 700)
    monkeypatch.setattr(url_duplicates, "_SPAN_ROWS", 1500)
    numbers = np.random.default_rng(0).integers(0, 4000, 10_000)
    urls = [None if number % 50 == 0 else f"http://a/{number}" for number in numbers]
    found = url_duplicates.Duplicates(
        (pa.array(urls[k : k + 333], pa.string()) for k in range(0, 10_000, 333)), str(tmp_path)
    )
    first = {url: row for row, url in reversed(list(enumerate(urls)))}
    expected = [url is not None and first[url] < row for row, url in enumerate(urls)]
    assert 0 < sum(expected) < len(urls)
    assert np.concatenate([found.among(k, 777) for k in range(0, 10_000, 777)])[:10_000].tolist() == expected
