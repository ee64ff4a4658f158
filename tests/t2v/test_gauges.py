"""Every number of the log is there for Prometheus, under the name and the tags that the dashboard asks for."""

import re
import time
import urllib.request

import ray

from t2v.gauges import MEANINGS, Gauges, gauge_of

LINE = {
    "samples": 640,
    "loss_images": 0.5,
    "loss_videos": 0.25,
    "loss_videos_t000": 0.75,
    "loss_videos_t250": 0.125,
    "images_per_s": 1.0,
    "videos_per_s": 7.0,
    "samples_per_s": 8.0,
    "mfu": 0.4375,
}
SLOWEST_REPORT_S = 60.0


@ray.remote(num_cpus=0)
class Rank:
    def __init__(self) -> None:
        self.gauges = Gauges()

    def set(self, line: dict[str, float]) -> None:
        self.gauges.set(line)


def tagged(key: str) -> tuple:
    """A gauge and its tags."""
    name, tags = gauge_of(key)
    return name, *sorted(tags.items())


def scraped(wanted: set[tuple]) -> dict[tuple, float]:
    """What Ray's metrics port says of gauges and tags, once it knows of as many as are wanted."""
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + SLOWEST_REPORT_S
    found: dict[tuple, float] = {}
    while len(found) < len(wanted) and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        for name, tags, value in re.findall(r"^ray_t2v_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            own = {key: tag for key, tag in re.findall(r'(\w+)="([^"]*)"', tags) if key in ("stream", "timestep")}
            if name in {name for name, *_ in wanted}:
                found[name, *sorted(own.items())] = float(value)
    return found


def test_what_prometheus_scrapes_is_what_the_log_says(ray_session: None) -> None:
    rank = Rank.remote()
    ray.get(rank.set.remote(LINE))
    wanted = {tagged(key): value for key, value in LINE.items()}
    assert scraped(set(wanted)) == wanted
    assert {name for name, *_ in wanted} <= set(MEANINGS)
    ray.kill(rank)
