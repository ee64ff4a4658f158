"""What a job leaves in MLflow: parameters, metrics, tables and files of one run, continued when the job is rerun.

MLFLOW_TRACKING_URI names any server; without it the runs are kept in SQLite beside what the job makes.
"""

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.git_utils import get_git_commit
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT, MLFLOW_LOGGED_ARTIFACTS

from t2v import storage
from t2v.digest import digest_of
from t2v.outbox import Outbox
from t2v.tracking import tracking_uri

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

EXPERIMENT = "t2v"
CLIENT = {  # the outbox tries again, so that one request need not
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
REFUSALS = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "FEATURE_DISABLED",
    "INVALID_PARAMETER_VALUE",
    "NOT_IMPLEMENTED",
    "RESOURCE_DOES_NOT_EXIST",
}


class Record:
    """One MLflow run for (`run_dir`, `job`), whatever the number of processes that add to it after each other.

    Whoever brings no `params` adds to a run that another process begins and ends, and leaves its status alone. Nothing
    waits for the tracking server but `close` (t2v/outbox.py): one that is slow, fails or comes late is said once.
    """

    def __init__(self, run_dir: str, job: str, params: Mapping[str, Any]) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        for name, value in CLIENT.items():
            os.environ.setdefault(name, value)
        self._uri, self._run_dir, self._job = tracking_uri(run_dir), run_dir, job
        self._params = {key: str(value)[:500] for key, value in _flat(params).items()}
        self._note = storage.join(run_dir, "config", f"{job}.mlflow.json")
        self._opened: tuple[mlflow.MlflowClient, str] | None = None
        self._outbox = Outbox("MLflow", self._send, _is_hopeless)
        if params:
            self._put(lambda client, run_id: _complete(client, run_id, self._params))  # opens the run, too

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to each series; `step` counts samples."""
        now = int(time.time() * 1000)
        self._outbox.put(Metric(key, float(value), now, step) for key, value in values.items())

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Keeps rows as a table (`name` ends in .json) that the run's page shows, in place of an earlier one."""
        text = pd.DataFrame(rows).to_json(orient="split", index=False)
        self._put(lambda client, run_id: _replace_table(client, run_id, text, name))

    def dataset(self, name: str, source: str, digest: str, rows: int) -> None:
        """Names what went into the run: where it lies, a hash of its content, its number of rows."""
        facts = {"source_type": "uri", "source": json.dumps({"uri": source}), "profile": json.dumps({"num_rows": rows})}
        entry = DatasetInput(Dataset(name=name, digest=digest, **facts), [InputTag(MLFLOW_DATASET_CONTEXT, name)])
        self._put(lambda client, run_id: client.log_inputs(run_id, datasets=[entry]))

    def file(self, path: str, folder: str) -> None:
        """Keeps a local file, which must be there until `close`, in `folder` of the run's files."""
        self._put(lambda client, run_id: client.log_artifact(run_id, path, folder))

    def model(self, folder: str, samples: int) -> None:
        """Registers what a model folder holds after so many samples, as the version of this run that is `newest`."""
        name = re.sub(r"[^\w.-]", "-", os.path.basename(self._run_dir.rstrip("/")))
        self._put(lambda client, run_id: _register(client, run_id, name, folder, samples))

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> bool:
        """Ends the run as FINISHED, FAILED or KILLED, for a rerun of the job to open again, once the server has all.

        Waits no longer than `timeout_s` for that, and returns whether it has.
        """
        if self._params:
            self._put(lambda client, run_id: client.set_terminated(run_id, status))
        return self._outbox.close(timeout_s)

    def _send(self, points: list[Metric]) -> None:
        client, run_id = self._open()
        client.log_batch(run_id, metrics=points)

    def _put(self, call: Callable[[mlflow.MlflowClient, str], object]) -> None:
        self._outbox.put([lambda: call(*self._open())])

    def _open(self) -> tuple[mlflow.MlflowClient, str]:
        """The run, as the outbox's thread finds or makes it before what it tells first."""
        if not self._opened:
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                _make_database(storage.local_path(self._run_dir))
            client = mlflow.MlflowClient(self._uri)
            if storage.exists(self._note):
                run_id = storage.read_json(self._note)["run_id"]
                if self._params:
                    client.update_run(run_id, status="RUNNING")
            elif self._params:
                run_id = self._begin(client)
            else:
                raise OSError(f"{self._note} is not there yet: the job that begins the run has not reached MLflow")
            self._opened = client, run_id
        return self._opened

    def _begin(self, client: mlflow.MlflowClient) -> str:
        artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else f"{self._run_dir}/mlruns"
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT, artifacts)
        name = f"{self._job} {os.path.basename(self._run_dir.rstrip('/'))}"
        run_id = client.create_run(experiment, run_name=name, tags=_code_tags()).info.run_id
        storage.write_json(self._note, {"run_id": run_id})
        return run_id


