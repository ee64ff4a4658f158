import colorsys
import csv
import itertools
import json
import time
from dataclasses import replace
from urllib.parse import urlsplit

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.config import CorpusConfig
from pipelines.corpus import corpus_port, write_corpus
from pipelines.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    VOCABULARY,
    Fields,
    Scene,
    caption,
    draw_scene,
    held_out,
    parse_caption,
    position,
    render,
)

TINY = CorpusConfig(clips=2, pictures=3, test_clips=1, width=96, height=64)


def combinations(directions):
    return itertools.product(COLOURS, SHAPES, directions, BACKGROUNDS)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def captions_by_split(corpus):
    return {
        "train": [row["name"] for row in read_csv(corpus.folder / "webvid.csv")],
        "test": [row["sentence"] for row in read_csv(corpus.folder / "test.csv")],
        "pictures": pq.read_table(corpus.folder / "laion.parquet")["TEXT"].to_pylist(),
    }


def test_grammar_has_the_promised_size_and_every_caption_is_its_own():
    scenes = [Scene(*fields, wording=w) for fields in combinations([*DIRECTIONS, None]) for w in (0, 1)]
    assert len({caption(scene) for scene in scenes}) == len(scenes) == 2 * 8 * 6 * (8 + 1) * 4


def test_caption_round_trip():
    for fields, wording in itertools.product(combinations([*DIRECTIONS, None]), (0, 1)):
        assert parse_caption(caption(Scene(*fields, wording=wording))) == Fields(*fields)


@pytest.mark.parametrize("text", ["", "a cat", "a red circle", "a mauve circle moves left over a plain background"])
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


def test_colours_are_far_apart_in_hue_and_saturated():
    hsv = [colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb)) for rgb in COLOURS.values()]
    gaps = [abs((a[0] - b[0] + 0.5) % 1 - 0.5) * 360 for a, b in itertools.combinations(hsv, 2)]
    assert min(gaps) > 29 and min(saturation for _, saturation, _ in hsv) > 0.7


def test_scenes_follow_from_seed_split_and_index_alone():
    assert draw_scene(TINY, "train", 5) == draw_scene(replace(TINY, clips=900), "train", 5)
    scenes = [
        draw_scene(replace(TINY, seed=seed), split, i) for seed in (0, 1) for split in ("train", "test") for i in (0, 1)
    ]
    assert len({scene.phase for scene in scenes}) == len(scenes)


def test_held_out_combinations_cover_every_label():
    everything = [Fields(*fields) for fields in combinations(DIRECTIONS)]
    test = [fields for fields in everything if held_out(fields)]
    assert 0.18 < len(test) / len(everything) < 0.22
    for place, labels in enumerate(VOCABULARY.values()):
        assert {fields[place] for fields in test} == set(labels)


def test_shape_stays_whole_within_the_middle_square_and_crosses_most_of_it():
    for index in range(60):
        scene = draw_scene(TINY, "train", index)
        ends = [np.array(position(scene, t_s)) for t_s in (0, scene.duration_s)]
        assert np.abs(ends).max() + scene.diameter / 2 <= 0.5 + 1e-6
        assert 0.6 <= np.hypot(*(ends[1] - ends[0])) + 1e-6 <= 0.7501
        frames = np.stack([render(scene, t_s, 96, 160) for t_s in np.linspace(0, scene.duration_s, 5)]).astype(int)
        coloured = np.ptp(frames, axis=-1) > 60
        assert not coloured[:, :, :31].any() and not coloured[:, :, 129:].any()
        area = coloured.sum((1, 2))
        assert area.min() > 0.9 * area.max() > 200


def test_edges_are_smooth_and_the_area_is_right():
    frame = render(Scene("blue", "circle", None, "plain", diameter=0.4), 0, 100, 140)
    cover = (frame[..., 0] - 90.0) / (COLOURS["blue"][0] - 90.0)
    assert cover.sum() == pytest.approx(np.pi * 20**2, rel=0.01)
    assert np.count_nonzero((cover > 0.1) & (cover < 0.9)) > 60


def test_backgrounds_are_grey_and_stand_still():
    for background in BACKGROUNDS:
        scene = Scene("red", "star", "left", background, speed=0.1)
        first, later = (render(scene, t_s, 64, 96) for t_s in (0, 1))
        assert np.array_equal(first[:8], later[:8]) and np.ptp(first[:8], axis=-1).max() == 0
        assert (first[:8].std() > 20) == (background != "plain")


