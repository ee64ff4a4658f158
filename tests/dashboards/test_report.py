"""The report of a small real run, read as text and opened in a real browser."""

import asyncio
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from dashboards import gallery
from dashboards.report import config_hash, resolved_config, write_report
from jobs.config import Config
from t2v.digest import digest_of
from tests.dashboards.browser import Page, find_chromium, tab
from tests.dashboards.conftest import HOSTILE

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="no chromium on this machine")
PLAY_ALL = """(async () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const videos = [...document.querySelectorAll("video")];
  const settled = video => new Promise(done => { video.onloadeddata = video.onerror = done; });
  await Promise.all(videos.map(video => video.readyState >= 2 || video.error || settled(video)));
  scrollTo(0, document.querySelector("video").offsetTop);
  await new Promise(done => setTimeout(done, 500));
  return videos.map(video => ({ready: video.readyState, seconds: video.duration, width: video.videoWidth,
                               error: video.error && video.error.message, moving: video.currentTime > 0}));
})()"""


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the page's words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.words += "" if self._hidden else data


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return Path(write_report(str(run_dir))).read_text()


def test_page_holds_all_it_shows_and_refers_to_nothing_outside(page: str) -> None:
    assert not re.search(r"https?:|//cdn|@import|url\(", page)
    references = [attrs[name] for _, attrs in Tags(page).tags for name in ("src", "href", "poster") if name in attrs]
    assert references and all(str(reference).startswith("data:") for reference in references)


def test_what_strangers_wrote_is_text(page: str) -> None:
    found = Tags(page)
    assert HOSTILE not in page
    assert found.words.count(HOSTILE) == 2  # as a prompt, and as the reason why a test clip was left out
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert "<title>tiny &amp; true" in page


def test_page_shows_every_part_of_the_run(page: str) -> None:
    words = re.sub(r"\s+", " ", Tags(page).words)
    assert "trained on 19,200 samples of 194 clips and 388 pictures in 2 min 42 s" in words
    assert "194 of 204 rows became latents" in words and "broken file" in words and "some new reason" in words
    assert "Frechet distance of frames EfficientNet-Lite0" in words
    assert "generated, colours only in pictures" in words
    assert page.count("<video") == 2 * 3
    assert "same caption" in words and "nearest mean frame" in words
    assert "No scores yet" not in words


def test_configuration_is_shown_under_the_hash_that_the_jobs_print(run_dir: Path, page: str) -> None:
    assert config_hash(resolved_config(str(run_dir))) == digest_of(asdict(Config()))
    assert digest_of(asdict(Config())) in page


def test_a_run_that_has_made_nothing_yet_is_told_in_words(tmp_path: Path) -> None:
    words = Tags(Path(write_report(str(tmp_path))).read_text()).words
    for sentence in (
        "Nothing has been trained",
        "No clips have been",
        "No scores yet",
        "No training curve",
        "No data has",
    ):
        assert sentence in words


def test_gallery_is_thinned_out_evenly_until_it_fits(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [json.loads(line) for line in (run_dir / "samples" / "manifest.jsonl").read_text().splitlines()]
    whole = gallery.gallery(str(run_dir), samples, {}, judged=False)
    monkeypatch.setattr(gallery, "MAX_BYTES", sum(len(pair.generated) + len(pair.real) for pair in whole) - 1)
    assert gallery.gallery(str(run_dir), samples, {}, judged=False) == whole[1::2]
    monkeypatch.setattr(gallery, "MAX_BYTES", 0)
    assert gallery.gallery(str(run_dir), samples, {}, judged=False) == []


def test_a_test_clip_that_cannot_be_read_leaves_its_place_empty(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("video_id,path,sentence\nvideo0,gone.mp4,a red ring\n")
    clips = gallery.RealClips(str(tmp_path), {"test": str(tmp_path / "test.csv"), "columns": "msrvtt"})
    assert clips.nearest("a red ring", np.zeros((16, 64, 64, 3), np.uint8)) is None


@needs_chromium
@pytest.mark.timeout(180)
def test_page_plays_in_a_browser_in_light_and_dark_on_desk_and_phone(page: str, run_dir: Path, tmp_path: Path) -> None:
    async def look(tab: Page, width: int, scheme: str) -> None:
        await tab.open(run_dir / "report.html", width, 900, scheme)
        videos = await tab.evaluate(PLAY_ALL)
        assert len(videos) == 2 * 3
        for video in videos:
            assert video["error"] is None and video["ready"] >= 2 and video["width"] == 256
            assert video["seconds"] == pytest.approx(2.0, abs=0.01)
        assert any(video["moving"] for video in videos)
        assert await tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        screenshot = tmp_path / f"{scheme}-{width}.png"
        screenshot.write_bytes(await tab.screenshot())
        brightness = np.median(cv2.imread(str(screenshot)))
        assert brightness > 200 if scheme == "light" else brightness < 60

    async def run() -> None:
        async with tab(str(find_chromium()), tmp_path / "profile") as opened:
            for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
                await look(opened, width, scheme)
            assert opened.errors == []
            assert {address.split(":")[0] for address in opened.requests} <= {"file", "data"}

    asyncio.run(run())
