"""Training from URLs, without latents: an image rank and a video rank, while Ray Data downloads and encodes."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from t2v import storage
from t2v.checkpoint import newest_first, read_state
from tests.jobs.test_path import run

STEP_SAMPLES = 6 + 3
SETTINGS = {
    "train.feed": "online",
    "train.held_out_rows": 0,
    "train.mix.slots": 2,
    "train.mix.image_every": 2,
    "train.mix.images_per_step": 6,
    "train.mix.videos_per_step": 3,
    "train.samples": 8 * STEP_SAMPLES,
    "train.checkpoint_every_samples": 8 * STEP_SAMPLES,
    "train.milestone_every_samples": 10**6,
    "data.videos.shard_rows": 8,
    "data.images.shard_rows": 8,
    "data.fetch.workers": 2,
    "data.fetch.cpus_per_task": 0.2,
    "data.encode.cpus_per_worker": 0.3,
}


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    run("train", folder, monkeypatch, **SETTINGS | changes)


@pytest.fixture(scope="module")
def run_dir(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as monkeypatch:
        train(folder, monkeypatch)
        train(folder, monkeypatch, train__samples=16 * STEP_SAMPLES)
    return folder


def begun(run_dir: Path) -> list[dict[str, int]]:
    """What each checkpoint tells of raw shards, the oldest first."""
    return [read_state(folder)["raw_begun"] for folder in reversed(newest_first(f"{run_dir}/train"))]


def test_it_trains_on_both_streams_without_any_latents(run_dir: Path) -> None:
    lines = storage.read_lines(f"{run_dir}/train/log.jsonl")
    assert lines[-1]["samples"] == 16 * STEP_SAMPLES
    assert all(np.isfinite([line["loss_images"], line["loss_videos"]]).all() for line in lines)
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    assert json.loads((run_dir / "train/model/t2v.json").read_text())["info"]["samples"] == 16 * STEP_SAMPLES
    assert not (run_dir / "data/latents").exists() and not (run_dir / "data/done").exists()


def test_a_resumed_run_goes_on_at_the_shard_that_its_checkpoint_names(run_dir: Path) -> None:
    starts = storage.read_lines(f"{run_dir}/train/starts.jsonl")
    assert [start["samples"] for start in starts] == [0, 8 * STEP_SAMPLES]
    first, second = begun(run_dir)
    for stream, of_step in (("images", 6), ("videos", 3)):
        assert first[stream] > 0
        assert second[stream] - first[stream] >= 8 * of_step / 8  # of rows that are not there twice


def test_every_row_that_failed_is_in_the_ledger_with_its_reason(run_dir: Path) -> None:
    corpus = json.loads((run_dir / "corpus/corpus.json").read_text())
    for stream in ("videos", "images"):
        ledger = pq.read_table(run_dir / "data/ledger_online" / stream).to_pylist()
        failed = [row["status"] for row in ledger if row["status"] != "ok"]
        assert {reason: failed.count(reason) for reason in failed} == corpus["faults"][stream]
        assert len(ledger) == corpus["rows"][stream]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__held_out_rows": 3}, "held_out_rows: 3 rows are to be kept as latents"),
        ({"data__encode__cpus_per_worker": 2}, "train.feed: online needs 4.4 CPUs for a download"),
        ({"data__fps": 4}, "its training was begun with another raw"),
        ({"train__feed": "latents"}, "no latent shards with rows; run jobs/prepare_data.py first"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], changes: dict, said: str
) -> None:
    with pytest.raises(SystemExit):
        train(run_dir, monkeypatch, train__samples=20 * STEP_SAMPLES, **changes)
    assert said in capfd.readouterr().err
