"""The whole path at its smallest, job by job as a user runs them; then once more, and nothing is done again."""

import importlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dashboards.report import write_report
from pipelines.config import EvaluateConfig
from pipelines.scoring import choose
from pipelines.shapes import parse_caption
from t2v import storage
from t2v.gauges import MEANINGS, gauge_of
from t2v.record import _replace_table as replace_table
from t2v.shards import list_shards

PROJECT = Path(__file__).parents[2]
STEP_SAMPLES = 4 + 7 * 2
SMALLEST = {
    "corpus.clips": 24,
    "corpus.pictures": 30,
    "corpus.test_clips": 6,
    "data.frames": 8,
    "sample.frames": 8,
    "train.mix.frames_per_slot": 16,
    "train.mix.images_per_step": 4,
    "train.samples": 2 * STEP_SAMPLES,
    "train.checkpoint_every_samples": STEP_SAMPLES,
    "train.milestone_every_samples": 2 * STEP_SAMPLES,
    "train.held_out_rows": 3,
    "sample.steps": 3,
    "evaluate.clips": 6,
}


def run(name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, **changes: object) -> None:
    """Runs a job's main as the command line would."""
    given = SMALLEST | {key.replace("__", "."): value for key, value in changes.items()}
    options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    preset = ["--config", f"{PROJECT}/jobs/configs/nano.yaml", "--run_dir", str(run_dir)]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *preset, *options, *flags])
    importlib.import_module(f"jobs.{name}").main()


