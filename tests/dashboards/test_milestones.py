"""The page of milestones holds its clips, escapes its prompts, and does not grow with the run."""

import json
import re
from base64 import b64decode
from pathlib import Path

import pytest

from dashboards import milestones
from dashboards.milestones import milestones_page
from tests.dashboards.conftest import HOSTILE


def keep(run_dir: Path, samples: int, prompts: list[str]) -> None:
    folder = run_dir / "train" / "milestones" / f"{samples:012d}"
    folder.mkdir(parents=True)
    for index, _ in enumerate(prompts):
        (folder / f"{index}.mp4").write_bytes(b"clip %d of %d" % (index, samples))
    rows = [{"prompt": prompt, "seed": index} for index, prompt in enumerate(prompts)]
    (folder / "prompts.json").write_text(json.dumps(rows))


def shown(page: str) -> list[str]:
    return re.findall(r"<h2>(\S+) samples</h2>", page)


def test_the_newest_comes_first_with_its_clips_and_nothing_is_fetched(tmp_path: Path) -> None:
    for samples in (5_000, 10_000):
        keep(tmp_path, samples, ["a red circle", HOSTILE])
    (tmp_path / "train" / "milestones" / "000000015000" / "checkpoint").mkdir(parents=True)  # no clips of it yet
    page = milestones_page(str(tmp_path))
    assert shown(page) == ["10,000", "5,000"]
    clips = [b64decode(clip) for clip in re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)]
    assert clips == [b"clip 0 of 10000", b"clip 1 of 10000", b"clip 0 of 5000", b"clip 1 of 5000"]
    assert HOSTILE not in page and "<script" not in page and not re.search(r"(src|href)=\"(?!data:)", page)


def test_losses_on_held_out_rows_stand_beside_the_clips_of_their_milestone(tmp_path: Path) -> None:
    for samples in (5_000, 10_000):
        keep(tmp_path, samples, ["a red circle"])
    losses = {"held_out_images": 0.5, "held_out_images_t250": 0.25, "held_out_videos": 0.125, "held_out_videos_t000": 2}
    (tmp_path / "train/milestones/000000010000/held_out.json").write_text(json.dumps(losses))
    newest, older = milestones_page(str(tmp_path)).split("</section>")[:2]
    assert re.findall(r'<th scope="col">([^<]+)', newest) == ["all", "from 0", "from 250"]
    rows = [re.findall(r"<t[hd][^>]*>([^<]+)", row) for row in re.findall(r"<tr><th scope=\"row.*?</tr>", newest)]
    assert rows == [["images", "0.5000", "–", "0.2500"], ["videos", "0.1250", "2.0000", "–"]]
    assert "<table" not in older and "<video" in older


def test_a_page_of_very_many_keeps_the_newest_and_some_of_the_others_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for samples in range(1, 51):
        keep(tmp_path, samples, ["a red circle"])
    assert shown(milestones_page(str(tmp_path))) == [str(samples) for samples in range(50, 0, -3)]
    monkeypatch.setattr(milestones, "MAX_BYTES", 0)
    assert shown(milestones_page(str(tmp_path))) == ["50"]


def test_a_run_without_milestones_has_a_page_too(tmp_path: Path) -> None:
    assert shown(milestones_page(str(tmp_path))) == []
