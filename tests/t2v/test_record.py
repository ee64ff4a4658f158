"""One MLflow run however often a job is started, and jobs that go on when the server does not answer."""

import logging
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from t2v import storage
from t2v.record import Record, tracking_uri
from tests.t2v.mlflow_server import Server


def the_run(run_dir: Path, job: str = "train") -> Run:
    run_id = storage.read_json(str(run_dir / "config" / f"{job}.mlflow.json"))["run_id"]
    return mlflow.MlflowClient(tracking_uri(str(run_dir))).get_run(run_id)


def test_a_rerun_continues_the_same_run(tmp_path: Path) -> None:
    for step, status in ((10, "KILLED"), (20, "FINISHED")):
        record = Record(str(tmp_path), "train", {"train": {"samples": 5}})
        record.metrics({"loss": 1 / step}, step)
        record.table([{"stream": "images", "rows": 3}], "rows.json")
        record.close(status, timeout_s=120)
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path)))
    (run,) = client.search_runs([client.get_experiment_by_name("t2v").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"train.samples": "5"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 0.1), (20, 0.05)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["rows.json"]


def test_parameters_that_a_killed_start_did_not_send_are_sent_by_the_next(tmp_path: Path) -> None:
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path)))
    begun = client.create_run(client.create_experiment("t2v", f"{tmp_path}/mlruns"))
    storage.write_json(str(tmp_path / "config/train.mlflow.json"), {"run_id": begun.info.run_id})
    client.log_param(begun.info.run_id, "seed", "0")
    Record(str(tmp_path), "train", {"seed": 0, "train": {"samples": 5}}).close(timeout_s=120)
    assert client.get_run(begun.info.run_id).data.params == {"seed": "0", "train.samples": "5"}


def test_a_run_names_the_code_that_began_it(tmp_path: Path) -> None:
    Record(str(tmp_path), "train", {"seed": 0}).close()
    run = the_run(tmp_path)
    project = Path(__file__).parents[2]
    assert re.fullmatch(r"[0-9a-f]{16}", run.data.tags["code"])
    if (project / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True).stdout.strip()
        assert run.data.tags["mlflow.source.git.commit"] == head


def test_a_table_replaces_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(str(tmp_path), "prepare_data", {"size": 64})
    record.table([{"clips": 7}], "scores.json")
    record.close()
    for rows in (3, 5):
        again = Record(str(tmp_path), "prepare_data", {"size": 64})
        again.table([{"stream": "images", "rows": rows}, {"stream": "videos", "value": 0.5}], "funnel.json")
        again.close()
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
        record.close()
    (given,) = the_run(tmp_path, "prepare_data").inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("videos manifest", "0123456789abcdef")
    assert "s3://bucket/webvid.csv" in given.dataset.source and "2500000" in given.dataset.profile


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_adding_to_a_run_that_has_ended_does_not_open_it_again(tmp_path: Path, status: str) -> None:
    Record(str(tmp_path), "train", {"samples": 5}).close(status)
    (tmp_path / "grid.png").write_bytes(b"picture")
    adding = Record(str(tmp_path), "train", {})
    adding.file(str(tmp_path / "grid.png"), "samples")
    adding.close()
    run = the_run(tmp_path)
    assert run.info.status == status
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path)))
    assert [file.path for file in client.list_artifacts(run.info.run_id, "samples")] == ["samples/grid.png"]


def test_whoever_adds_waits_for_the_job_that_begins_the_run(tmp_path: Path) -> None:
    adding = Record(str(tmp_path), "train", {})
    adding.metrics({"system/cpu": 0.5}, 0)
    time.sleep(1)
    Record(str(tmp_path), "train", {"samples": 5}).close()
    adding.close()
    assert the_run(tmp_path).data.metrics == {"system/cpu": 0.5}


def test_a_store_that_refuses_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown-scheme://nowhere")
    with caplog.at_level(logging.WARNING):
        record = Record(str(tmp_path), "train", {"samples": 5})
        record.metrics({"loss": 1.0}, 1)
        record.close()
    assert len([line for line in caplog.messages if "the job goes on without it" in line]) == 1
    assert "3 points or files are lost" in caplog.messages[-1]


