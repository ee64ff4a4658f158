"""Encoded bytes -> the frames that the model sees: a window chosen by presentation time, its middle square.

Decoders run on files of strangers: formats are named, pixels are counted before anything is decoded, and
whatever a decoder raises becomes the status of one row. f frames of y x x pixels, RGB.

Of a video only what the window needs is decoded. Its times are read off the packets first, none decoded; then come
the packets from the keyframe before the window on, less those of H.264 that are neither wanted nor used by any other
picture, and nothing after the last wanted one. Where packets do not tell for sure (times that are missing or double,
interlaced pictures, a wanted frame that does not come), every frame of the window is decoded and seen in order.
HDR is tone-mapped once it is small.
"""

import io
import math
import random
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal, NoReturn

import av
import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from pipelines.hdr import FORMAT, is_hdr, toned
from pipelines.nal import is_unreferenced
from pipelines.square import square

if TYPE_CHECKING:  # PyArrow is not for the processes that decode
    from pipelines.ledger import Status

# No playlists (hls, concat): they make the demuxer open other files and addresses.
_VIDEOS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,mpegts,ogg,flv,asf,gif"}
_WITH_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv")  # of presentation, not of decoding alone


class MediaError(Exception):
    """A file that gives no clip or picture, and the status of its row in the ledger."""

    def __init__(self, status: "Status", message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message.encode(errors="replace").decode()  # files' words may be no UTF-8


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [f, y, x, 3], the frame rate of their source, and where in it the first one is wanted.

    `also` are the same frames at other sizes.
    """

    frames: np.ndarray
    source_fps: float
    start_s: float
    also: tuple[np.ndarray, ...] = ()


def read_clip(
    data: bytes | str,
    frames: int,
    fps: float,
    size: int,
    start: Literal["random", "middle"] = "random",
    key: str = "",
    max_pixels: int = 100_000_000,
) -> Clip:
    """Cut `frames` frames at `fps` out of a video, given as bytes or path, each a `size` x `size` middle square.

    A frame is the one that a player shows at the wanted time, whatever the source's frame rate. The window is
    uniform over all that fit and drawn from `key`, or the middle one. MediaError: not_media, corrupt, too_short,
    too_many_pixels.
    """
    with open_video(data, max_pixels) as video:
        part = random.Random(key).random() if start == "random" else 0.5
        return video.clip(part * video.slack_s(frames / fps), frames, fps, size)


@dataclass(frozen=True)
class Video:
    """An open video whose packets have been scanned, once for all clips that are cut out of it."""

    container: InputContainer
    stream: VideoStream
    span: "_Span"

    @property
    def seconds(self) -> float:
        return self.span.seconds

    def slack_s(self, wanted_s: float) -> float:
        """How much longer it is than wanted. MediaError: too_short, or corrupt if it was announced to be longer."""
        slack_s = self.seconds - wanted_s
        if slack_s < -1e-3:
            _refuse_short(self.span, self.stream, wanted_s)
        return max(slack_s, 0)

    def clip(self, start_s: float, frames: int, fps: float, *sizes: int) -> Clip:
        """The window that begins at `start_s`, decoding no more than it needs. MediaError: corrupt."""
        ticks = self._ticks(start_s, frames, fps)
        with decoding():
            squares = _planned(self.container, self.stream, self.span, ticks, sizes)
            squares = squares or _seen(self.container, self.stream, self.span, ticks, sizes)
        return self._clip(squares, start_s)

    def watched_clip(self, start_s: float, frames: int, fps: float, *sizes: int) -> "tuple[Clip, Watched]":
        """The same, and every frame from the first wanted one to the last, none left out: small and uncropped."""
        ticks, watched = self._ticks(start_s, frames, fps), Watched()
        with decoding():
            squares = _seen(self.container, self.stream, self.span, ticks, sizes, watched)
        return self._clip(squares, start_s), watched

    def _clip(self, squares: list[list[np.ndarray]], start_s: float) -> Clip:
        frames, *also = (np.stack(of_a_size) for of_a_size in zip(*squares, strict=True))
        return Clip(frames, float(self.stream.average_rate or 0), start_s, tuple(also))

    def _ticks(self, start_s: float, frames: int, fps: float) -> list[int]:
        first, tick_s = self.span.first, self.span.tick_s
        return [first + math.floor((start_s + index / fps) / tick_s + 1e-6) for index in range(frames)]


@dataclass
class Watched:
    """Frames uint8 [27, 48, 3], the whole of each, and the seconds into the video at which they are first shown."""

    frames: list[np.ndarray] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


@contextmanager
def open_video(data: bytes | str, max_pixels: int = 100_000_000) -> Iterator[Video]:
    """Open a video, given as bytes or path, and scan its packets. MediaError: not_media, corrupt, too_many_pixels."""
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with decoding():
        container = _opened(source)
    with container:
        with decoding():
            stream = _video_stream(container, max_pixels)
            span = _span(container, stream)
        yield Video(container, stream, span)


@dataclass(frozen=True)
class _Span:
    """Presentation times of a stream's first and last frame and of its end, in ticks of `tick_s` seconds.

    `origin` is the decoding time of its first packet, which is where to seek for the very beginning. `times` are
    those of all frames, rising; none where a packet has no time or shares it, so that times do not name frames.
    `keys` are presentation and decoding times of the keyframes.
    """

    origin: int
    first: int
    last: int
    end: int
    tick_s: float
    times: list[int]
    keys: list[tuple[int, int]]

    @property
    def seconds(self) -> float:
        return (self.end - self.first) * self.tick_s


@contextmanager
def decoding() -> Iterator[None]:
    """Decoders raise whatever they like on broken files; each becomes the status of one row."""
    try:
        yield
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError("not_media", "no picture of a known format") from error
    except Image.DecompressionBombError as error:
        raise MediaError("too_many_pixels", str(error)) from error
    except MemoryError as error:
        raise MediaError("decoder_crashed", "out of memory") from error
    except Exception as error:
        raise MediaError("corrupt", f"{type(error).__name__}: {error}") from error


def _opened(source: io.BytesIO | str) -> InputContainer:
    try:
        return av.open(source, mode="r", options=_VIDEOS)
    except av.error.ArgumentError as error:  # a format that is known, and not on the list
        raise MediaError("not_media", "no video of a known format") from error


def _video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        other = container.streams.audio or container.streams.subtitles  # or the header is cut before it tells
        raise MediaError("not_media" if other else "corrupt", f"no video in this {container.format.name} file")
    stream = videos[0]
    if not stream.codec_context:
        raise MediaError("corrupt", "the header does not say how the video is encoded")
    check_pixels(stream.width, stream.height, max_pixels)
    stream.codec_context.options = {"max_pixels": str(max_pixels)}  # of frames that are larger than the header says
    stream.codec_context.thread_count = 1  # frame threads cost more than they give; clips run side by side instead
    return stream


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise MediaError("too_many_pixels", f"{width} x {height} pixels, more than {max_pixels:,}")


def _span(container: InputContainer, stream: VideoStream) -> _Span:
    """From the packets, none decoded: headers may be silent or wrong about the length, and times may be uneven."""
    tick_s = float(stream.time_base or 0)
    spacing = round(1 / (float(stream.average_rate) * tick_s)) if stream.average_rate else 1
    times, origins, keys = [], [], []
    end, certain = 0, True
    for packet in container.demux(stream):
        pts, dts = packet.pts, packet.dts
        certain = certain and (pts is not None or not packet.size)
        time = dts if pts is None else pts
        if packet.is_keyframe and pts is not None and dts is not None:
            keys.append((pts, dts))
        if time is not None and not packet.is_discard:
            times.append(time)
            origins.append(time if dts is None else dts)
            end = max(end, time + (packet.duration or spacing))
    if not times:
        raise MediaError("corrupt", "a video stream without frames")
    rising = sorted(set(times)) if certain else []
    if len(rising) < len(times):
        rising = []
    return _Span(min(origins), min(times), max(times), end, tick_s, rising, sorted(keys))


def _refuse_short(span: _Span, stream: VideoStream, wanted_s: float) -> NoReturn:
    announced_s = (stream.duration or 0) * span.tick_s
    if announced_s >= wanted_s:
        raise MediaError("corrupt", f"ends after {span.seconds:.2f} s of {announced_s:.2f} s")
    raise MediaError("too_short", f"{span.seconds:.2f} s, shorter than {wanted_s:.2f} s")


def _planned(
    container: InputContainer, stream: VideoStream, span: _Span, ticks: list[int], sizes: Sequence[int]
) -> list[list[np.ndarray]]:
    """The squares shown at `ticks`, by decoding what they need alone; none where that cannot be known."""
    if not span.times or stream.codec_context.name != "h264" or container.format.name not in _WITH_TIMES:
        return []
    wanted = [span.times[bisect_right(span.times, tick) - 1] for tick in ticks]
    converter = VideoReformatter()
    squares: dict[int, list[np.ndarray]] = {}
    before = span.first - 1
    for frame in _needed(container, stream, span, wanted):
        if frame.interlaced_frame or frame.pts is None or frame.pts <= before:  # two packets a frame, or wrong times
            return []
        before = frame.pts
        if frame.pts in wanted:
            squares[frame.pts] = _squares(frame, converter, sizes, _pixel_aspect(stream))
    return [squares[time] for time in wanted] if squares.keys() >= set(wanted) else []


def _needed(
    container: InputContainer, stream: VideoStream, span: _Span, wanted: Collection[int]
) -> Iterator[VideoFrame]:
    """What comes of the packets from the keyframe before to the last of the `wanted`, less the unreferenced."""
    coming: set[int | None] = set(wanted)
    header = stream.codec_context.extradata or b""
    for packet in _packets_from(container, stream, span, min(wanted)):
        if packet.pts in coming or not is_unreferenced(packet, header):
            yield from packet.decode()
            coming.discard(packet.pts)
        if not coming:
            break
    yield from stream.codec_context.decode(None)


def _packets_from(
    container: InputContainer, stream: VideoStream, span: _Span, time: int
) -> "Iterator[Packet[VideoStream]]":
    """Packets from a keyframe on that is shown at `time` or before; none if none is found."""
    key = bisect_right(span.keys, (time, time)) - 1
    decoded_at = span.keys[key][1] if key >= 0 else span.origin
    for target in (time, decoded_at):  # containers differ in which of its times they seek by
        container.seek(target, stream=stream)
        packets = (packet for packet in container.demux(stream) if packet.size)
        first = next(packets, None)
        if first is not None and first.is_keyframe and first.pts is not None and first.pts <= time:
            return chain([first], packets)
    return iter(())


def _seen(
    container: InputContainer,
    stream: VideoStream,
    span: _Span,
    ticks: list[int],
    sizes: Sequence[int],
    watched: Watched | None = None,
) -> list[list[np.ndarray]]:
    """The squares shown at `ticks`, by decoding all frames from the keyframe before on."""
    converter = VideoReformatter()
    frames = _decoded_from(container, stream, span, ticks[0])
    if watched is not None:
        frames = _watching(frames, span, ticks, watched)
    aspect = _pixel_aspect(stream)
    return [_squares(frame, converter, sizes, aspect) for frame in _shown(frames, span, ticks)]


def _watching(
    frames: Iterator[tuple[int, VideoFrame]], span: _Span, ticks: list[int], watched: Watched
) -> Iterator[tuple[int, VideoFrame]]:
    """The same frames; those that are shown from the first of `ticks` to the last are noted as they pass."""
    converter = VideoReformatter()
    passed: list[tuple[int, VideoFrame]] = []
    for time, frame in frames:
        passed = [*(passed if time > ticks[0] else []), (time, frame)]
        if ticks[0] < time <= ticks[-1]:
            for shown_at, shown in passed:
                small = converter.reformat(shown, 48, 27, "rgb24", interpolation="AREA", threads=1)
                watched.frames.append(small.to_ndarray())
                watched.times_s.append((shown_at - span.first) * span.tick_s)
            passed = []
        yield time, frame


def _shown(frames: Iterator[tuple[int, VideoFrame]], span: _Span, ticks: list[int]) -> Iterator[VideoFrame]:
    """For each of the rising `ticks` the one of `frames` shown then, the last that is not later."""
    position = 0
    shown, shown_at = None, span.first
    for time, frame in frames:
        while shown is not None and time > ticks[position]:
            yield shown
            position += 1
            if position == len(ticks):
                return
        shown, shown_at = frame, time
    if shown is None or shown_at < span.last:
        raise MediaError("corrupt", "decoding ends before the clip does")
    for _ in ticks[position:]:
        yield shown


def _decoded_from(
    container: InputContainer, stream: VideoStream, span: _Span, tick: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their times, in order of presentation, from the keyframe before `tick` on."""
    for target in (tick, span.origin):  # the second where there is no index and seeking is a guess
        container.seek(target, stream=stream)
        frames = ((frame.pts, frame) for frame in container.decode(stream) if frame.pts is not None)
        first = next(frames, None)
        if first is not None and first[0] <= tick:
            yield first
            yield from frames
            return


def _pixel_aspect(stream: VideoStream) -> float:
    """Width over height; 1 where the file says nothing, or what nobody means."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / 4 <= aspect <= 4 else 1.0


def _squares(
    frame: VideoFrame, converter: VideoReformatter, sizes: Sequence[int], pixel_aspect: float
) -> list[np.ndarray]:
    if frame.is_corrupt:
        raise MediaError("corrupt", f"the frame at {frame.time:.2f} s is damaged")
    deep = is_hdr(frame)
    pixels = FORMAT if deep else "rgb24"
    image = converter.reformat(frame, format=pixels, threads=1).to_ndarray()  # its tables are made once a clip
    turns = round(frame.rotation / 90)
    aspect = 1 / pixel_aspect if turns % 2 else pixel_aspect
    squares = [square(np.rot90(image, turns), size, aspect) for size in sizes]
    return [toned(one, frame) for one in squares] if deep else squares
