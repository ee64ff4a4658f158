"""The preparation's numbers for Prometheus, which scrapes Ray's metrics port; there the names begin with `ray_`."""

from collections import Counter
from collections.abc import Sequence

from ray.util import metrics

from pipelines.ledger import Entry


class Meters:
    """Counts what an encoder's shards come to; all are totals, so that Prometheus makes rates of them."""

    def __init__(self) -> None:
        self._rows = metrics.Counter("t2v_rows", "Rows by how they ended", ("stream", "status", "stage"))
        self._bytes = metrics.Counter("t2v_downloaded_bytes", "Bytes of downloads", ("stream",))
        self._frames = metrics.Counter("t2v_frames", "Frames decoded and encoded", ("stream",))
        self._seconds = metrics.Counter("t2v_stage_seconds", "Seconds that stages took", ("stream", "stage"))

    def shard(self, stream: str, entries: Sequence[Entry], frames: int, seconds: dict[str, float]) -> None:
        """Adds one shard: its ledger, its frames, and by stage the seconds that it took."""
        for (status, stage), rows in Counter((entry.status, entry.stage) for entry in entries).items():
            self._rows.inc(rows, {"stream": stream, "status": status, "stage": stage})
        for part, took in seconds.items():
            self._add(self._seconds, took, {"stream": stream, "stage": part})
        self._add(self._bytes, sum(entry.bytes for entry in entries), {"stream": stream})
        self._add(self._frames, frames, {"stream": stream})

    def _add(self, counter: metrics.Counter, amount: float, tags: dict[str, str]) -> None:
        if amount > 0:  # Ray refuses to add nothing
            counter.inc(amount, tags)
