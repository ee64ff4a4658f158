"""Where MLflow keeps the runs; light, so that a job is told of a place that cannot be before it begins."""

import os

from t2v import storage


def tracking_uri(run_dir: str) -> str:
    """MLFLOW_TRACKING_URI, else SQLite in the run folder; ValueError where the folder cannot hold it."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if not storage.is_local(run_dir):
        raise ValueError("it is remote, where SQLite cannot live: set MLFLOW_TRACKING_URI to a server")
    return f"sqlite:///{storage.local_path(run_dir)}/mlflow.db"