def _code_tags() -> dict[str, str]:
    """The commit of this checkout, where it is one, and a digest of the code, which images and copies have as well."""
    project = Path(__file__).parents[1]
    files = sorted(file for room in ("jobs", "pipelines", "t2v") for file in (project / room).rglob("*.py"))
    tags = {"code": digest_of([[str(file.relative_to(project)), file.read_text()] for file in files])}
    commit = get_git_commit(str(project))
    return tags | {MLFLOW_GIT_COMMIT: commit} if commit else tags


def machine_monitors() -> "list[BaseMetricsMonitor]":
    """MLflow's own monitors of this machine's CPU, memory, disk and network, and of its GPUs if they can be read."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        return [*monitors, GPUMonitor()]
    except (ImportError, RuntimeError):  # no GPU, or nothing (nvidia-ml-py) to read it with
        return monitors


def _make_database(folder: str) -> None:
    """Makes MLflow's SQLite file in `folder`, unless it is there, whole or not at all.

    MLflow takes seconds to make the tables, and cannot open a file of which a kill has left it some, nor make them
    while another process does.
    """
    path = os.path.join(folder, "mlflow.db")
    if os.path.exists(path):
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=folder) as beside:
        made = os.path.join(beside, "mlflow.db")
        SqlAlchemyStore(f"sqlite:///{made}", os.path.join(folder, "mlruns")).engine.dispose()
        with suppress(FileExistsError):  # another process was faster
            os.link(made, path)


def _complete(client: mlflow.MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Adds the parameters that a run lacks: all at its start, none later, unless the start was cut off."""
    known = client.get_run(run_id).data.params
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items() if key not in known])


def _is_hopeless(error: Exception) -> bool:
    """Whether MLflow has understood what it was told and does not want it, or what it was to be told is not there."""
    refused = isinstance(error, MlflowException) and error.error_code in REFUSALS
    return refused or isinstance(error, FileNotFoundError)


def _register(client: mlflow.MlflowClient, run_id: str, name: str, folder: str, samples: int) -> None:
    """Begins with what an earlier try may have left; the tag `folder` tells where the model lies."""
    tags = {"folder": folder, "samples": str(samples)}
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = [found for found in client.search_model_versions(f"name = '{name}'") if found.run_id == run_id]
    version = next((found for found in known if found.tags == tags), None)
    create = partial(client.create_model_version, name, run_id=run_id, tags=tags, await_creation_for=0)
    try:
        version = version or create(folder)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        version = create(f"runs:/{run_id}/model")  # a server takes no local folder outside of its own
    client.set_registered_model_alias(name, "newest", str(version.version))


def _replace_table(client: mlflow.MlflowClient, run_id: str, text: str, name: str) -> None:
    """MLflow's log_table without its appending: the file as it writes it, and the tag that makes it a table."""
    client.log_text(run_id, text, name)
    tables = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (entry := {"path": name, "type": "table"}) not in tables:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
