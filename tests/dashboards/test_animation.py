"""The picture of what a run makes."""

from pathlib import Path

import numpy as np

from dashboards.animation import COLUMNS, animation
from t2v import storage


def test_one_picture_a_frame_holds_every_prompt_of_the_run(run_dir: Path) -> None:
    prompts = [row["prompt"] for row in storage.read_lines(f"{run_dir}/samples/manifest.jsonl")]
    pictures = [np.array(picture) for picture in animation(str(run_dir), prompts)]
    assert len(pictures) == 16
    assert len({picture.shape for picture in pictures}) == 1
    cells = np.array_split(pictures[0], COLUMNS, axis=1)
    assert [cell.std() > 20 for cell in cells] == [index < len(prompts) for index in range(COLUMNS)]
    assert not np.array_equal(pictures[0], pictures[-1])
