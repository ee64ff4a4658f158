"""CPU time of a window, 16 frames at 3 fps -> 16 x 256 x 256 x 3: this code beside video2dataset's subsamplers.

The files are those of decode.py (H.264 of 336 x 596, 25 fps, 30 s, a keyframe every 12, 50 and 250 frames). Its path
is that of its download worker: ClippingSubsampler cuts the window out, ResolutionSubsampler scales and crops, then
FrameSubsampler makes 3 fps of it, each by an ffmpeg that writes a file; what comes is decoded by PyAV. "exact" cuts
encode anew, and are the only ones of the frames that were asked for; by default ("low") it cuts at keyframes, wherever
they lie. CPU time of child processes is counted. An ffmpeg must be on the path, such as imageio-ffmpeg's.

    python tests/benchmarks/clips.py > tests/benchmarks/results/video2dataset.txt
"""

import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median

import av
import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines import media, mended
from tests.benchmarks.decode import KEYS, SIZE, movie
from tests.benchmarks.header import header

FRAMES, CLIP_FPS, ROUNDS = 16, 3.0, 2


def video2dataset(precision: str) -> Callable[[bytes, float], np.ndarray]:
    mended._stand_in_for_dataloader()
    from video2dataset.subsamplers import ClippingSubsampler, FrameSubsampler, ResolutionSubsampler

    cut = ClippingSubsampler(5, {"video": "mp4"}, precision=precision)
    scale, thin = ResolutionSubsampler(["scale", "crop"], video_size=SIZE), FrameSubsampler(CLIP_FPS)

    def read(data: bytes, start_s: float) -> np.ndarray:
        span = [start_s, start_s + FRAMES / CLIP_FPS]
        streams, metas, error = cut({"video": [data]}, {"clips": [span], "key": "0"})
        for subsampler in (scale, thin):
            if error is None:
                streams, metas, error = subsampler(streams, metas)
        if error is not None:
            raise RuntimeError(f"it gives no clip: {error}")
        with av.open(io.BytesIO(streams["video"][0])) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), FRAMES)])

    return read


def cpu_s() -> float:
    """CPU time so far of this process and of those children that have ended."""
    children = getrusage(RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(gop: int, readers: dict[str, Callable[[bytes, float], np.ndarray]]) -> None:
    data = movie(gop)
    starts = {key: media.read_clip(data, FRAMES, CLIP_FPS, SIZE, key=key).start_s for key in KEYS}
    spent: dict[str, list[float]] = {name: [] for name in ("this code", *readers)}
    counts: dict[str, list[int]] = {name: [] for name in spent}
    for _ in range(ROUNDS):
        for key, start_s in starts.items():
            ours = partial(media.read_clip, frames=FRAMES, fps=CLIP_FPS, size=SIZE, key=key)
            for name, read in {"this code": lambda data, _, ours=ours: ours(data).frames, **readers}.items():
                begun = cpu_s()
                counts[name].append(len(read(data, start_s)))
                spent[name].append((cpu_s() - begun) * 1e3)
    print(f"\nkeyframe every {gop} frames, {len(data) / 1e6:.1f} MB", flush=True)
    base = median(spent["this code"])
    for name, times in spent.items():
        ms, came = median(times), sorted(counts[name])
        print(
            f"  {name:36s}{ms:8.1f} ms a clip {ms / base:6.1f} x this code   frames {came[0]} to {came[-1]}", flush=True
        )


def main() -> None:
    cv2.setNumThreads(1)
    if (ffmpeg := shutil.which("ffmpeg")) is None:
        raise SystemExit("no ffmpeg on the path, which video2dataset calls: put imageio-ffmpeg's there under that name")
    print(header())
    print(subprocess.getoutput(f"{ffmpeg} -version").splitlines()[0])
    print(f"CPU time with that of child processes, medians of {ROUNDS} alternating rounds over {len(KEYS)} windows")
    readers = {f"video2dataset, {name}": video2dataset(name.split()[0]) for name in ("exact", "low (at keyframes)")}
    for gop in (12, 50, 250):
        measure(gop, readers)


if __name__ == "__main__":
    main()
