import json
import tarfile

import pyarrow.parquet as pq
import pytest

from pipelines.archives import read_archive, read_members
from pipelines.config import FetchConfig
from pipelines.download import address_check, open_engine
from pipelines.fetch import Fetched, FetchError
from pipelines.raw import write_raw
from pipelines.web import IMAGE_FAULTS, VIDEO_FAULTS, serve
from tests.pipelines.test_archives import JPEG, MP4

CONFIG = {"allow_networks": ["127.0.0.1/32"], "timeout_s": 2, "retries": 1}
DECODER = {"truncated.mp4", "short.mp4", "huge.jpg"}  # broken in themselves: they download well


def download(engine, urls):
    config = FetchConfig(engine=engine, **CONFIG)
    fetched = open_engine(config)(urls)
    assert len(fetched) == len(urls)
    assert all(bool(one.body) == (one.status == "ok") and one.seconds >= 0 for one in fetched)
    return fetched


@pytest.mark.parametrize("engine", ["builtin", "img2dataset", "video2dataset"])
@pytest.mark.parametrize("kind", ["jpg", "mp4"])
def test_every_engine_gives_the_bodies_in_order_and_the_same_reasons(corpus, engine, kind):
    if engine == "video2dataset" and kind == "jpg":
        pytest.skip("it takes URLs that end in a video's name, and gives others to yt-dlp")
    faults, folder = (IMAGE_FAULTS, "images") if kind == "jpg" else (VIDEO_FAULTS, "videos")
    expected = {name: "ok" if name in DECODER else status for name, status in faults.items()}
    if engine == "video2dataset":
        expected["flaky.mp4"] = "http_error"  # it does not retry
    files = sorted((corpus.folder / folder).glob(f"*.{kind}"))[:12]
    with serve(corpus.folder) as base_url:  # a new one, whose faults nobody has asked for
        urls = [f"{base_url}/{folder}/{file.name}" for file in files]
        fetched = download(engine, urls + [f"{base_url}/faults/{name}" for name in expected])
    assert [one.body for one in fetched[: len(files)]] == [file.read_bytes() for file in files]
    assert {name: one.status for name, one in zip(expected, fetched[len(files) :], strict=True)} == expected


@pytest.mark.parametrize("engine", ["builtin", "img2dataset", "video2dataset"])
def test_no_engine_asks_for_what_the_rule_refuses(engine):
    urls = {
        "": "no_url",
        "videos/1.mp4": "no_url",
        "/etc/hostname.mp4": "no_url",
        "file:///etc/hostname.mp4": "forbidden_address",
        "ftp://127.0.0.1/1.mp4": "forbidden_address",
        "http://me:secret@127.0.0.1/1.mp4": "forbidden_address",
        "http://127.0.0.2/1.mp4": "forbidden_address",
        "http://2130706434/1.mp4": "forbidden_address",
        "http://[::1]/1.mp4": "forbidden_address",
        "http://169.254.169.254/1.mp4": "forbidden_address",
        f"http://{'a' * 64}.invalid/1.mp4": "dns",
        "http://127.0.0.1:9/closed.mp4": "connection",
    }
    assert [one.status for one in download(engine, list(urls))] == list(urls.values())


def test_a_name_with_one_address_that_is_not_public_is_refused(monkeypatch):
    found = [(2, 1, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found)  # a name server of a stranger's
    with pytest.raises(OSError, match=r"10\.0\.0\.1, which is not public"):
        address_check(FetchConfig())("http://both.example/1.jpg")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: found[:1])
    address_check(FetchConfig())("http://both.example/1.jpg")
    with pytest.raises(FetchError):
        address_check(FetchConfig())("gopher://both.example/1.jpg")


def test_what_was_downloaded_is_kept_as_tars_that_are_an_input_again(tmp_path):
    rows = [
        {"row_id": caption, "url": f"http://x/{caption}", "caption": caption, "width": 640, "height": None}
        for caption in "abc"
    ]
    fetched = [Fetched(JPEG, "ok", "", 0.1), Fetched(b"", "http_404", "HTTP 404", 0.1), Fetched(MP4, "ok", "", 0.1)]
    write_raw(str(tmp_path), "000000-abc", rows, fetched)
    with tarfile.open(tmp_path / "000000-abc.tar") as tar:
        assert sorted(tar.getnames()) == sorted(
            f"00000000{key}.{kind}" for key, media in ((0, "jpg"), (2, "mp4")) for kind in (media, "json", "txt")
        )
    (batch,) = read_archive(str(tmp_path))
    assert [one.body for one in read_members(batch["url"].to_pylist(), 10_000)] == [JPEG, MP4]
    assert batch["caption"].to_pylist() == ["a", "c"]
    table = pq.read_table(tmp_path / "000000-abc.parquet")
    assert table["status"].to_pylist() == ["success", "failed_to_download", "success"]
    assert table["error_message"].to_pylist() == [None, "http_404: HTTP 404", None]
    stats = json.loads((tmp_path / "000000-abc_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (3, 2, 1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_shard_is_kept_in_the_same_bytes_each_time(tmp_path):
    rows = [{"row_id": "1", "url": "http://x/1", "caption": "a", "width": 1, "height": 1}]
    for name in ("one", "two"):
        write_raw(str(tmp_path / name), "s", rows, [Fetched(JPEG, "ok", "", 0.1)])
    assert (tmp_path / "one/s.tar").read_bytes() == (tmp_path / "two/s.tar").read_bytes()
