import numpy as np

from dashboards.verdicts import Word, distances, heats, proof
from pipelines.config import CorpusConfig
from pipelines.shapes import caption, draw_scene, render


def test_a_prompt_is_marked_with_what_the_pixels_show() -> None:
    scene = draw_scene(CorpusConfig(), "test", 0)
    frames = np.stack([render(scene, k / 3, 64, 64) for k in range(16)])
    right = proof(caption(scene), frames)
    assert "".join(word.text for word in right) == caption(scene)
    assert [word.text for word in right if word.kind == "right"] == list(scene.fields)
    wrong = [word for word in proof(caption(scene), frames[::-1]) if word.kind == "wrong"]
    assert [(word.text, word.seen) for word in wrong] == [(scene.direction, {"right": "left"}[str(scene.direction)])]


def test_a_word_within_another_is_no_field() -> None:
    grey = np.full((16, 64, 64, 3), 128, np.uint8)
    words = proof("a red cross is moving up across a plain background", grey)
    assert [word.text for word in words if word.kind != "plain"] == ["red", "cross", "up", "plain"]


def test_any_other_prompt_is_left_as_it_is() -> None:
    assert proof("an astronaut on a horse", np.zeros((16, 64, 64, 3), np.uint8)) == [Word("an astronaut on a horse")]


def test_confusion_is_shown_in_shares_of_each_row() -> None:
    (heat,) = heats(
        {"colour": {"labels": ["red", "blue", "pink"], "matrix": [[3, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]}}
    )
    assert heat.columns == ["red", "blue", "pink", "nothing"]
    assert heat.rows[0] == ("red", [(3, 0.75), (1, 0.25), (0, 0.0), (0, 0.0)])
    assert [label for label, _ in heat.rows] == ["red", "blue"]
    assert heat.accuracy == 4 / 6


def test_rows_of_one_score_stay_together() -> None:
    rows = [{"score": "frames", "of": "generated"}, {"score": "frames", "of": "real"}, {"score": "clips", "of": "real"}]
    assert [(about["score"], len(group)) for about, group in distances({"scores": rows})] == [
        ("frames", 2),
        ("clips", 1),
    ]
