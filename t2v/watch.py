"""What ranks say outside their collectives: where each is, so that a hang gets a name, and whether all are to stop."""

import os
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from t2v.gauges import Gauges

EVERY_S = 2.0  # between two beats of a rank
HANGS = 70  # exit code of a rank that ends a run that hangs
_PROJECT = str(Path(__file__).parents[1])


@dataclass
class Beat:
    """What a rank said last: samples of its last step, what it was doing, and when that was (seconds)."""

    samples: int
    doing: str
    heard: float


@ray.remote(num_cpus=0, max_restarts=-1)
class Watch:
    """Hears the beats of all ranks of a run, and shows what its milestones come to; one actor, away from the ranks."""

    def __init__(self, hang_s: float) -> None:
        self._hang_s = hang_s
        self._stop = False
        self._beats: dict[int, Beat] = {}
        self._moved = time.monotonic()
        self._gauges = Gauges()

    def observe(self, losses: dict[str, float]) -> None:
        """Shows a milestone's numbers until the next one's: the task that finds them ends, and its gauges would too."""
        self._gauges.set(losses)

    def stop(self) -> None:
        """Asks all ranks to write a checkpoint and end."""
        self._stop = True

    def begin(self, rank: int) -> None:
        """Hears that a rank has started, which may have waited for room: what one before it said counts no more."""
        self._beats.pop(rank, None)

    def beat(self, rank: int, world: int, samples: int, doing: str) -> tuple[bool, str]:
        """Hears one rank; tells whether it is to stop, and to the first that asks after a hang, who hangs where."""
        now = time.monotonic()
        self._beats = {other: beat for other, beat in self._beats.items() if other < world}
        if rank not in self._beats or self._beats[rank].samples != samples:
            self._moved = now
        self._beats[rank] = Beat(samples, doing, now)
        if now - self._moved < self._hang_s:
            return self._stop, ""
        self._moved = now
        return self._stop, diagnosis(self._beats, world, now, self._hang_s)


def diagnosis(beats: dict[int, Beat], world: int, now: float, hang_s: float) -> str:
    """Which ranks keep the others waiting: those not heard of, else those behind, else those that do what few do."""
    silent = [rank for rank in range(world) if rank not in beats or now - beats[rank].heard > hang_s / 2]
    furthest = max(beat.samples for beat in beats.values())
    behind = [rank for rank, beat in sorted(beats.items()) if beat.samples < furthest]
    rarest = Counter(beat.doing for beat in beats.values()).most_common()[-1][0]
    odd = silent or behind or [rank for rank, beat in sorted(beats.items()) if beat.doing == rarest]
    lines = [f"[train] no rank has finished a step for {hang_s:,.0f} s, after {furthest:,} samples; see rank {odd[0]}"]
    places: dict[str, list[int]] = {}
    for rank in range(world):
        doing = "has not been heard of" if rank in silent else beats[rank].doing
        places.setdefault(doing, []).append(rank)
    for doing, ranks in sorted(places.items(), key=lambda place: (odd[0] not in place[1], len(place[1]))):
        lines.append(f"[train]   ranks {', '.join(map(str, ranks))}: {doing}")
    return "\n".join(lines)


class Pulse:
    """The thread of a rank that speaks with the Watch; `samples` and `wants_stop` are what they tell each other.

    The process ends when the Watch says that the run hangs: Ray Train then starts all ranks anew.
    """

    def __init__(self, watch: Any, rank: int, world: int) -> None:
        self.samples = -1
        self.wants_stop = False
        self._watch, self._rank, self._world = watch, rank, world
        self._watched = threading.get_ident()
        self._ended = threading.Event()
        watch.begin.remote(rank)
        self._thread = threading.Thread(target=self._speak, name="pulse")
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join()

    def _speak(self) -> None:
        while not self._ended.wait(EVERY_S):
            call = self._watch.beat.remote(self._rank, self._world, self.samples, doing(self._watched))
            try:
                stop, hang = ray.get(call, timeout=30)
            except (RayActorError, GetTimeoutError):  # its node is gone, or slow: the next beat tries anew
                continue
            self.wants_stop |= stop
            if hang:
                print(hang, flush=True)
                os._exit(HANGS)


def doing(thread: int) -> str:
    """Where a thread is: the project's lines of its stack, the innermost first."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame else []
    own = [entry for entry in stack if entry.filename.startswith(_PROJECT) and "site-packages" not in entry.filename]
    places = [f"{os.path.relpath(entry.filename, _PROJECT)}:{entry.lineno} {entry.name}" for entry in reversed(own)]
    return " < ".join(places) or "outside the project's code"
