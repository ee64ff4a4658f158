"""The watch: it passes a wish to stop on to every rank, and names the rank that keeps the others waiting."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from t2v.watch import HANGS, Beat, Pulse, Watch, diagnosis, doing

PROJECT = Path(__file__).parents[2]


def beats(*said: tuple[int, str, float]) -> dict[int, Beat]:
    return {rank: Beat(*beat) for rank, beat in enumerate(said) if beat}


@pytest.mark.parametrize(
    "said, culprit, line",
    [
        ([(90, "update", 100), (90, "reading", 100), (90, "update", 100)], 1, "ranks 1: reading"),
        ([(90, "update", 100), (90, "update", 100), (80, "update", 100)], 2, "ranks 0, 1, 2: update"),
        ([(90, "update", 100), (90, "update", 20), (90, "reading", 100)], 1, "ranks 1: has not been heard of"),
        ([(90, "update", 100), (90, "update", 100)], 2, "ranks 2: has not been heard of"),
    ],
)
def test_a_diagnosis_names_the_rank_that_others_wait_for(
    said: list[tuple[int, str, float]], culprit: int, line: str
) -> None:
    text = diagnosis(beats(*said), world=3, now=100, hang_s=60)
    assert f"no rank has finished a step for 60 s, after 90 samples; see rank {culprit}" in text
    assert text.splitlines()[1] == f"[train]   {line}"


def test_where_a_thread_is_are_lines_of_the_project() -> None:
    here = doing(threading.get_ident()).split(" < ")
    assert here[0].startswith("t2v/watch.py") and here[0].endswith("doing")
    assert here[1].startswith("tests/t2v/test_watch.py") and "site-packages" not in "".join(here)
    assert doing(-1) == "outside the project's code"


def test_a_wish_to_stop_reaches_every_rank(ray_session: None) -> None:
    watch = Watch.remote(60.0)
    pulses = [Pulse(watch, rank, 2) for rank in range(2)]
    assert not any(pulse.wants_stop for pulse in pulses)
    ray.get(watch.stop.remote())
    deadline = time.monotonic() + 30
    while not all(pulse.wants_stop for pulse in pulses) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(pulse.wants_stop for pulse in pulses)
    for pulse in pulses:
        pulse.close()
    ray.kill(watch)


def test_ranks_that_had_to_wait_for_room_do_not_hang(ray_session: None) -> None:
    watch = Watch.remote(0.5)
    for _ in range(2):  # the first ones end before their first step
        watch.begin.remote(0)
        assert ray.get(watch.beat.remote(0, 1, -1, "loading")) == (False, "")
        time.sleep(0.8)
    assert "no rank has finished a step" in ray.get(watch.beat.remote(0, 1, -1, "loading"))[1]
    ray.kill(watch)


HANGING = """
import os, sys, time
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from t2v.watch import Pulse, Watch
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
pulse = Pulse(Watch.remote(3.0), 0, 1)
pulse.samples = 7
time.sleep(60)
sys.exit("the watch let it hang")
"""


def test_a_process_that_hangs_says_where_and_ends() -> None:
    done = subprocess.run([sys.executable, "-c", HANGING], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == HANGS, done.stderr[-2000:]
    assert "no rank has finished a step for 3 s, after 7 samples; see rank 0" in done.stdout
