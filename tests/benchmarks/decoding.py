"""Decoder processes beside threads in the same process: time a row of clips and of pictures, frames returned.

Clips are those of decode.py (H.264 of 336 x 596, 25 fps, 30 s, a keyframe every 50 frames) -> 16 x 256 x 256 x 3;
pictures are JPEGs of 640 x 480 -> 256 x 256 x 3. The same functions on the same files in alternating rounds, by one
thread and by two, each with a process of its own. "empty" sends the file and gets frames of that size, undecoded.

    python tests/benchmarks/decoding.py > tests/benchmarks/results/decoding.txt
"""

import io
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines.config import DecodeConfig
from pipelines.decoding import Decoders
from pipelines.media import read_clip
from pipelines.pictures import read_image
from tests.benchmarks.decode import SIZE, movie
from tests.benchmarks.header import header

ROUNDS, CLIPS, PICTURES = 5, 12, 300


def clip(body: bytes) -> np.ndarray:
    return read_clip(body, 16, 3.0, SIZE, key=str(len(body))).frames


def picture(body: bytes) -> np.ndarray:
    return read_image(body, SIZE).frames


def no_clip(body: bytes) -> np.ndarray:
    return np.zeros((16, SIZE, SIZE, 3), np.uint8)


def no_picture(body: bytes) -> np.ndarray:
    return np.zeros((1, SIZE, SIZE, 3), np.uint8)


def jpeg() -> bytes:
    grain = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.resize(grain, (640, 480), interpolation=cv2.INTER_CUBIC)).save(file, "JPEG", quality=90)
    return file.getvalue()


def cpu_s() -> float:
    """CPU time so far of this process and of its decoders."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (here, *here.children()))


def ms_a_row(decode: Callable[[bytes], object], body: bytes, rows: int, pool: ThreadPoolExecutor) -> np.ndarray:
    """Wall and CPU time."""
    begun, spent = time.perf_counter(), cpu_s()
    for made in pool.map(decode, [body] * rows):
        assert isinstance(made, np.ndarray)
    return np.array([time.perf_counter() - begun, cpu_s() - spent]) * 1e3 / rows


def measure(name: str, body: bytes, rows: int, decode: Callable, empty: Callable, threads: int) -> None:
    decoders = Decoders(DecodeConfig())
    ways = {
        "threads": decode,
        "processes": lambda body: decoders.call(decode, body),
        "processes, empty": lambda body: decoders.call(empty, body),
    }
    spent: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    with ThreadPoolExecutor(threads) as pool:
        for call in ways.values():
            ms_a_row(call, body, 2 * threads, pool)  # processes have started
        for _ in range(ROUNDS):
            for way, call in ways.items():
                spent[way].append(ms_a_row(call, body, rows, pool))
    decoders.close()
    print(f"\n{name} of {len(body) / 1e6:.2f} MB, {threads} at once")
    base = np.median(spent["threads"], axis=0)
    for way, times in spent.items():
        wall, cpu = np.median(times, axis=0)
        print(
            f"  {way:20s}{wall:8.2f} ms wall {wall / base[0]:6.2f} x threads{cpu:10.2f} ms CPU {cpu / base[1]:6.2f} x"
        )


def start_up() -> None:
    from tests.pipelines.misbehaving import counts

    seconds, megabytes = [], 0.0
    for _ in range(ROUNDS):
        decoders = Decoders(DecodeConfig())
        begun = time.perf_counter()
        process = int(decoders.call(counts, b"").view("<u4")[0])
        seconds.append(time.perf_counter() - begun)
        megabytes = psutil.Process(process).memory_full_info().uss / 1e6
        decoders.close()
    print(f"a process starts in {median(seconds):.2f} s and holds {megabytes:.0f} MB of its own before its first row")


def main() -> None:
    print(header())
    cv2.setNumThreads(1)
    print(f"a row, medians of {ROUNDS} alternating rounds of {CLIPS} clips and of {PICTURES} pictures")
    start_up()
    bodies = movie(50), jpeg()
    for threads in (1, 2):
        measure("clips", bodies[0], CLIPS, clip, no_clip, threads)
        measure("pictures", bodies[1], PICTURES, picture, no_picture, threads)


if __name__ == "__main__":
    # Under its own name, by which the decoder processes import these functions.
    import tests.benchmarks.decoding

    tests.benchmarks.decoding.main()