@pytest.fixture(scope="module")
def run_dir(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run("prepare_data", folder, monkeypatch)
        run("train", folder, monkeypatch)
        evaluate = EvaluateConfig(test=f"{folder}/corpus/test.csv", clips=SMALLEST["evaluate.clips"])
        asked = [{"prompt": caption, "seed": seed} for seed, (_, caption) in enumerate(choose(evaluate))]
        storage.write_lines(f"{folder}/prompts.jsonl", [*asked, {"prompt": "../../etc/passwd", "seed": 3}])
        run("generate", folder, monkeypatch, prompts=f"{folder}/prompts.jsonl")
        run("evaluate", folder, monkeypatch)
    write_report(str(folder))
    return folder


def test_rows_in_are_rows_out_and_ledger_rows_with_the_reasons_the_corpus_planted(run_dir: Path) -> None:
    corpus = json.loads((run_dir / "corpus/corpus.json").read_text())
    for stream in ("videos", "images"):
        ledger = pq.read_table(run_dir / "data/ledger" / stream).to_pylist()
        failed = [row["status"] for row in ledger if row["status"] != "ok"]
        rows = sum(shard.rows for shard in list_shards(str(run_dir / "data/latents" / stream)))
        assert corpus["rows"][stream] == len(ledger) == rows + len(failed)
        assert {reason: failed.count(reason) for reason in failed} == corpus["faults"][stream]


def test_training_leaves_checkpoints_a_log_and_a_model(run_dir: Path) -> None:
    lines = storage.read_lines(f"{run_dir}/train/log.jsonl")
    assert lines[-1]["samples"] == 2 * STEP_SAMPLES
    assert all(np.isfinite([line["loss_images"], line["loss_videos"]]).all() for line in lines)
    assert {gauge_of(key)[0] for line in lines for key in line} - set(MEANINGS) == {"step"}
    assert len(list((run_dir / "train").glob("checkpoint_2*"))) == 2
    assert json.loads((run_dir / "train/model/t2v.json").read_text())["info"]["samples"] == 2 * STEP_SAMPLES


def test_every_prompt_is_a_video_none_a_path_and_evaluation_takes_those_that_are_there(run_dir: Path) -> None:
    rows = storage.read_lines(f"{run_dir}/samples/manifest.jsonl")
    asked = storage.read_lines(f"{run_dir}/prompts.jsonl")
    assert sorted((row["prompt"], row["seed"]) for row in rows) == sorted((row["prompt"], row["seed"]) for row in asked)
    for row in rows:
        frames = np.load(run_dir / "samples" / f"{row['key']}.npz")["frames"]
        assert frames.shape == (8, 64, 64, 3) and frames.dtype == np.uint8
        assert (run_dir / "samples" / row["file"]).stat().st_size > 0


def test_scores_come_with_their_controls_and_under_their_own_names(run_dir: Path) -> None:
    scores = json.loads((run_dir / "scores/scores.json").read_text())
    assert {row["network"] for row in scores["scores"]} >= {"EfficientNet-Lite0", "TransNetV2"}
    assert not any(name in json.dumps(scores) for name in ("FVD", "FID", "CLIPSIM"))
    assert {row["of"] for row in scores["scores"]} == {"generated", "real", "frozen"}
    real = next(row for row in scores["shapes"] if row["of"] == "real")
    assert min(real[field] for field in ("colour", "shape", "direction", "background")) >= 0.97
    assert "shuffled captions" in {row["against"] for row in scores["shapes"]}


def test_mlflow_has_a_run_of_each_job(run_dir: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "t2v"]
    runs = {run.info.run_name.split()[0]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"prepare_data", "train", "evaluate"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    sheets = client.list_artifacts(runs["prepare_data"].info.run_id, "sheets")
    assert {sheet.path for sheet in sheets} == {"sheets/videos.jpg", "sheets/images.jpg"}
    train = runs["train"]
    assert train.data.params["train.mix.slots"] == "8"
    (picture,) = client.list_artifacts(train.info.run_id, "samples")
    assert picture.path == f"samples/samples-{2 * STEP_SAMPLES:012d}.png"
    inputs = {entry.dataset.name for entry in train.inputs.dataset_inputs}
    assert inputs == {"videos latents", "images latents"}
    assert any(name.startswith("system/") for name in train.data.metrics)
    version = client.get_model_version_by_alias(run_dir.name, "newest")
    model = f"{run_dir}/train/milestones/{2 * STEP_SAMPLES:012d}/model"
    assert version.tags == {"folder": model, "samples": str(2 * STEP_SAMPLES)}
    assert "milestones/index.html" in {file.path for file in client.list_artifacts(train.info.run_id, "milestones")}
    scores = json.loads(Path(client.download_artifacts(runs["evaluate"].info.run_id, "scores.json")).read_text())
    assert {"score", "value", "colour", "direction"} <= set(scores["columns"])
    held_out = [client.get_metric_history(train.info.run_id, f"held_out_{stream}") for stream in ("images", "videos")]
    assert [[point.step for point in points] for points in held_out] == [[2 * STEP_SAMPLES]] * 2
    assert all(0.2 < points[0].value < 2 for points in held_out)
    page = Path(run_dir, "train/milestones/index.html").read_text()
    assert all(f"<td>{points[0].value:.4f}</td>" in page for points in held_out)
    history = client.get_metric_history(train.info.run_id, "loss_videos")
    assert [point.step for point in history] == [
        line["samples"] for line in storage.read_lines(f"{run_dir}/train/log.jsonl")
    ]


def test_running_all_again_changes_no_file(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written() -> dict[Path, int]:
        parts = ("corpus", "data", "train", "samples", "scores")
        files = [path for part in parts for path in (run_dir / part).rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.name not in RESTATED}

    before = written()
    for name in ("prepare_data", "train", "evaluate"):
        run(name, run_dir, monkeypatch)
    run("generate", run_dir, monkeypatch, prompts=f"{run_dir}/prompts.jsonl")
    assert written() == before
    assert "[train] nothing to do" in capsys.readouterr().out


def test_what_mlflow_has_missed_is_told_by_the_next_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    run_id = storage.read_json(f"{run_dir}/config/prepare_data.mlflow.json")["run_id"]
    monkeypatch.setattr("t2v.record._replace_table", fails)
    (run_dir / "config/prepare_data.recorded.json").unlink()
    ends = [client.get_run(run_id).info.end_time]
    for _ in range(3):
        run("prepare_data", run_dir, monkeypatch)
        ends.append(client.get_run(run_id).info.end_time)
        monkeypatch.setattr("t2v.record._replace_table", replace_table)
    assert ends[0] < ends[1] < ends[2] == ends[3]


def fails(*_: object) -> None:
    raise FileNotFoundError("so that it is given up at once")


def test_what_was_prepared_is_verified_and_its_status_told(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run("prepare_data", run_dir, monkeypatch, "--verify")
    run("prepare_data", run_dir, monkeypatch, "--status")
    out = capsys.readouterr().out
    assert end.value.code == 0 and "0 damaged" in out and out.count("all done") == 2
    with pytest.raises(SystemExit) as end:
        run("prepare_data", run_dir / "elsewhere", monkeypatch, "--status")
    assert end.value.code == 2 and "nothing was prepared" in capsys.readouterr().err


RESTATED = {"index.json", "funnel.json", "plan.json", "manifest.jsonl"}  # summaries that every run writes anew


def test_more_samples_resume_where_training_stopped(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = storage.read_lines(f"{run_dir}/train/log.jsonl")
    run("train", run_dir, monkeypatch, train__samples=3 * STEP_SAMPLES)
    lines = storage.read_lines(f"{run_dir}/train/log.jsonl")
    assert lines[: len(before)] == before and lines[-1]["samples"] == 3 * STEP_SAMPLES
    with pytest.raises(SystemExit):
        run("train", run_dir, monkeypatch, train__samples=4 * STEP_SAMPLES, train__mix__frames_per_slot=32)
    assert "its training was begun with another mix" in capfd.readouterr().err


def test_test_captions_hold_colours_that_only_pictures_show(run_dir: Path) -> None:
    colours = {
        stream: {parse_caption(text).colour for text in captions(run_dir, stream)} for stream in ("videos", "images")
    }
    assert colours["images"] - colours["videos"] == {"purple", "cyan"}


def captions(run_dir: Path, stream: str) -> list[str]:
    parts = (run_dir / "data/manifest" / stream).glob("0*.parquet")
    return [caption for part in parts for caption in pq.read_table(part)["caption"].to_pylist()]
