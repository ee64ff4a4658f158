"""What a training run shows of its newest model."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from pipelines.preview import _preview
from pipelines.sheet import grid
from t2v import storage
from t2v.config import DiffusionConfig, ModelConfig, SampleConfig, TrainConfig
from t2v.job import TrainJob
from t2v.record import Record
from t2v.validation import model_of


def test_a_grid_has_a_row_a_clip_and_at_most_eight_frames() -> None:
    clips = np.arange(2 * 16, dtype=np.uint8).reshape(2, 16, 1, 1, 1) * np.ones((1, 1, 4, 6, 3), np.uint8)
    picture = grid(clips)
    assert picture.shape == (2 * 4, 8 * 6, 3)
    assert picture[::4, ::6, 0].tolist() == [list(range(0, 16, 2)), list(range(16, 32, 2))]


def test_a_preview_of_more_prompts_than_fit_a_batch_is_one_picture_and_a_clip_each_on_the_page_of_all(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sample = SampleConfig(steps=2, guidance=2.0, frames=3, batch=2, gpus_per_worker=0)
    job = TrainJob(str(tmp_path), 0, 32, 3, ModelConfig(), DiffusionConfig(), TrainConfig(), sample)
    for samples in (500, 1000):
        Path(job.milestone_folder(samples)).mkdir(parents=True)
        Path(model_of(job, samples)).symlink_to(tiny_model)
    Record(str(tmp_path), "train", {"samples": 500}).close()

    def page(run_dir: str) -> str:
        return f"page of {len(list(Path(run_dir).glob('train/milestones/*/prompts.json')))}"

    prompts = ["a red circle", "a blue star", ""]
    for samples in (500, 1000):
        _preview._function(job, prompts, samples, page)
    milestones = tmp_path / "train" / "milestones"
    kept = milestones / "000000000500"
    assert cv2.imread(str(kept / "samples-000000000500.png")).shape == (3 * 32, 3 * 32, 3)
    assert [row["prompt"] for row in storage.read_json(str(kept / "prompts.json"))] == prompts
    for index in range(3):
        with av.open(str(kept / f"{index}.mp4")) as clip:
            assert len(list(clip.decode(video=0))) == 3
    assert (milestones / "index.html").read_text() == "page of 2"
    (artifacts,) = tmp_path.glob("mlruns/*/artifacts")
    assert sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*")) == [
        *(f"milestones/{samples:012d}/{index}.mp4" for samples in (500, 1000) for index in range(3)),
        "milestones/index.html",
        *(f"samples/samples-{samples:012d}.png" for samples in (500, 1000)),
    ]
