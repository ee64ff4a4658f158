import csv
from dataclasses import replace

import cv2
import numpy as np
import pytest

from pipelines.config import CorpusConfig
from pipelines.evidence import someone_else
from pipelines.judge import judge, tabulate
from pipelines.media import read_clip
from pipelines.shapes import COLOURS, VOCABULARY, Fields, Scene, caption, draw_scene, parse_caption, render


def through_jpeg(frame):
    ok, jpg = cv2.imencode(".jpg", frame[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    return cv2.imdecode(jpg, cv2.IMREAD_COLOR)[:, :, ::-1]


def damaged(frames, rng):
    """Blur and noise of about a small VAE's damage."""
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 0.7) for frame in frames])
    return np.clip(blurred + rng.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)


def fields(items):
    """What the judge sees in clips, and what their captions say."""
    pairs = [(judge(frames), parse_caption(text)) for frames, text in items]
    return [seen for seen, _ in pairs], [said for _, said in pairs]


@pytest.fixture(scope="module")
def clips(corpus):
    """Three random windows of every clip as training sees them: 16 frames at 3 fps, 64 x 64."""
    found = []
    for table, path, text in (("webvid.csv", "contentUrl", "name"), ("test.csv", "path", "sentence")):
        with (corpus.folder / table).open(newline="") as file:
            found += [(row[path].removeprefix(corpus.base_url + "/"), row[text]) for row in csv.DictReader(file)]
    return [
        (np.stack([through_jpeg(frame) for frame in read_clip(data, 16, 3, 64, key=f"{path}{window}").frames]), text)
        for path, text in found
        if not path.startswith("faults/")
        for data in [(corpus.folder / path).read_bytes()]
        for window in range(3)
    ]


def test_real_clips_are_read_right(clips):
    scores = tabulate(*fields(clips))
    assert scores.n >= 200 and scores.all_fields >= 0.97
    assert set(scores.accuracy) == set(VOCABULARY) and min(scores.accuracy.values()) >= 0.97


def test_damaged_clips_are_read_right(clips):
    rng = np.random.default_rng(0)
    scores = tabulate(*fields((damaged(frames, rng), text) for frames, text in clips[::3]))
    assert min(scores.accuracy.values()) >= 0.95


def test_shuffled_captions_score_at_chance(clips):
    seen, said = fields(clips[::3])
    scores = tabulate(seen, [said[other] for other in someone_else(len(said), seed=0)])
    for name, accuracy in scores.accuracy.items():
        chance = scores.chance[name]
        assert abs(accuracy - chance) < 3 * np.sqrt(chance * (1 - chance) / scores.n)
        assert abs(chance - 1 / len(VOCABULARY[name])) < 0.06
    assert scores.all_fields < 0.05 and scores.chance_all_fields < 0.02


def test_pictures_are_read_without_a_direction(corpus):
    scenes = [draw_scene(corpus.config, "pictures", i) for i in range(80)]
    pictures = [(through_jpeg(render(scene, 0, 64, 64))[None], caption(scene)) for scene in scenes]
    scores = tabulate(*fields(pictures))
    assert set(scores.accuracy) == {"colour", "shape", "background"} and min(scores.accuracy.values()) >= 0.97


@pytest.mark.parametrize("level", [0, 128, 255])
def test_nothing_is_read_from_a_blank_clip(level):
    assert judge(np.full((16, 64, 64, 3), level, np.uint8)) == Fields(None, None, None, None)


def test_neither_shape_nor_motion_nor_background_is_read_from_noise():
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), np.uint8)
    assert judge(noise)[1:] == (None, None, None)


def test_no_direction_is_read_from_a_clip_that_stands_still():
    scene = Scene("red", "cross", "up", "dotted", start=(0.1, 0.2))
    assert judge(np.stack([render(scene, 0, 64, 64)] * 16)) == scene.fields._replace(direction=None)


def test_a_clip_played_backwards_moves_the_other_way():
    scene = Scene("green", "ring", "down and to the left", "striped", start=(0.2, -0.2), speed=0.1)
    frames = np.stack([render(scene, k / 3, 64, 64) for k in range(16)])
    assert judge(frames) == scene.fields
    assert judge(frames[::-1]) == scene.fields._replace(direction="up and to the right")


def test_larger_frames_are_read_as_well():
    for index, colour in enumerate(COLOURS):
        scene = replace(draw_scene(CorpusConfig(), "test", index), colour=colour)
        times = np.linspace(0, 5, 16)
        assert judge(np.stack([render(scene, t_s, 128, 128) for t_s in times])) == scene.fields


def test_tables_count_what_was_read_and_what_was_not():
    said = [
        Fields("red", "star", "left", "plain"),
        Fields("red", "ring", None, "plain"),
        Fields("blue", "star", "up", "plain"),
    ]
    seen = [
        Fields("red", "star", "right", "plain"),
        Fields("blue", None, "up", "plain"),
        Fields("blue", "star", "up", None),
    ]
    scores = tabulate(seen, said)
    assert scores.accuracy == pytest.approx({"colour": 2 / 3, "shape": 2 / 3, "direction": 1 / 2, "background": 2 / 3})
    assert scores.all_fields == 0
    assert scores.chance["colour"] == pytest.approx((2 * 1 + 1 * 2) / 9)
    shapes = scores.confusion["shape"]
    star, ring = shapes.labels.index("star"), shapes.labels.index("ring")
    assert shapes.matrix[star][star] == 2 and shapes.matrix[ring][-1] == 1


def test_no_clips_is_an_error():
    with pytest.raises(ValueError, match="no clips"):
        tabulate([], [])
