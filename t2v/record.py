"""What a job leaves in MLflow: parameters, metrics, tables and files of one run, continued when the job is rerun.

MLFLOW_TRACKING_URI names any server; without it the runs are kept in SQLite beside what the job makes.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlflow
import pandas as pd
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_LOGGED_ARTIFACTS

from t2v import storage
from t2v.tracking import tracking_uri

EXPERIMENT = "t2v"
log = logging.getLogger(__name__)


class Record:
    """One MLflow run for (`run_dir`, `job`), whatever the number of processes that add to it after each other.

    Whoever brings no `params` adds to a run that another process begins and ends, and leaves its status alone. A
    tracking server that fails is said once and never stops the job.
    """

    def __init__(self, run_dir: str, job: str, params: Mapping[str, Any]) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._silenced = False
        uri = tracking_uri(run_dir)
        self._note = storage.join(run_dir, "config", f"{job}.mlflow.json")
        self.run_id = ""
        self._try(self._open, uri, run_dir, job, {key: str(value)[:500] for key, value in _flat(params).items()})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Adds one point to each series; `step` counts samples."""
        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step) for key, value in values.items()]
        self._try(lambda: self._client.log_batch(self.run_id, metrics=points))

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Keeps rows as a table (`name` ends in .json) that the run's page shows, in place of an earlier one."""
        self._try(self._replace_table, pd.DataFrame(rows).to_json(orient="split", index=False), name)

    def dataset(self, name: str, source: str, digest: str, rows: int) -> None:
        """Names what went into the run: where it lies, a hash of its content, its number of rows."""
        facts = {"source_type": "uri", "source": json.dumps({"uri": source}), "profile": json.dumps({"num_rows": rows})}
        entry = DatasetInput(Dataset(name=name, digest=digest, **facts), [InputTag(MLFLOW_DATASET_CONTEXT, name)])
        self._try(lambda: self._client.log_inputs(self.run_id, datasets=[entry]))

    def file(self, path: str, folder: str) -> None:
        """Keeps a local file in `folder` of the run's files."""
        self._try(lambda: self._client.log_artifact(self.run_id, path, folder))

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED; a rerun of the job opens it again."""
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    def _open(self, uri: str, run_dir: str, job: str, params: dict[str, str]) -> None:
        self._client = mlflow.MlflowClient(uri)
        if storage.exists(self._note):
            self.run_id = storage.read_json(self._note)["run_id"]
            if params:
                self._client.update_run(self.run_id, status="RUNNING")
        else:
            artifacts = None if os.environ.get("MLFLOW_TRACKING_URI") else f"{run_dir}/mlruns"
            found = self._client.get_experiment_by_name(EXPERIMENT)
            experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT, artifacts)
            name = f"{job} {os.path.basename(run_dir.rstrip('/'))}"
            self.run_id = self._client.create_run(experiment, run_name=name).info.run_id
            storage.write_json(self._note, {"run_id": self.run_id})
            self._client.log_batch(self.run_id, params=[Param(key, value) for key, value in params.items()])

    def _replace_table(self, text: str, name: str) -> None:
        """MLflow's log_table without its appending: the file as it writes it, and the tag that makes it a table."""
        self._client.log_text(self.run_id, text, name)
        tables = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        if (entry := {"path": name, "type": "table"}) not in tables:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, entry]))

    def _try(self, call: Callable[..., object], *arguments: Any) -> None:
        if self._silenced and not self.run_id:
            return
        try:
            call(*arguments)
        except (MlflowException, OSError) as error:
            if not self._silenced:
                log.warning("MLflow does not answer, the job goes on without it: %s", str(error).splitlines()[0])
            self._silenced = True


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
