import io
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from pipelines.media import MediaError, read_clip
from tests.pipelines.conftest import real_clip

BLUE, GREEN, RED = (0, 0, 255), (0, 255, 0), (255, 0, 0)


def encode(
    times_s,
    container="mp4",
    codec="libx264",
    rate=25,
    image=None,
    rotation=None,
    options=None,
    size=(64, 96),
    pixels="yuv420p",
    pixel_aspect=0,
):
    """A video whose frames are noise (or `image`) and are shown at the given times."""
    numbers = np.random.default_rng(0)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {"g": "50", "bf": "2"})
        (stream.height, stream.width), stream.pix_fmt = size, pixels
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_aspect)
        stream.codec_context.time_base = Fraction(1, rate if container == "avi" else 12_000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for time_s in times_s:
            picture = numbers.integers(0, 256, (*size, 3), np.uint8) if image is None else image
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time_s / frame.time_base)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def evenly(fps, seconds):
    return [index / fps for index in range(round(fps * seconds))]


def unevenly(seconds):
    """Gaps between 10 and 400 ms: some wanted times see the same frame."""
    gaps = np.random.default_rng(1).choice([0.01, 0.03, 0.05, 0.4], size=400)
    times = np.concatenate([[0], np.cumsum(gaps)])
    return times[times < seconds].tolist()


