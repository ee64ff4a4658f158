"""One MLflow run however often a job is started, and jobs that go on when the server does not answer."""

import logging
from pathlib import Path

import mlflow
import pytest

from t2v.record import Record, tracking_uri


def test_a_rerun_continues_the_same_run(tmp_path: Path) -> None:
    for step, status in ((10, "KILLED"), (20, "FINISHED")):
        record = Record(str(tmp_path), "train", {"train": {"samples": 5}})
        record.metrics({"loss": 1 / step}, step)
        record.table([{"stream": "images", "rows": 3}], "rows.json")
        record.close(status)
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path)))
    (run,) = client.search_runs([client.get_experiment_by_name("t2v").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"train.samples": "5"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.05)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["rows.json"]


def test_a_table_replaces_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(str(tmp_path), "prepare_data", {"size": 64})
    record.table([{"clips": 7}], "scores.json")
    for rows in (3, 5):
        again = Record(str(tmp_path), "prepare_data", {"size": 64})
        again.table([{"stream": "images", "rows": rows}, {"stream": "videos", "value": 0.5}], "funnel.json")
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path)))
    experiment = client.get_experiment_by_name("t2v").experiment_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(str(tmp_path)))  # load_table asks it, not the client
    table = client.load_table(experiment, "funnel.json")  # finds runs by what the page shows as tables
    assert table.astype(object).where(table.notna(), None).to_dict("records") == [
        {"stream": "images", "rows": 5, "value": None},
        {"stream": "videos", "rows": None, "value": 0.5},
    ]
    assert client.load_table(experiment, "scores.json").to_dict("records") == [{"clips": 7}]


def test_a_dataset_is_an_input_of_the_run_with_its_digest(tmp_path: Path) -> None:
    for _ in range(2):
        record = Record(str(tmp_path), "prepare_data", {"size": 64})
        record.dataset("videos manifest", "s3://bucket/webvid.csv", "0123456789abcdef", 2_500_000)
    (given,) = mlflow.MlflowClient(tracking_uri(str(tmp_path))).get_run(record.run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("videos manifest", "0123456789abcdef")
    assert "s3://bucket/webvid.csv" in given.dataset.source and "2500000" in given.dataset.profile


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_adding_to_a_run_that_has_ended_does_not_open_it_again(tmp_path: Path, status: str) -> None:
    begun = Record(str(tmp_path), "train", {"samples": 5})
    begun.close(status)
    (tmp_path / "grid.png").write_bytes(b"picture")
    Record(str(tmp_path), "train", {}).file(str(tmp_path / "grid.png"), "samples")
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path)))
    assert client.get_run(begun.run_id).info.status == status
    assert [file.path for file in client.list_artifacts(begun.run_id, "samples")] == ["samples/grid.png"]


def test_a_store_that_fails_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown-scheme://nowhere")
    with caplog.at_level(logging.WARNING):
        record = Record(str(tmp_path), "train", {})
        record.metrics({"loss": 1.0}, 1)
        record.close()
    assert len([line for line in caplog.messages if "the job goes on without it" in line]) == 1


def test_a_remote_folder_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI to a server"):
        tracking_uri("s3://bucket/run")