def test_a_server_that_comes_late_and_goes_away_is_told_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (tmp_path / "grid.png").write_bytes(b"picture")
    try:
        record = Record(str(tmp_path), "train", {"train": {"samples": 5}})
        slowest = 0.0
        for step in range(1, 31):
            if step in (11, 21):
                server.start()
            begun = time.monotonic()
            record.metrics({"loss": 1 / step, "samples_per_s": 2.0}, step)
            record.file(str(tmp_path / "grid.png"), f"samples/{step}")
            slowest = max(slowest, time.monotonic() - begun)
            if step in (15, 25):
                server.stop()
        record.model(str(tmp_path / "model"), 30)  # a folder that the server does not take as its own
        server.start()
        record.close(timeout_s=60)
        run, client = the_run(tmp_path), mlflow.MlflowClient(server.uri)
        history = client.get_metric_history(run.info.run_id, "loss")
        files = client.list_artifacts(run.info.run_id, "samples")
        model = client.get_model_version_by_alias(tmp_path.name, "newest")
    finally:
        server.stop()
    assert run.info.status == "FINISHED" and run.data.params == {"train.samples": "5"}
    assert sorted((point.step, point.value) for point in history) == [(step, 1 / step) for step in range(1, 31)]
    assert sorted(file.path for file in files) == sorted(f"samples/{step}" for step in range(1, 31))
    assert model.run_id == run.info.run_id and model.tags == {"folder": str(tmp_path / "model"), "samples": "30"}
    assert slowest < 0.5
    assert ["the job goes on without it" in line for line in caplog.messages if "MLflow" in line] == [True]


def test_each_export_is_one_version_of_the_registered_model_and_the_last_is_the_newest(tmp_path: Path) -> None:
    Record(str(tmp_path / "nano"), "train", {"samples": 5}).close()
    for samples in (500, 1000, 1000):  # the last is a rerun
        record = Record(str(tmp_path / "nano"), "train", {})
        record.model("/data/nano/train/model", samples)
        record.close()
    client = mlflow.MlflowClient(tracking_uri(str(tmp_path / "nano")))
    versions = client.search_model_versions("name = 'nano'")
    assert sorted((int(found.version), found.tags["samples"], found.source) for found in versions) == [
        (1, "500", "/data/nano/train/model"),
        (2, "1000", "/data/nano/train/model"),
    ]
    assert client.get_model_version_by_alias("nano", "newest").tags["samples"] == "1000"


def test_a_server_that_takes_connections_and_never_answers_delays_nothing_but_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        record = Record(str(tmp_path), "train", {"samples": 5})
        for step in range(60_000):
            record.metrics({"loss": 1.0, "mfu": 0.5}, step)
        told = time.monotonic()
        record.close("FAILED", timeout_s=2)
        ended = time.monotonic()
    assert told - begun < 60_000 * 2e-4 and 2 <= ended - told < 6
    assert any(re.search("12000. points or files are lost", line) for line in caplog.messages)


def test_a_remote_folder_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI to a server"):
        tracking_uri("s3://bucket/run")


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path) -> None:
    """Of tables that a kill has left MLflow makes no database any more."""
    script = f"from t2v.record import Record; Record({str(tmp_path)!r}, 'train', {{'seed': 0}}).close(timeout_s=120)"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while process.poll() is None and not any(path.stat().st_size > 50_000 for path in tmp_path.rglob("mlflow.db")):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    Record(str(tmp_path), "train", {"seed": 1}).close(timeout_s=120)
    assert the_run(tmp_path).data.params == {"seed": "1"}


def test_processes_that_begin_at_once_share_one_database(tmp_path: Path) -> None:
    jobs = ["prepare_data", "train"]
    for record in [Record(str(tmp_path), job, {"seed": 0}) for job in jobs]:
        record.close(timeout_s=120)
    assert [the_run(tmp_path, job).data.params for job in jobs] == [{"seed": "0"}] * 2
