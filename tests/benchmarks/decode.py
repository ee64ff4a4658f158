"""CPU time of a clip's window, 16 frames at 3 fps -> 16 x 256 x 256 x 3, beside other readers of the same files.

H.264 of 336 x 596, 25 fps, 30 s, with a keyframe every 12, 50 and 250 frames, made here. All readers get the same
windows in alternating rounds, one thread each, and scale by the same area filter. Two convert nothing and decode the
packets alone that the window needs, planned beforehand: the bare loop opens the file, seeks and reads up to the last of
them; bare decoding has them in memory and its decoder warm. The process keeps freed memory, as decoder processes do
(pipelines/decoding.py): without, this code has 4 ms of page faults a clip. Readers that do not load are left out
(torchcodec wants the shared libraries of an FFmpeg on its path; in the stored result those that PyAV brings).

    python tests/benchmarks/decode.py > tests/benchmarks/results/decode.txt
"""

import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import av
import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipelines import media
from pipelines.decoding import _ENVIRONMENT
from pipelines.nal import is_unreferenced
from pipelines.square import square
from tests.benchmarks.header import PYTHON, header

FPS, SECONDS, HEIGHT, WIDTH, SIZE = 25, 30, 336, 596, 256
ROUNDS, KEYS = 5, ("a", "b", "c", "d")
Reader = Callable[[bytes, list[int]], object]  # a file and the numbers of the wanted frames


def movie(gop: int) -> bytes:
    """A camera that circles over a grainy plane, with a square that crosses it."""
    numbers = np.random.default_rng(0)
    plane = cv2.resize(numbers.integers(0, 256, (60, 60, 3), np.uint8), (1600, 1600), interpolation=cv2.INTER_CUBIC)
    plane = np.clip(plane + numbers.normal(0, 6, plane.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FPS, options={"g": str(gop), "preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(FPS * SECONDS):
            top, left = int(500 + 400 * np.sin(index / 40)), int(500 + 400 * np.cos(index / 55))
            image = plane[top : top + HEIGHT, left : left + WIDTH].copy()
            image[100:180, index * 5 % 500 : index * 5 % 500 + 80] = plane[:80, :80]
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def squares(images: object) -> np.ndarray:
    return np.stack([square(image, SIZE) for image in images])  # type: ignore[attr-defined]


def needed(data: bytes, wanted: list[int]) -> list[av.Packet]:
    """The packets that a window needs, in the order of decoding."""
    container = av.open(io.BytesIO(data))
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    ticks = [round(index / FPS / stream.time_base) for index in wanted]
    header_bytes = stream.codec_context.extradata or b""
    span = media._span(container, stream)
    coming, packets = set(ticks), []
    for packet in media._packets_from(container, stream, span, ticks[0]):
        if packet.pts in coming or not is_unreferenced(packet, header_bytes):
            packets.append(packet)
            coming.discard(packet.pts)
        if not coming:
            break
    return packets


def bare(packets: list[av.Packet]) -> None:
    context = packets[0].stream.codec_context
    context.flush_buffers()
    for packet in packets:
        packet.decode()
    context.decode(None)


def loop(data: bytes, first: int, times: set[int]) -> None:
    """The same of packets with these times, from the file on; `first` is where to seek."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(first, stream=stream)
        left = len(times)
        for packet in container.demux(stream):
            if packet.pts in times:
                packet.decode()
                left -= 1
            if not left:
                break
        stream.codec_context.decode(None)


def opencv(data: bytes, wanted: list[int], path: str) -> np.ndarray:
    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    video.set(cv2.CAP_PROP_POS_FRAMES, wanted[0])
    images, position = [], wanted[0]
    for index in wanted:
        while position <= index:
            video.grab()
            position += 1
        images.append(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB))
    return squares(images)


def others() -> dict[str, Reader]:
    """torchcodec and decord, where they are installed."""
    readers: dict[str, Reader] = {}
    try:
        from torchcodec.decoders import VideoDecoder

        for mode in ("exact", "approximate"):
            readers[f"torchcodec {mode}"] = lambda data, wanted, mode=mode: squares(
                VideoDecoder(data, num_ffmpeg_threads=1, seek_mode=mode, dimension_order="NHWC")
                .get_frames_at(wanted)
                .data.numpy()
            )
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec is left out: {type(error).__name__}")
    try:
        from decord import VideoReader

        readers["decord"] = lambda data, wanted: squares(
            VideoReader(io.BytesIO(data), num_threads=1).get_batch(wanted).asnumpy()
        )
    except (ImportError, OSError) as error:
        print(f"decord is left out: {type(error).__name__}")
    return readers


def measure(gop: int, extra: dict[str, Reader], path: Path) -> None:
    data = movie(gop)
    path.write_bytes(data)
    clips = [media.read_clip(data, 16, 3.0, SIZE, key=key) for key in KEYS]
    windows = [[int((clip.start_s + i / 3) * FPS + 1e-4) for i in range(16)] for clip in clips]
    packets = [needed(data, wanted) for wanted in windows]
    times = [{packet.pts for packet in some} for some in packets]
    readers: dict[str, Callable[[int], object]] = {
        "this code": lambda i: media.read_clip(data, 16, 3.0, SIZE, key=KEYS[i]).frames,
        "bare loop": lambda i: loop(data, packets[i][0].pts, times[i]),
        "bare decoding": lambda i: bare(packets[i]),
        "OpenCV": lambda i: opencv(data, windows[i], str(path)),
    }
    readers |= {name: lambda i, read=read: read(data, windows[i]) for name, read in extra.items()}
    spent: dict[str, list[float]] = {name: [] for name in readers}
    furthest = {name: 0.0 for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            for i, clip in enumerate(clips):
                start = time.process_time()
                frames = read(i)
                spent[name].append((time.process_time() - start) * 1e3)
                if frames is not None:
                    off = np.abs(np.asarray(frames).astype(int) - clip.frames).mean(axis=(1, 2, 3)).max()
                    furthest[name] = max(furthest[name], float(off))
    ours = median(spent["this code"])
    print(f"\nkeyframe every {gop} frames, {len(data) / 1e6:.1f} MB")
    for name, times in spent.items():
        ms = median(times)
        print(f"  {name:24s}{ms:7.1f} ms a clip {ms / ours:7.2f} x this code   frames differ by {furthest[name]:.2f}")


def main() -> None:
    import tempfile

    print(header())
    cv2.setNumThreads(1)
    extra = others()
    print(f"CPU time, medians of {ROUNDS} alternating rounds over {len(KEYS)} windows; the largest mean difference of")
    print("any frame from this code's, of 255 (other conversions to RGB give one or two; a wrong frame gives tens)")
    with tempfile.TemporaryDirectory() as folder:
        for gop in (12, 50, 250):
            measure(gop, extra, Path(folder) / "clip.mp4")


if __name__ == "__main__":
    if not os.environ.items() >= _ENVIRONMENT.items():  # glibc reads it as it starts
        os.execve(PYTHON, [PYTHON, *sys.argv], os.environ | _ENVIRONMENT)
    main()
