"""Rows of scores from made-up features whose answer is known."""

import numpy as np
import pytest

from pipelines.evidence import Distances, shapes, someone_else
from pipelines.shapes import Fields

PLAIN = [Fields(colour, "ring", "left", "plain") for colour in ("red", "blue", "purple", "red", "blue", "purple")]


def test_distances_take_halves_as_controls() -> None:
    rng = np.random.default_rng(0)
    distances = Distances("distance", "network", "id")
    for index in range(400):
        real = rng.normal(size=(2, 4))
        generated = rng.normal(2, 1, size=(2, 4))
        distances.add(index, {"real": real, "generated": generated, "frozen": real[:1].repeat(2, 0)})
    rows = {(row["of"], row["against"]): row for row in distances.rows()}
    assert rows["generated", "real"]["clips"] == 400
    assert rows["generated", "real"]["samples"] == 800
    assert rows["generated", "real"]["value"] == pytest.approx(16, rel=0.1)
    for of, expected in (("generated", 16), ("real", 0), ("frozen", 0)):
        row = rows[of, "real, other half"]
        assert (row["clips"], row["network"], row["network_id"]) == (200, "network", "id")
        assert row["value"] == pytest.approx(expected, abs=2)
    assert rows["real", "real, other half"]["value"] > 0  # not measured against itself


def test_nobody_keeps_the_own_caption() -> None:
    for count in (2, 3, 50):
        others = someone_else(count, seed=count)
        assert sorted(others) == list(range(count))
        assert (others != np.arange(count)).all()


def test_shapes_scores_split_by_colours_that_only_pictures_had() -> None:
    generated = [fields._replace(colour="red") for fields in PLAIN]
    scores = shapes(PLAIN, generated, PLAIN, ["purple"], seed=0)
    rows = {(row["of"], row["against"]): row for row in scores.rows}
    assert scores.refused is None
    assert rows["real", "captions"]["all"] == 1
    assert rows["generated", "captions"]["colour"] == pytest.approx(1 / 3)
    assert rows["generated", "chance"]["colour"] == pytest.approx(1 / 3)
    assert rows["generated, colours seen in clips", "captions"]["colour"] == pytest.approx(1 / 2)
    assert rows["generated, colours only in pictures", "captions"] == {
        "of": "generated, colours only in pictures",
        "against": "captions",
        "clips": 2,
        "colour": 0,
        "shape": 1,
        "direction": 1,
        "background": 1,
        "all": 0,
    }
    red = scores.confusion["colour"]["labels"].index("red")
    assert np.array(scores.confusion["colour"]["matrix"])[:, red].sum() == len(PLAIN)


def test_a_judge_that_misreads_real_clips_may_not_judge() -> None:
    misread = [PLAIN[0]._replace(shape=None), *PLAIN[1:]]
    scores = shapes(misread, PLAIN, PLAIN, ["purple"], seed=0)
    assert [row["of"] for row in scores.rows] == ["real"]
    assert scores.refused == "Shapes scores refused: of real clips the judge reads shape 0.833, below 0.97."