def shown_in_full_decode(data, clip, frames=16, fps=3.0):
    """Of all frames, decoded from the first to the last, the middle square of the one shown at each wanted time."""
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        decoded = [(frame.time, frame) for frame in container.decode(video=0)]
    times = np.array([time for time, _ in decoded])
    wanted = times[0] + clip.start_s + np.arange(frames) / fps
    images = [decoded[np.flatnonzero(times <= time + 1e-5)[-1]][1].to_ndarray(format="rgb24") for time in wanted]
    side = min(images[0].shape[:2])
    top, left = ((length - side) // 2 for length in images[0].shape[:2])
    return np.stack([image[top : top + side, left : left + side] for image in images])


SOURCES = {
    "24 fps": {"times_s": evenly(24, 9), "rate": 24},
    "25 fps": {"times_s": evenly(25, 9), "rate": 25},
    "30 fps, one keyframe": {"times_s": evenly(30, 9), "rate": 30, "options": {"g": "1000", "bf": "3"}},
    "uneven": {"times_s": unevenly(12)},
    "uneven matroska": {"times_s": unevenly(12), "container": "matroska"},
    "2 fps": {"times_s": evenly(2, 9), "rate": 2},
    "transport stream": {"times_s": evenly(25, 9), "container": "mpegts"},
    "avi": {"times_s": evenly(25, 9), "container": "avi", "codec": "mpeg4", "options": {"g": "12"}},
}


@pytest.mark.parametrize("source", SOURCES)
def test_frames_are_those_shown_at_the_wanted_times(source):
    data = encode(**SOURCES[source])
    for key in ("a", "b", "c"):
        clip = read_clip(data, 16, 3.0, 64, key=key)
        np.testing.assert_array_equal(clip.frames, shown_in_full_decode(data, clip))


def x264(gop, b_frames=3, **options):
    return {"g": str(gop), "bf": str(b_frames), "b_strategy": "0", "sc_threshold": "0", "preset": "veryfast", **options}


H264 = {
    "gop 12": {"times_s": evenly(25, 9), "options": x264(12)},
    "gop 50": {"times_s": evenly(25, 9), "options": x264(50)},
    "gop 250": {"times_s": evenly(25, 9), "options": x264(250)},
    "no B-frames": {"times_s": evenly(25, 9), "options": x264(50, 0)},
    "B-frames that are references": {
        "times_s": evenly(25, 9),
        "options": x264(50, 8, **{"x264-params": "b-pyramid=normal"}),
    },
    "flat B-frames": {"times_s": evenly(25, 9), "options": x264(50, 7, **{"x264-params": "b-pyramid=none"})},
    "open gop": {"times_s": evenly(25, 9), "options": x264(24, **{"x264-params": "open-gop=1"})},
    "open gop in a transport stream": {
        "times_s": evenly(25, 9),
        "options": x264(24, **{"x264-params": "open-gop=1"}),
        "container": "mpegts",
    },
    "periodic intra refresh": {"times_s": evenly(25, 9), "options": x264(25, 0, **{"x264-params": "intra-refresh=1"})},
    "interlaced": {"times_s": evenly(25, 9), "options": x264(50, **{"x264-params": "tff=1"})},
    "several slices": {"times_s": evenly(25, 9), "options": x264(50, **{"x264-params": "slices=4"})},
    "uneven": {"times_s": unevenly(12), "options": x264(50)},
    "uneven, gop 250": {"times_s": unevenly(12), "options": x264(250)},
    "uneven matroska": {"times_s": unevenly(12), "options": x264(50), "container": "matroska"},
    "late start": {"times_s": [7 + time for time in evenly(25, 9)], "options": x264(50), "container": "matroska"},
    "flash": {"times_s": evenly(25, 9), "options": x264(50), "container": "flv"},
    "avi": {"times_s": evenly(25, 9), "options": x264(50, 0), "container": "avi"},
    "odd height": {"times_s": evenly(25, 7), "options": x264(50), "size": (65, 97), "pixels": "yuv444p"},
    "odd middle": {"times_s": evenly(25, 7), "options": x264(50), "size": (62, 100)},
    "portrait": {"times_s": evenly(25, 7), "options": x264(50), "size": (118, 70)},
    "ten bits": {"times_s": evenly(25, 7), "options": x264(50), "pixels": "yuv420p10le"},
}


@pytest.mark.parametrize("source", H264)
def test_a_window_is_bit_identical_to_a_full_decode(source):
    data = encode(**H264[source])
    for key in ("a", "b", "c"):
        clip = read_clip(data, 16, 3.0, 48, key=key)
        squares = shown_in_full_decode(data, clip)
        scaled = [cv2.resize(square, (48, 48), interpolation=cv2.INTER_AREA) for square in squares]
        np.testing.assert_array_equal(clip.frames, np.stack(scaled))


def remuxed(data, time_of, container="mp4", options=None):
    """The same packets with other times, (pts, dts) -> (pts, dts); None drops the packet."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container, options=options or {}) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            times = None if packet.dts is None else time_of(packet.pts, packet.dts, packet.time_base)
            if times is not None:
                packet.pts, packet.dts = times
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


def test_an_edit_list_hides_what_it_cuts():
    data = encode(evenly(25, 12), options=x264(50))
    cut = remuxed(data, lambda pts, dts, base: (pts - round(1.52 / base), dts - round(1.52 / base)))
    with av.open(io.BytesIO(cut)) as container:
        assert any(packet.is_discard for packet in container.demux(video=0))
    for key in ("a", "b", "c"):
        clip = read_clip(cut, 16, 3.0, 64, key=key)
        np.testing.assert_array_equal(clip.frames, shown_in_full_decode(cut, clip))
    first = read_clip(cut, 1, 0.1, 64, start="middle")  # of ten seconds in 10.48
    whole = read_clip(data, 300, 25.0, 64)
    assert (whole.frames == first.frames).all(axis=(1, 2, 3)).argmax() == round((1.52 + first.start_s) * 25)


def test_frames_that_are_shown_at_the_same_time():
    data = encode(evenly(25, 9), options=x264(50, 0))
    twice = remuxed(data, lambda pts, dts, base: (-(-pts // round(0.08 / base)) * round(0.08 / base), dts), "matroska")
    with av.open(io.BytesIO(twice)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.dts is not None]
    assert len(set(times)) < len(times)
    for key in ("a", "b", "c"):
        clip = read_clip(twice, 16, 3.0, 64, key=key)
        np.testing.assert_array_equal(clip.frames, shown_in_full_decode(twice, clip))


def test_what_no_wanted_frame_depends_on_is_not_decoded():
    data = encode(evenly(25, 9), options=x264(50))
    clip = read_clip(data, 16, 3.0, 64, key="a")
    shown = np.floor((clip.start_s + np.arange(16) / 3) * 25 + 1e-4) / 25
    damaged = data
    with av.open(io.BytesIO(data)) as container:
        for packet in container.demux(video=0):
            content = bytes(packet)
            if content[4:5] == b"\1" and np.abs(shown - packet.pts * packet.time_base).min() > 0.01:  # nal_ref_idc 0
                damaged = damaged.replace(content, content[:8] + bytes(len(content) - 8))
    with av.open(io.BytesIO(damaged)) as container, pytest.raises(av.error.InvalidDataError):
        list(container.decode(video=0))
    np.testing.assert_array_equal(read_clip(damaged, 16, 3.0, 64, key="a").frames, clip.frames)


def test_the_window_is_drawn_from_the_key_over_all_that_fit():
    data = encode(evenly(10, 8), rate=10)
    starts = [read_clip(data, 16, 3.0, 16, key=str(key)).start_s for key in range(60)]
    slack_s = 8 - 16 / 3
    assert starts[0] == read_clip(data, 16, 3.0, 16, key="0").start_s
    assert 0 <= min(starts) < 0.2 * slack_s
    assert 0.8 * slack_s < max(starts) <= slack_s
    assert read_clip(data, 16, 3.0, 16, start="middle").start_s == pytest.approx(slack_s / 2)


def test_exactly_long_enough_and_a_frame_too_short():
    clip = read_clip(encode(evenly(24, 16 / 3), rate=24), 16, 3.0, 16)
    assert (clip.frames.shape, clip.frames.dtype, clip.source_fps) == ((16, 16, 16, 3), np.uint8, 24)
    assert clip.start_s == pytest.approx(0, abs=1e-3)
    with pytest.raises(MediaError, match=r"5\.29 s, shorter than 5\.33 s") as refused:
        read_clip(encode(evenly(24, 5.29), rate=24), 16, 3.0, 16)
    assert refused.value.status == "too_short"


def test_rotation_is_honoured():
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, 32:64] = np.repeat([RED, BLUE], 32, axis=0)[:, None]  # the middle square's upper and lower half
    upright = read_clip(encode(evenly(5, 6), rate=5, image=image), 16, 3.0, 64).frames[0]
    turned = read_clip(encode(evenly(5, 6), rate=5, image=image, rotation=90), 16, 3.0, 64).frames[0]
    assert upright[8, 32, 0] > 200
    assert turned[32, 8, 0] > 200  # turned counter-clockwise by 90 degrees, up is left
    assert turned[32, 56, 2] > 200


@pytest.mark.parametrize("rotation", [None, 90])
@pytest.mark.parametrize(
    ("size", "pixel_aspect"), [((64, 48), Fraction(4, 3)), ((48, 64), Fraction(3, 4)), ((64, 128), Fraction(2, 3))]
)
def test_pixels_that_are_no_squares_are_seen_as_they_are_shown(size, pixel_aspect, rotation):
    """In the middle of red a blue square, as it is shown, of half the side of the square that is wanted."""
    image = np.full((*size, 3), RED, np.uint8)
    side = min(size[0], size[1] * pixel_aspect) / 2
    tall, wide = round(side), round(side / pixel_aspect)
    top, left = (size[0] - tall) // 2, (size[1] - wide) // 2
    image[top : top + tall, left : left + wide] = BLUE
    video = encode(evenly(5, 6), rate=5, image=image, size=size, pixel_aspect=pixel_aspect, rotation=rotation)
    frame = read_clip(video, 16, 3.0, 64).frames[0]
    is_blue = frame[..., 2] > 128
    assert abs(is_blue[32].sum() - 32) <= 4 and abs(is_blue[:, 32].sum() - 32) <= 4


def test_an_aspect_that_nobody_means_is_none():
    strange, plain = (encode(evenly(5, 6), rate=5, pixel_aspect=aspect) for aspect in (Fraction(1, 100), 0))
    np.testing.assert_array_equal(read_clip(strange, 16, 3.0, 64).frames, read_clip(plain, 16, 3.0, 64).frames)


WHOLE = encode(evenly(25, 8))
STREAMED = encode(evenly(25, 8), container="mpegts")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (WHOLE[: len(WHOLE) // 2], "corrupt"),  # its index, which is at the end, is missing
        (WHOLE[:2000] + bytes(len(WHOLE) // 3) + WHOLE[2000 + len(WHOLE) // 3 :], "corrupt"),
        (b"\0\0\0\x18ftypmp42" + bytes(1000), "corrupt"),
        (STREAMED[: len(STREAMED) // 2], "too_short"),  # a stream may end anywhere
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "corrupt"),
        (b"<!doctype html>", "corrupt"),
    ],
)
def test_broken_videos(data, status):
    with pytest.raises(MediaError) as refused:
        read_clip(data, 16, 3.0, 64)
    assert refused.value.status == status


def test_a_file_whose_index_promises_more_than_there_is_is_corrupt_not_short(tmp_path):
    path = str(tmp_path / "index_first.mp4")
    with av.open(io.BytesIO(WHOLE)) as source, av.open(path, "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    data = Path(path).read_bytes()
    assert read_clip(path, 16, 3.0, 64).frames.shape == (16, 64, 64, 3)
    with pytest.raises(MediaError, match=r"of 8\.00 s") as refused:
        read_clip(data[: len(data) // 2], 16, 3.0, 64)
    assert refused.value.status == "corrupt"


def test_sound_alone_is_not_media():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(MediaError) as refused:
        read_clip(file.getvalue(), 16, 3.0, 64)
    assert refused.value.status == "not_media"


def test_pixels_of_videos_are_bounded():
    with pytest.raises(MediaError, match="96 x 64") as refused:
        read_clip(WHOLE, 16, 3.0, 64, max_pixels=6000)
    assert refused.value.status == "too_many_pixels"


@pytest.mark.parametrize(("name", "side"), [("bikes.mp4", 272), ("cityCC0.mpg", 405)])
def test_real_clips(name, side):
    path = real_clip(name)
    for key in ("a", "b", "c"):
        clip = read_clip(path.read_bytes(), 16, 3.0, side, key=key)  # at its own size, so that nothing is scaled
        assert clip.source_fps == 25
        np.testing.assert_array_equal(clip.frames, shown_in_full_decode(str(path), clip))


def test_real_clips_that_are_too_short():
    for name in ("bigbuckbunny.mp4", "carphone_pristine.mp4"):
        with pytest.raises(MediaError) as refused:
            read_clip(str(real_clip(name)), 16, 3.0, 256)
        assert refused.value.status == "too_short"


def test_frames_that_are_larger_than_the_header_says_are_not_decoded():
    small = encode(evenly(8, 4), "mpegts", rate=8)
    large = encode([4 + time for time in evenly(8, 4)], "mpegts", rate=8, size=(640, 960))
    assert read_clip(small + large, 16, 3.0, 16, key="a").frames.shape == (16, 16, 16, 3)
    with pytest.raises(MediaError):
        read_clip(small + large, 16, 3.0, 16, key="a", max_pixels=100_000)
