"""How each machine fares while a model trains, told in the run of that training: CPU, memory, disk, network, GPUs."""

import threading
import time

from t2v.record import Record, machine_monitors


class NodeMetrics:
    """Samples this machine with MLflow's monitors, whose own sender would give up at a server's first failure.

    The series are system/<node>/<what>, as MLflow's page of system metrics wants them; their steps are seconds of the
    clock, so that they go on after a restart.
    """

    def __init__(self, record: Record, node: str, every_s: float = 10.0) -> None:
        self._record, self._node, self._every_s = record, node, every_s
        self._monitors = machine_monitors()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="node metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Samples once more and no more; what was sampled is the record's to send."""
        self._closing.set()
        self._thread.join()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(self._every_s)
            values: dict[str, float] = {}
            for monitor in self._monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            self._record.metrics(
                {f"system/{self._node}/{name}": value for name, value in values.items()}, int(time.time())
            )
