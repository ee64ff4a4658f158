"""What img2dataset and video2dataset write, tars and Parquet, is an input as it stands; both really run here."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import DataConfig, EncodeConfig, FetchConfig, StreamConfig
from pipelines.download import address_check
from pipelines.mended import download_worker
from pipelines.prepare import prepare

ROWS = 6
MISSING = 2  # this row's file is not there


def shard(folder, urls, captions):
    folder.mkdir(parents=True)
    table = pa.table({"url": urls, "caption": captions})
    with pa.ipc.new_file(str(folder / "shard.arrow"), table.schema) as writer:
        writer.write_table(table)
    return str(folder / "shard.arrow")


def by_img2dataset(folder, kind, urls, captions):
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter, WebDatasetSampleWriter

    Downloader(
        sample_writer_class={"tar": WebDatasetSampleWriter, "parquet": ParquetSampleWriter}[kind],
        resizer=Resizer(64, "center_crop", False),
        thread_count=2,
        save_caption=True,
        extract_exif=True,
        output_folder=str(folder),
        column_list=["url", "caption"],
        timeout=5,
        number_sample_per_shard=len(urls),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    ).download_shard((0, shard(folder, urls, captions)))


def by_video2dataset(folder, kind, urls, captions):
    worker_class = download_worker(address_check(FetchConfig(allow_networks=["127.0.0.0/8"])), 5, True)
    from video2dataset.data_writer import ParquetSampleWriter, WebDatasetSampleWriter

    if kind == "parquet":  # its writer loses the whole shard for one row that did not come
        urls, captions = ([one for row, one in enumerate(some) if row != MISSING] for some in (urls, captions))
    settings = {
        "reading": {"timeout": 5, "yt_args": {}},
        "subsampling": {},
        "storage": {"number_sample_per_shard": len(urls), "oom_shard_count": 5, "captions_are_subtitles": False},
        "distribution": {"thread_count": 2},
    }
    writer = {"tar": WebDatasetSampleWriter, "parquet": ParquetSampleWriter}[kind]
    worker = worker_class(writer, True, str(folder), ["url", "caption"], str(folder), {"video": "mp4"}, settings)
    worker.download_shard((shard(folder, urls, captions), 0))


@pytest.fixture(scope="module")
def lists(corpus):
    """(URLs, captions) of some videos and pictures, one of each missing."""
    with (corpus.folder / "webvid.csv").open(newline="") as file:
        videos = [(row["contentUrl"], row["name"]) for row in csv.DictReader(file)]
    pictures = [(row["URL"], row["TEXT"]) for row in pq.read_table(corpus.folder / "laion.parquet").to_pylist()]
    found = []
    for rows, part in ((videos, "/videos/"), (pictures, "/images/")):
        good = [row for row in rows if part in row[0]][:ROWS]
        good[MISSING] = (good[MISSING][0].replace("0000", "none"), "nobody has it")
        found.append(tuple(map(list, zip(*good, strict=True))))
    return found


def rows_of(folder):
    return [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_both_packages_output_is_an_input(ray_session, lists, tiny_model, tmp_path, kind):
    videos, pictures = lists
    by_video2dataset(tmp_path / "videos", kind, *videos)
    by_img2dataset(tmp_path / "pictures", kind, *pictures)
    data = DataConfig(
        size=32,
        videos=StreamConfig(str(tmp_path / "videos"), "encoded"),
        images=StreamConfig(str(tmp_path / "pictures"), "encoded"),
        encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1),
    )
    funnel = prepare(str(tmp_path / "run"), data, f"{tiny_model}/vae", seed=0)
    # Of the row that did not come video2dataset's tars have the caption, img2dataset's tables an empty cell.
    lost = {"tar": ({"not_media": 1}, {}), "parquet": ({}, {"empty": 1})}[kind]
    assert [funnel[stream] for stream in ("videos", "images")] == [{"ok": ROWS - 1} | one for one in lost]
    for stream, (urls, captions) in (("videos", videos), ("images", pictures)):
        latents, ledger = (rows_of(tmp_path / "run/data" / part / stream) for part in ("latents", "ledger"))
        assert {row["caption"] for row in latents} == {one for row, one in enumerate(captions) if row != MISSING}
        if kind == "parquet":
            assert {row["url"] for row in ledger if row["status"] == "ok"} == set(urls) - {urls[MISSING]}
