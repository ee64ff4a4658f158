"""Scoring end to end on the corpus's test clips, with real ones in the place of generated ones: they must do well."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import DataConfig, EvaluateConfig
from pipelines.media import read_clip
from pipelines.prompts import Prompt
from pipelines.sampling import model_id, sample_key, sampler_settings
from pipelines.scoring import choose, evaluate
from t2v import storage
from t2v.config import SampleConfig
from tests.pipelines.conftest import Corpus

CLIPS = 8
BROKEN = "video1.mp4"
SAMPLE = SampleConfig(frames=8, workers=1, gpus_per_worker=0)
DATA = DataConfig(size=64, frames=8)


def write_table(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "sentence"), *rows])
    return str(path)


@pytest.fixture
def test_set(corpus: Corpus, tmp_path: Path) -> str:
    """A table of CLIPS test clips, one of them broken."""
    (tmp_path / "clips").mkdir()
    with (corpus.folder / "test.csv").open() as file:
        rows = list(csv.DictReader(file))[:CLIPS]
    for row in rows:
        os.link(corpus.folder / row["path"], tmp_path / "clips" / Path(row["path"]).name)
    (tmp_path / "clips" / BROKEN).unlink()
    (tmp_path / "clips" / BROKEN).write_bytes(b"<html>no video</html>")
    return write_table(tmp_path / "test.csv", [(f"clips/{Path(row['path']).name}", row["sentence"]) for row in rows])


def write_perfect_samples(run_dir: Path, config: EvaluateConfig, model: str) -> None:
    """What a perfect model would have generated: the real clips themselves, one frame later."""
    settings = sampler_settings(SAMPLE, DATA.size)
    for index, (path, caption) in enumerate(choose(config)):
        key = sample_key(model_id(model), Prompt(caption, index), settings)
        frames = np.zeros((8, 64, 64, 3), np.uint8)
        if Path(path).name != BROKEN:
            frames = read_clip(path, 9, DATA.fps, DATA.size, start="middle").frames[1:]
        with storage.open_atomic(f"{run_dir}/samples/{key}.npz") as file:
            np.savez(file, frames=frames)
        storage.write_json(f"{run_dir}/samples/{key}.json", {"key": key})


def test_perfect_videos_score_well_and_a_rerun_reads_the_scores(
    test_set: str, tiny_model: str, ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(test=test_set, clips=CLIPS, judge_shapes=True)
    run_dir = tmp_path / "run"
    write_perfect_samples(run_dir, config, tiny_model)

    scores = evaluate(str(run_dir), config, SAMPLE, DATA, tiny_model, ["purple"])

    assert scores["left_out"] == [{"path": str(tmp_path / "clips" / BROKEN), "reason": scores["left_out"][0]["reason"]}]
    values = {(row["network"], row["of"], row["against"]): row["value"] for row in scores["scores"]}
    for network in ("EfficientNet-Lite0", "TransNetV2"):
        assert 0 < values[network, "generated", "real"] < values[network, "real", "real, other half"]
    text = "ConSE (EfficientNet-Lite0 x all-MiniLM-L6-v2)"
    assert values[text, "generated", "captions"] == pytest.approx(values[text, "real", "captions"], abs=0.02)
    shapes = {(row["of"], row["against"]): row for row in scores["shapes"]}
    assert shapes["generated", "captions"]["all"] == shapes["real", "captions"]["all"] == 1
    assert shapes["generated", "shuffled captions"]["all"] < 0.2
    assert all(row["clips"] == CLIPS - 1 for row in scores["scores"] if row["against"] != "real, other half")
    assert storage.read_json(f"{run_dir}/scores/confusion.json")["colour"]["labels"][0] == "red"

    printed = capsys.readouterr().out
    assert f"[evaluate] {CLIPS}/{CLIPS} clips" in printed
    assert evaluate(str(run_dir), config, SAMPLE, DATA, tiny_model, ["purple"]) == scores
    assert capsys.readouterr().out == printed[printed.index("score ") :]


def test_clips_and_captions_are_chosen_by_seed_whatever_the_order_of_rows(tmp_path: Path) -> None:
    rows = [(f"clips/{clip}.mp4", f"caption {caption} of {clip}") for clip in range(30) for caption in range(3)]
    forwards = EvaluateConfig(test=write_table(tmp_path / "a.csv", rows), clips=20)
    backwards = EvaluateConfig(test=write_table(tmp_path / "b.csv", rows[::-1]), clips=20)
    chosen = choose(forwards)
    assert chosen == choose(backwards)
    assert chosen != choose(EvaluateConfig(test=forwards.test, clips=20, seed=1))
    assert len({path for path, _ in chosen}) == 20
    assert {caption.split()[1] for _, caption in chosen} == {"0", "1", "2"}
    assert {Path(path).parent for path, _ in chosen} == {tmp_path / "clips"}
    assert all(Path(path).stem == caption.split()[-1] for path, caption in chosen)


@pytest.mark.parametrize(
    ("config", "sample", "message"),
    [
        (EvaluateConfig(), SAMPLE, "evaluate.test is not set"),
        (EvaluateConfig(test="none.csv"), SAMPLE, "evaluate.test: there is no file none.csv"),
        (EvaluateConfig(test=__file__, clips=3), SAMPLE, "evaluate.clips: 3 is too few"),
        (EvaluateConfig(test=__file__), SampleConfig(frames=4), "sample.frames: 4, but real clips have data.frames: 8"),
    ],
)
def test_settings_that_cannot_work_fail_at_once(config: EvaluateConfig, sample: SampleConfig, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate("nowhere", config, sample, DATA, "no model")


def test_a_test_set_smaller_than_asked_for(tmp_path: Path) -> None:
    config = EvaluateConfig(test=write_table(tmp_path / "a.csv", [("a.mp4", "a"), ("b.mp4", "b")]), clips=5)
    with pytest.raises(ValueError, match=r"evaluate\.clips: 5 are asked for, but .* has 2"):
        choose(config)
