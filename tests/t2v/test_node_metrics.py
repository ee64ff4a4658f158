"""A machine's load is in the run of the training that causes it."""

import time
from contextlib import closing
from pathlib import Path

import mlflow

from t2v.node_metrics import NodeMetrics
from t2v.record import Record, tracking_uri
from tests.t2v.test_record import the_run


def test_two_machines_are_told_apart_in_one_run(tmp_path: Path) -> None:
    first, other = Record(str(tmp_path), "train", {"samples": 5}), Record(str(tmp_path), "train", {})
    begun = time.time()
    with closing(NodeMetrics(first, "node-a", every_s=0.2)), closing(NodeMetrics(other, "node-b", every_s=0.2)):
        sum(number * number for number in range(10_000_000))
        time.sleep(1.2)
    first.close()
    other.close()
    run = the_run(tmp_path)
    for node in ("node-a", "node-b"):
        values = {
            name.rsplit("/", 1)[-1]: value
            for name, value in run.data.metrics.items()
            if name.startswith(f"system/{node}/")
        }
        assert {"disk_usage_percentage", "network_receive_megabytes"} <= set(values)
        assert 0 < values["system_memory_usage_percentage"] < 100 and values["system_memory_usage_megabytes"] > 10
        history = mlflow.MlflowClient(tracking_uri(str(tmp_path))).get_metric_history(
            run.info.run_id, f"system/{node}/cpu_utilization_percentage"
        )
        assert len(history) >= 3 and max(point.value for point in history) > 10
        assert all(int(begun) <= point.step <= time.time() for point in history)
