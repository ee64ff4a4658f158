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