def test_a_rerun_writes_the_same_bytes(tmp_path):
    """One encoding in hundreds of equal frames differs in its last bits, which no eye sees: a third decides then."""
    for name in ("a", "b"):
        write_corpus(tmp_path / name, TINY, "http://127.0.0.1:4321")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 3 + 1 + 5 + 4
    for path in files:
        first, second = tmp_path / "a" / path, tmp_path / "b" / path
        if first.read_bytes() != second.read_bytes():
            assert np.abs(film(first).astype(int) - film(second)).mean() < 0.5, path
            write_corpus(tmp_path / "c", TINY, "http://127.0.0.1:4321")
            assert (tmp_path / "c" / path).read_bytes() in (first.read_bytes(), second.read_bytes()), path


def film(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_written_corpus_is_left_alone_and_another_config_is_refused(corpus):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in corpus.folder.rglob("*")}

    before, began = stamps(), time.monotonic()
    write_corpus(corpus.folder, corpus.config, corpus.base_url)
    assert stamps() == before and time.monotonic() - began < 1
    with pytest.raises(ValueError, match="seed is 0"):
        write_corpus(corpus.folder, replace(corpus.config, seed=1), corpus.base_url)
    with pytest.raises(ValueError, match="base_url is"):
        write_corpus(corpus.folder, corpus.config, "http://127.0.0.1:1")
    assert corpus_port(corpus.folder) == urlsplit(corpus.base_url).port


def test_nothing_counts_as_written_without_the_summary(tmp_path):
    write_corpus(tmp_path, TINY, "http://127.0.0.1:4321")
    (tmp_path / "corpus.json").unlink()
    (tmp_path / "videos/000001.mp4").write_bytes(b"cut off")
    assert corpus_port(tmp_path) == 0
    write_corpus(tmp_path, TINY, "http://127.0.0.1:4321")
    assert (tmp_path / "videos/000001.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture_only_colours": ["mauve"]}, "no such colour: mauve"),
        ({"picture_only_colours": list(COLOURS)}, "leaves none"),
        ({"height": 63}, "even sizes"),
        ({"clips": 0}, "at least one clip"),
    ],
)
def test_impossible_configs_fail_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_corpus(tmp_path, replace(TINY, **change), "http://127.0.0.1:4321")
    assert not any(tmp_path.iterdir())


def test_colours_of_pictures_only_appear_in_no_clip_but_are_asked_for_in_the_test(corpus):
    colours = {
        split: {parse_caption(text).colour for text in captions}
        for split, captions in captions_by_split(corpus).items()
    }
    assert colours["train"] == set(COLOURS) - {"purple", "cyan"}
    assert colours["test"] == colours["pictures"] == set(COLOURS)


def test_no_test_caption_was_trained_on(corpus):
    captions = captions_by_split(corpus)
    assert not {parse_caption(text) for text in captions["train"]} & {parse_caption(text) for text in captions["test"]}


def test_clips_are_real_videos_of_the_stated_length(corpus):
    rates = set()
    for row in read_csv(corpus.folder / "test.csv"):
        with av.open(str(corpus.folder / row["path"])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 144, 96)
            assert 5.9 < stream.duration * stream.time_base < 10.1
            rates.add(stream.average_rate)
    assert rates == {24, 25, 30}


def test_picture_manifest_states_the_sizes_of_the_files(corpus):
    table = pq.read_table(corpus.folder / "laion.parquet").to_pylist()
    sizes = set()
    for row in table:
        if "/images/" in row["URL"]:
            frame = cv2.imread(str(corpus.folder / urlsplit(row["URL"]).path.lstrip("/")))
            assert frame.shape[:2] == (row["HEIGHT"], row["WIDTH"]) and row["HEIGHT"] != row["WIDTH"]
            sizes.add(frame.shape[:2])
    assert len(sizes) > 20


def test_summary_counts_what_the_manifests_hold(corpus):
    summary = json.loads((corpus.folder / "corpus.json").read_text())
    urls = {
        "videos": [row["contentUrl"] for row in read_csv(corpus.folder / "webvid.csv")],
        "images": pq.read_table(corpus.folder / "laion.parquet")["URL"].to_pylist(),
    }
    for stream, found in urls.items():
        assert len(set(found)) == len(found) == summary["rows"][stream]
        faulty = sum("/faults/" in url for url in found)
        assert faulty == sum(summary["faults"][stream].values()) + 2  # flaky and moved end well
    assert summary["faults"]["videos"]["forbidden_address"] == 2 and summary["faults"]["images"]["too_many_pixels"] == 1
